"""Noise of arithmetic in the report: null arms, comparisons that are no larger, arms of another device."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from flows.commands.export import export
from flows.report.build import evaluate, render
from flows.report.text import markdown
from flows.results.loading import loading_of
from flows.results.metrics import METRICS
from flows.results.read import read_run
from recipes.problem import RecipeError
from tests.flows.synthetic_run import SHAPES, Shape, SyntheticRun, computed

OF = "merged-dequantized"
BATCH, THREADS, ATTENTION = (f"{OF}.null-{kind}" for kind in ("batch", "threads", "attention"))
WHY = "this machine has one CPU slot, so there is no other number of threads"
CARD = "NVIDIA L4, compute 8.9"


def null(
    kind: str, *, kl: float = 3e-5, loss: float = 1e-5, task: float = 0.907, unavailable: str | None = None
) -> Shape:
    """A null arm whose scores are as noisy as they say."""
    return Shape("bf16", kl, loss, task, 11_547_040, "dequantized", null=kind, unavailable=unavailable)


def reported(home: Path, shapes: dict[str, Shape], **options: Any) -> tuple[dict[str, Any], Path]:
    folder = SyntheticRun(home, test=160, general=40, shapes={**SHAPES, **shapes}, **options).write()
    render(folder, home)
    return json.loads((folder / "report.json").read_text()), folder


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("nulls")


@pytest.fixture(scope="module")
def run(home: Path) -> tuple[dict[str, Any], Path]:
    """A run with one null arm that was made, and one that was not."""
    return reported(home, {BATCH: null("batch", loss=3e-4, task=0.89), THREADS: null("threads", unavailable=WHY)})


@pytest.fixture(scope="module")
def report(run: tuple[dict[str, Any], Path]) -> dict[str, Any]:
    return run[0]


def test_each_null_arm_says_what_was_other_and_what_came_of_it(report: dict[str, Any]) -> None:
    made, unmade = report["nulls"]["arms"][BATCH], report["nulls"]["arms"][THREADS]
    assert (made["kind"], made["of"], made["changed"]) == ("batch", OF, "batch size 8 instead of 16")
    arms = report["arms"]
    for metric, line in made["differences"].items():
        assert line["ci95"][0] <= line["difference"] <= line["ci95"][1]
        own, other = (arms[slug]["metrics"][metric] for slug in (BATCH, OF))
        assert line["difference"] == pytest.approx(own["value"] - other["value"]) and line["n"] == own["n"]
    assert set(made["differences"]) == {
        "task",
        "ppl_test",
        "kl_mean",
        "ppl_general",
        "bits_per_byte",
        "top1_agreement",
    }
    assert (unmade["reason"], unmade["unmade"], made["unmade"]) == (WHY, True, False)
    assert unmade["differences"] == {} and unmade["answers"] is None
    assert f"{THREADS} was not made: {WHY}." in report["nulls"]["text"]


def test_answers_are_counted_one_by_one(run: tuple[dict[str, Any], Path], home: Path) -> None:
    def answers(slug: str) -> dict[str, str]:
        (path,) = home.glob(f"store/evaluate/{slug}-{'?' * 12}/files/answers.parquet")
        table = pq.read_table(path).to_pylist()
        return {line["row"]: line["answer"] for line in table if line["split"] == "test"}

    ours, theirs = answers(BATCH), answers(OF)
    changed = sum(ours[row] != theirs[row] for row in ours)
    assert run[0]["nulls"]["arms"][BATCH]["answers"] == {"changed": changed, "n": 160}
    assert f"{changed} of 160 greedy answers changed" in " ".join(run[0]["nulls"]["text"])


def test_words_follow_the_largest_null_difference_and_nothing_else(report: dict[str, Any]) -> None:
    largest = report["nulls"]["largest"]
    told = 0
    for line in report["comparisons"]:
        source = METRICS[line["metric"]].source or ""
        if line["metric"].startswith("ppl"):
            continue  # a difference of losses decides there; the next test
        below = abs(line["difference"]) <= largest[source]["size"] and largest[source]["size"] > 0
        assert line["noise"] == ("no more than a change of the batch size makes" if below else None), line
        told += below
    assert told
    assert {line["kind"] for line in largest.values()} == {"batch"}


def test_perplexities_are_compared_by_their_losses(report: dict[str, Any]) -> None:
    """base and nf4-adapter are 6 nats apart; merged-dequantized and nf4-adapter less than the planted noise."""
    lines = {(one["a"], one["b"]): one for one in report["comparisons"] if one["metric"] == "ppl_test"}
    assert lines[OF, "nf4-adapter"]["noise"] == "no more than a change of the batch size makes"
    assert lines["nf4-adapter", "base"]["noise"] is None
    assert lines["rtn-w3-g128", OF]["noise"] is None


def test_the_largest_of_several_null_arms_gives_the_words(tmp_path: Path) -> None:
    shapes = {BATCH: null("batch", loss=2e-5), ATTENTION: null("attention", kl=1e-4, loss=5e-3)}
    report, _ = reported(tmp_path, shapes)
    assert report["nulls"]["largest"]["nll"]["arm"] == ATTENTION
    lines = [one for one in report["comparisons"] if one["metric"] == "ppl_test" and one["noise"]]
    assert lines and {one["noise"] for one in lines} == {"no more than a change of the attention kernel makes"}
    assert "eager attention instead of sdpa" in " ".join(report["nulls"]["text"])


def test_a_null_arm_is_no_way_to_ship(run: tuple[dict[str, Any], Path], home: Path) -> None:
    report, folder = run
    arm = report["arms"][BATCH]
    assert (arm["role"], arm["ranked"], arm["path"]) == ("null", False, report["arms"][OF]["path"])
    assert BATCH not in (report["gate"]["candidate"], *report["gate"]["left_out"], *report["loading"])
    assert BATCH not in loading_of(read_run(folder, home))
    assert BATCH not in report["speed"] and arm["metrics"]["decode_tokens_per_s"]["reason"]
    assert BATCH not in [one["arm"] for one in report["fit"]["arms"]]
    assert BATCH not in report["samples"]["arms"]
    assert not any(BATCH in (one["a"], one["b"]) for one in report["comparisons"])
    assert "noise of arithmetic" in str(read_run(folder, home).arm(BATCH).unfit)  # type: ignore[union-attr]
    with pytest.raises(RecipeError) as caught:
        export(folder, BATCH, home / "out", home=home)
    assert "computed in another way" in caught.value.problems[0].why


def test_it_stands_in_a_place_of_its_own(run: tuple[dict[str, Any], Path]) -> None:
    report, folder = run
    text = markdown(report)
    arms, noise = (text.split(f"## {head}")[1].split("\n## ")[0] for head in ("Arms", "How much is noise"))
    assert f"| {BATCH}" not in arms and f"| {BATCH}" in noise and "Not ranked: merged" not in text
    assert THREADS not in arms and f"| {THREADS}" not in noise and WHY in noise
    assert re.search(r"no difference shown; no more than a change of the batch size makes", text)
    page = (folder / "report.html").read_text()
    assert "How much is noise of arithmetic?" in page and "no more than a change of the batch size makes" in page
    before = page.split('id="noise"')[0]
    assert f"</span>{BATCH}" not in before and f"</span>{BATCH}" in page


def test_a_run_without_null_arms_says_nothing_of_them(tmp_path: Path) -> None:
    report, folder = reported(tmp_path, {})
    assert "nulls" not in report and not any("noise" in one for one in report["comparisons"])
    assert "noise of arithmetic" not in (folder / "report.md").read_text() + (folder / "report.html").read_text()


@pytest.mark.parametrize("kind", ["batch", "threads", "attention"])
def test_what_was_no_other_is_no_null_arm(kind: str, tmp_path: Path) -> None:
    """The other arm may be older, made with the threads that are other now; a model may have one kernel alone."""
    slug = f"{OF}.null-{kind}"
    folder = SyntheticRun(tmp_path, test=60, general=0, shapes={**SHAPES, slug: null(kind)}).write()
    (path,) = tmp_path.glob(f"store/evaluate/{slug}-{'?' * 12}/manifest.json")
    raw = json.loads(path.read_text())
    path.write_text(json.dumps({**raw, "result": {"computed": computed(None)}}))
    report: dict[str, Any] = {**evaluate(read_run(folder, tmp_path))}
    arm = report["nulls"]["arms"][slug]
    assert "was no other: both were computed with" in arm["reason"] and arm["differences"] == {}
    assert report["nulls"]["largest"] == {} and not any(one["noise"] for one in report["comparisons"])


def test_cpus_with_other_instructions_are_named_and_stop_nothing(tmp_path: Path) -> None:
    folder = SyntheticRun(tmp_path, test=60, general=0, shapes={**SHAPES, BATCH: null("batch")}).write()
    for path in tmp_path.glob("store/evaluate/*/manifest.json"):
        raw = json.loads(path.read_text())
        raw["result"]["computed"]["instructions"] = "AVX2" if raw["slug"] == "base" else "AVX512"
        path.write_text(json.dumps(raw))
    report: dict[str, Any] = {**evaluate(read_run(folder, tmp_path))}
    (line,) = (line for line in report["nulls"]["text"] if "different instructions" in line)
    assert "AVX2: base; AVX512: nf4-adapter" in line and "base" not in report["not_ranked"]
    for path in tmp_path.glob("store/evaluate/base-*/manifest.json"):
        path.write_text(path.read_text().replace("AVX2", "AVX512"))
    report = {**evaluate(read_run(folder, tmp_path))}
    assert not any("instructions" in line for line in report["nulls"]["text"])


def test_a_null_arm_that_failed_says_so(tmp_path: Path) -> None:
    problem = {"what": "out of GPU memory", "where": "x", "why": "scores", "next": "lower evaluate.batch_size"}
    report, _ = reported(tmp_path, {BATCH: null("batch")}, broken={f"evaluate/{BATCH}": problem})
    assert "out of GPU memory" in report["nulls"]["arms"][BATCH]["reason"]
    assert report["nulls"]["largest"] == {} and report["arms"][BATCH]["status"] == "failed"


# ---- another device


def test_arms_of_another_device_are_not_paired(tmp_path: Path) -> None:
    slug = "gptq-w4-g128"
    report, folder = reported(tmp_path, {BATCH: null("batch")}, devices={slug: CARD, BATCH: CARD})
    why = f"scored on another device: {CARD}, most arms on cpu"
    assert report["not_ranked"][slug] == why
    cell = report["arms"][slug]["metrics"]["kl_mean"]
    assert cell["value"] is not None and cell["reason"] == why
    assert not any(slug in (one["a"], one["b"]) for one in report["comparisons"])
    left = [one for one in report["comparisons_left_out"] if slug in (one["a"], one["b"])]
    assert left and all(one["reason"].startswith("scored on another device: ") for one in left)
    assert "it cannot be paired with merged-dequantized" in report["nulls"]["arms"][BATCH]["reason"]
    assert next(one for one in report["power"] if one["arm"] == slug)["reason"] == "scored on another device"
    (path,) = (one for one in report["waterfall"]["paths"] if one["arm"] == slug)
    assert "scored on another device" in path["reason"]
    assert "different devices" in report["gate"]["left_out"][slug]
    assert why in (folder / "report.md").read_text()


def test_devices_that_nobody_names_stop_nothing(tmp_path: Path) -> None:
    """Older manifests say cpu or cuda, and not which card."""
    folder = SyntheticRun(tmp_path, test=60, general=0, devices={"gptq-w4-g128": ""}).write()
    report: dict[str, Any] = {**evaluate(read_run(folder, tmp_path))}
    assert "gptq-w4-g128" not in report["not_ranked"]
    (path,) = tmp_path.glob(f"store/evaluate/gptq-w4-g128-{'?' * 12}/manifest.json")
    raw = json.loads(path.read_text())
    path.write_text(json.dumps({**raw, "execution": {**raw["execution"], "device": "cuda"}}))
    assert "scored on another device" in evaluate(read_run(folder, tmp_path))["not_ranked"]["gptq-w4-g128"]


def test_most_arms_say_which_device_is_the_usual_one(tmp_path: Path) -> None:
    """The reference may be the odd one; where two kinds have equally many arms, it is the usual one."""
    few = {slug: SHAPES[slug] for slug in ("base", "nf4-adapter", OF, "gptq-w4-g128")}
    for name, elsewhere, expected in (
        ("odd", ["nf4-adapter"], {"nf4-adapter"}),
        ("even", ["nf4-adapter", "base"], {OF, "gptq-w4-g128"}),
    ):
        devices = dict.fromkeys(elsewhere, CARD)
        folder = SyntheticRun(tmp_path / name, test=60, general=0, shapes=few, devices=devices).write()
        report = evaluate(read_run(folder, tmp_path / name))
        assert {slug for slug, why in report["not_ranked"].items() if "another device" in why} == expected
