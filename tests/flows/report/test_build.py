"""The report of a synthetic run: the contract of report.json, figures by hand, what is said where cells are empty."""

from __future__ import annotations

import hashlib
import io
import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from rich.console import Console

from flows.report.build import NOT_SERVING, evaluate, print_report, render
from flows.report.plots.fronts import Box, _best_place
from flows.results.metrics import METRICS, difference_text, interval_text, value_text
from flows.results.read import read_run
from tests.chromium import chromium
from tests.flows.synthetic_run import BASE, SHAPES, SyntheticRun

NAMES = {
    "ppl_test",
    "ppl_all",
    "bits_per_byte",
    "ppl_general",
    "kl_mean",
    "kl_p99",
    "top1_agreement",
    "task",
    "truncated",
    "size_bytes",
    "resident_bytes",
    "load_s",
    "prefill_tokens_per_s",
    "decode_tokens_per_s",
}
BROKEN = {"what": "Scales are NaN.", "where": "layers.3", "why": "a channel is zero", "next": "raise calibrate.rows"}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def folder(home: Path) -> Path:
    return SyntheticRun(home).write()


@pytest.fixture(scope="module")
def report(home: Path, folder: Path) -> dict[str, Any]:
    render(folder, home)
    return json.loads((folder / "report.json").read_text())


def small(tmp_path: Path, **changes: Any) -> dict[str, Any]:
    """report.json of a run with fewer rows and the given changes."""
    folder = SyntheticRun(tmp_path, test=120, general=changes.pop("general", 40), **changes).write()
    return evaluate(read_run(folder, tmp_path))


def scores(home: Path, report: dict[str, Any], slug: str, file: str = "scores") -> pd.DataFrame:
    step = next(one for one in report["steps"] if one["key"] == f"evaluate/{slug}")
    return pd.read_parquet(home / step["path"] / "files" / f"{file}.parquet")


# ---- the contract


def test_every_arm_has_every_metric_in_the_agreed_form(report: dict[str, Any]) -> None:
    assert report["schema_version"] == 1
    assert list(report["arms"]) == list(SHAPES)
    for slug, arm in report["arms"].items():
        none = {"refused", "external", "kv_cache"}
        assert set(arm) == {"status", "ranked", "role", "merge_base", "path", "adapter_path", "metrics"} | none
        assert all(arm[name] is None for name in none)
        assert (arm["status"], arm["ranked"]) == ("ok", True), slug
        assert set(arm["metrics"]) == NAMES
        for name, cell in arm["metrics"].items():
            assert set(cell) == {"value", "ci95", "n", "split", "reason"}
            assert cell["value"] is not None and cell["n"] > 0
            own = slug == "nf4-adapter" and name in ("kl_mean", "kl_p99", "top1_agreement")
            assert (cell["ci95"] is None) == (own or name == "size_bytes"), (slug, name)
            if cell["ci95"]:
                assert cell["ci95"][0] <= cell["value"] <= cell["ci95"][1], (slug, name)
            expected = {"ppl_general": "general"}.get(name, "test" if METRICS[name].source else None)
            assert cell["split"] == expected


def test_paths_name_what_is_loaded(home: Path, report: dict[str, Any]) -> None:
    arms = report["arms"]
    assert arms["base"]["path"] is None and arms["base"]["adapter_path"] is None
    assert arms["nf4-adapter"]["path"] is None and arms["nf4-adapter"]["adapter_path"].startswith("store/train/")
    assert arms["gptq-w4-g128"]["path"].startswith("store/quantize/gptq-w4-g128-")
    assert arms["gptq-w4-g128.on-base"]["adapter_path"] == arms["nf4-adapter"]["adapter_path"]
    for arm in arms.values():
        for path in (arm["path"], arm["adapter_path"]):
            assert path is None or (home / path / "events.jsonl").is_file()


def test_verdicts_follow_from_the_adjusted_interval_and_the_direction(report: dict[str, Any]) -> None:
    words: set[str] = set()
    for one in report["comparisons"]:
        low, high = one["ci95_adjusted"]
        assert low <= one["ci95"][0] <= one["difference"] <= one["ci95"][1] <= high
        gain = -one["difference"] if report["directions"][one["metric"]] == "lower" else one["difference"]
        expected = "no difference shown" if low <= 0 <= high else ("better" if gain > 0 else "worse")
        assert one["verdict"] == expected
        assert one["family_size"] == sum(other["family"] == one["family"] for other in report["comparisons"])
        words.add(one["verdict"])
    assert words == {"better", "worse", "no difference shown"}  # all three were put to the test


def test_the_agreed_comparisons_are_there_with_what_was_planted(report: dict[str, Any]) -> None:
    found = {(one["a"], one["b"], one["metric"]): one for one in report["comparisons"]}
    assert found["merged-dequantized", "merged-original", "kl_mean"]["verdict"] == "better"
    assert found["rtn-w3-g128", "gptq-w3-g128", "kl_mean"]["verdict"] == "worse"
    assert found["rtn-w3-g128", "merged-dequantized", "task"]["verdict"] == "worse"
    assert found["nf4-adapter", "base", "task"]["verdict"] == "better"
    assert found["gptq-w4-g128", "gptq-w4-g128.on-base", "kl_mean"]["verdict"] == "better"
    assert ("rtn-w4-g128", "gptq-w4-g128", "kl_mean") in found
    sizes = {family["name"]: family["size"] for family in report["families"]}
    assert sizes == {
        "fine-tuning": 3,
        "merge": 7,
        "quantization": 18,
        "schemes": 30,
        "merge-first": 4,
        "calibration": 0,
        "kv-cache": 0,
        "nf4": 0,
        "external": 0,
    }
    assert report["comparisons_left_out"] == []


# ---- figures by hand


@pytest.mark.parametrize("slug", ["base", "gptq-w3-g128", "awq-w4-g128.on-base"])
def test_figures_equal_those_of_pandas(home: Path, report: dict[str, Any], slug: str) -> None:
    table = scores(home, report, slug)
    metrics = report["arms"][slug]["metrics"]

    def mean(metric: str, split: str) -> float:
        rows = table[(table.metric == metric) & (table.split == split)]
        return rows["sum"].sum() / rows["n"].sum()

    assert metrics["ppl_test"]["value"] == pytest.approx(np.exp(mean("nll", "test")), rel=1e-12)
    assert metrics["ppl_all"]["value"] == pytest.approx(np.exp(mean("nll_all", "test")), rel=1e-12)
    assert metrics["bits_per_byte"]["value"] == pytest.approx(mean("bits", "test"), rel=1e-12)
    assert metrics["ppl_general"]["value"] == pytest.approx(np.exp(mean("nll_general", "general")), rel=1e-12)
    assert metrics["kl_mean"]["value"] == pytest.approx(mean("kl", "test"), rel=1e-12)
    assert metrics["task"]["value"] == pytest.approx(mean("task", "test"), rel=1e-12)
    tokens = scores(home, report, slug, "kl").query("split == 'test'").kl.astype(float)
    assert metrics["kl_p99"]["value"] == np.quantile(tokens, 0.99, method="inverted_cdf")
    assert (metrics["kl_p99"]["n"], metrics["kl_mean"]["n"]) == (len(tokens), len(tokens))
    join = table[(table.metric == "task") & (table.split == "test") & (table.domain == "join")]
    assert report["domains"][slug]["task@join"]["value"] == pytest.approx(join["sum"].mean())
    assert report["domains"][slug]["task@join"]["n"] == len(join)


def test_sizes_by_hand(report: dict[str, Any]) -> None:
    """The quickstart's base: hidden 256, intermediate 768, six layers, 2 of 4 heads for keys and values."""
    layer = 256 * 256 * 2 + 128 * 256 * 2 + 768 * 256 * 3  # q o, k v, gate up down
    linear = 6 * layer
    blocks = linear // 64
    nested = 6 * (2 * 4 + 2 * 2 + 3 * 12)  # 1,024, 512 and 3,072 blocks a matrix, 256 of them share four bytes
    rest = 4096 * 256 + 256 * (6 * 2 + 1)  # tied embeddings, norms
    tokenizer = sum((BASE / name).stat().st_size for name in ("generation_config.json", "config.json"))
    tokenizer += 264_546 + 202 + 381  # from the adapter's tokenizer/
    size = {slug: arm["metrics"]["size_bytes"]["value"] for slug, arm in report["arms"].items()}
    adapter = 3_744_000 + 900
    assert size["nf4-adapter"] == linear // 2 + blocks + 4 * nested + 2 * rest + tokenizer + adapter
    assert size["base"] == sum(path.stat().st_size for path in BASE.iterdir())
    own = 1_100 + 98 + 264_546 + 202 + 381  # config, generation config, tokenizer; not quantize.json, not events.jsonl
    assert size["gptq-w4-g128"] == 4_716_000 + own
    assert size["gptq-w4-g128.on-base"] == 4_716_000 + own + adapter  # the tokenizer once


def test_dev_rows_are_never_looked_at(home: Path, report: dict[str, Any], tmp_path: Path) -> None:
    copy = tmp_path / "home"
    shutil.copytree(home, copy)
    for path in (copy / "store" / "evaluate").glob("*/files/scores.parquet"):
        table = pd.read_parquet(path)
        table.loc[table.split == "dev", "sum"] = 1e6
        table.to_parquet(path)
    again = evaluate(read_run(next((copy / "runs").iterdir()), copy))
    assert again["arms"] == report["arms"] and again["comparisons"] == report["comparisons"]


def test_the_same_scores_under_two_names_are_never_different(tmp_path: Path) -> None:
    run = SyntheticRun(tmp_path, test=120, general=40)
    folder = run.write()
    source, target = (
        next((tmp_path / "store" / "evaluate").glob(f"{slug}-??????*")) for slug in ("awq-w4-g128", "gptq-w4-g128")
    )
    for name in ("scores.parquet", "kl.parquet"):
        shutil.copy(source / "files" / name, target / "files" / name)
    pairs = [
        one
        for one in evaluate(read_run(folder, tmp_path))["comparisons"]
        if {one["a"], one["b"]} == {"awq-w4-g128", "gptq-w4-g128"}
    ]
    assert {one["metric"] for one in pairs} == {"kl_mean", "task"}
    assert all(one["verdict"] == "no difference shown" and one["difference"] == 0 for one in pairs)


# ---- what is missing is said


def check_reasons(report: dict[str, Any]) -> None:
    for slug, arm in report["arms"].items():
        for name, cell in arm["metrics"].items():
            assert (cell["value"] is not None) or cell["reason"], (slug, name)
    assert set(report["not_ranked"]) == {slug for slug, arm in report["arms"].items() if not arm["ranked"]}


def test_a_failed_scheme_fails_its_own_cells_only(tmp_path: Path) -> None:
    report = small(tmp_path, broken={"quantize/awq-w4-g128": BROKEN})
    check_reasons(report)
    arm = report["arms"]["awq-w4-g128"]
    assert (arm["status"], arm["ranked"], arm["path"]) == ("failed", False, None)
    assert all(cell["value"] is None for cell in arm["metrics"].values())
    assert "Scales are NaN (a channel is zero)" in arm["metrics"]["task"]["reason"]
    assert sum(one["ranked"] for one in report["arms"].values()) == len(SHAPES) - 1
    assert {one["family"] for one in report["comparisons_left_out"]} == {"quantization", "schemes", "merge-first"}
    assert not any("awq-w4-g128" in (one["a"], one["b"]) for one in report["comparisons"])
    assert [(one["step"], one["status"]) for one in report["failures"]] == [
        ("quantize/awq-w4-g128", "failed"),
        ("evaluate/awq-w4-g128", "skipped"),
        ("measure/awq-w4-g128", "skipped"),
    ]


def test_an_arm_on_other_rows_is_not_ranked_and_not_compared(tmp_path: Path) -> None:
    report = small(tmp_path, drop_rows=frozenset({"rtn-w3-g128"}))
    assert list(report["not_ranked"]) == ["rtn-w3-g128"]
    assert "other rows" in report["not_ranked"]["rtn-w3-g128"]
    assert report["arms"]["rtn-w3-g128"]["status"] == "ok"
    reasons = {one["reason"] for one in report["comparisons_left_out"]}
    assert reasons == {"the two arms were not scored on the same rows and tokens"}


def test_nan_is_never_averaged_away(tmp_path: Path) -> None:
    report = small(tmp_path, nan_rows=frozenset({"gptq-w4-g32"}))
    cell = report["arms"]["gptq-w4-g32"]["metrics"]["ppl_test"]
    assert (cell["value"], cell["reason"]) == (None, "1 of 120 rows have no finite score")
    assert list(report["not_ranked"]) == ["gptq-w4-g32"]
    json.dumps(report, allow_nan=False)


def test_a_failed_reference_leaves_nothing_to_rank(tmp_path: Path) -> None:
    run = SyntheticRun(
        tmp_path, test=60, broken={"reference/quickstart": BROKEN} | {f"evaluate/{s}": BROKEN for s in SHAPES}
    )
    report = evaluate(read_run(run.write(), tmp_path))
    check_reasons(report)
    assert len(report["not_ranked"]) == len(SHAPES) and report["comparisons"] == []
    assert all("cannot say" in answer["short"] for answer in report["answers"])
    assert report["verdict"][0].startswith("How much did fine-tuning bring? This run cannot say")


def test_switched_off_parts_say_so(tmp_path: Path) -> None:
    report = small(tmp_path, general=0, measured=False)
    arm = report["arms"]["gptq-w4-g128"]
    assert arm["metrics"]["ppl_general"]["reason"] == "the recipe has no data.general"
    assert arm["metrics"]["load_s"]["reason"] == "measure.enabled is false in the recipe"
    assert arm["ranked"] and report["speed"] == {}


def test_a_failed_measurement_costs_no_rank(tmp_path: Path) -> None:
    report = small(tmp_path, broken={"measure/base": BROKEN})
    base = report["arms"]["base"]
    assert (base["status"], base["ranked"]) == ("ok", True)
    assert base["metrics"]["decode_tokens_per_s"]["value"] is None
    assert report["failures"][0]["arms"] == ["base"]


def test_a_run_that_was_stopped_or_swept_still_reports(tmp_path: Path) -> None:
    run = SyntheticRun(tmp_path, test=60, general=20)
    folder = run.write()
    record = json.loads((folder / "steps.json").read_text())
    record["steps"] = [step for step in record["steps"] if step["key"] != "evaluate/rtn-w4-g128"]
    (folder / "steps.json").write_text(json.dumps(record))
    shutil.rmtree(next((tmp_path / "store" / "evaluate").glob("merged-original-*")))
    report = evaluate(read_run(folder, tmp_path))
    check_reasons(report)
    assert report["not_ranked"]["rtn-w4-g128"] == "the run ended before evaluate/rtn-w4-g128"
    assert report["not_ranked"]["merged-original"] == "evaluate/merged-original is not in the store any more"


def test_one_domain_or_few_arms_are_fine(tmp_path: Path) -> None:
    few = {slug: SHAPES[slug] for slug in ("base", "nf4-adapter", "merged-dequantized", "gptq-w4-g128")}
    run = SyntheticRun(tmp_path, test=40, general=10, shapes=few)
    run.domains = [""] * run.test
    report = evaluate(read_run(run.write(), tmp_path))
    assert report["domains"] == {slug: {} for slug in few}
    assert {one["family"] for one in report["comparisons"]} == {"fine-tuning", "merge", "quantization"}
    assert "cannot say" in report["answers"][3]["short"]
    assert len(report["verdict"]) == 3 and not any("cannot say" in one for one in report["verdict"])
    assert report["verdict"][2] == report["answers"][1]["short"]


def test_plain_texts_are_ranked_without_a_task_score(tmp_path: Path) -> None:
    folder = SyntheticRun(tmp_path, test=60, general=10, prompts=False).write()
    report = evaluate(read_run(folder, tmp_path))
    assert report["not_ranked"] == {} and report["domains"]["base"]
    assert "no row of test has a prompt" in report["arms"]["base"]["metrics"]["task"]["reason"]
    assert "perplexity" in report["answers"][0]["short"] and "cannot say" not in report["answers"][2]["short"]
    render(folder, tmp_path)
    assert "gptq-w4-g128" in (folder / "report.md").read_text()


def test_controls_answer_whether_calibration_mattered_and_rank_nowhere_else(tmp_path: Path) -> None:
    plain = SHAPES["awq-w4-g128"]
    few = ("base", "nf4-adapter", "merged-dequantized", "merged-original", "awq-w4-g128", "rtn-w4-g128")
    shapes = {slug: SHAPES[slug] for slug in few} | {
        "awq-w4-g128.calib-generic": replace(plain, kl=plain.kl / 20, calibration="generic"),
        "awq-w4-g128.calib-random": replace(plain, kl=plain.kl * 9, calibration="random"),
        "awq-w4-g128.scales-from-base": replace(plain, scales_from_base=True),
    }
    report = evaluate(read_run(SyntheticRun(tmp_path, general=0, measured=False, shapes=shapes).write(), tmp_path))
    made = {(one["b"], one["metric"]): one for one in report["comparisons"] if one["family"] == "calibration"}
    assert {b for b, _ in made} == {*list(shapes)[6:], "rtn-w4-g128"}
    assert {one["a"] for one in made.values()} == {"awq-w4-g128"} and len(made) == 8
    words = {b: one["verdict"] for (b, metric), one in made.items() if metric == "kl_mean"}
    assert words["awq-w4-g128.calib-generic"] == "worse" and words["awq-w4-g128.calib-random"] == "better"
    for one in report["comparisons"]:
        assert one["family"] == "calibration" or not {one["a"], one["b"]} & set(list(shapes)[6:])
    answer = report["answers"][4]
    assert answer["question"] == "Did the calibration data matter here?"
    assert "is further from the trained model than general text for awq-w4-g128 (KL +" in answer["short"]
    assert "closer to the trained model than random tokens for awq-w4-g128 (KL −" in answer["short"]
    assert "awq-w4-g128.calib-generic" not in report["answers"][2]["short"]  # not among what may be shipped


def test_figures_of_a_slow_kernel_are_labelled_and_rank_nothing(tmp_path: Path) -> None:
    report = small(tmp_path)
    assert report["speed"]["gptq-w4-g128"]["label"] == NOT_SERVING
    assert report["speed"]["base"]["label"] is None
    for path in tmp_path.glob("store/measure/*/files/speed.json"):
        record = json.loads(path.read_text())
        path.write_text(json.dumps({**record, "decode_tokens_per_s": [1e-3 * one for one in record["load_s"]]}))
    again = evaluate(read_run(next((tmp_path / "runs").iterdir()), tmp_path))
    for name in ("answers", "verdict", "comparisons", "not_ranked"):
        assert again[name] == report[name]


def test_answers_carry_their_intervals_and_can_say_no_difference(tmp_path: Path) -> None:
    shapes = dict(SHAPES)
    shapes["merged-original"] = replace(shapes["merged-original"], kl=SHAPES["merged-dequantized"].kl)
    report = small(tmp_path, shapes=shapes)
    assert "No difference that this much data can show" in report["answers"][1]["short"]
    for answer in report["answers"]:
        for sentence in answer["text"][:2]:
            assert re.search(r"\[[^\]]+, [^\]]+\]", sentence), sentence


# ---- the files


def test_rendering_is_pure_and_writes_three_files(home: Path, folder: Path, report: dict[str, Any]) -> None:
    def digests() -> dict[str, str]:
        return {
            str(path): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(home.rglob("*"))
            if path.is_file()
        }

    first = digests()
    made = render(folder, home)
    assert digests() == first
    assert {path.name for path in folder.iterdir()} == {
        *("steps.json", "recipe.resolved.json", "preflight.json"),
        *("report.json", "report.md", "report.html"),
    }
    assert made.json == report and made.markdown == (folder / "report.md").read_text()
    assert [row["arm"] for row in made.table] == list(SHAPES)


def plain_figures() -> None:
    """Draw ten plain figures with matplotlib: what drawing costs on this machine, now."""
    for _ in range(10):
        figure = Figure()
        figure.subplots().plot(range(400))
        figure.savefig(io.StringIO(), format="svg")


def cpu_seconds(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def test_rendering_the_quickstart_takes_seconds(home: Path, folder: Path) -> None:
    plain_figures()  # the first one loads fonts
    yardstick = cpu_seconds(plain_figures)
    # 12 arms and 400 rows: 4.4 to 6.2 times the yardstick; a bootstrap per cell or comparison would be far beyond 20.
    assert cpu_seconds(lambda: render(folder, home)) < 20 * yardstick


def test_nothing_heavy_is_imported() -> None:
    heavy = ["torch", "transformers", "prefect", "mlflow"]
    code = f"import sys, flows.report.build; print([name for name in {heavy} if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_the_page_is_self_contained(folder: Path, home: Path, report: dict[str, Any]) -> None:
    html = (folder / "report.html").read_text()
    assert not re.search(r"(src|href)=\"(?!#)", html)
    assert "<script" not in html and "@import" not in html and "url(http" not in html
    assert html.count("<svg role=") == 6  # KL and task by size, waterfall, domains, layers twice
    assert not re.search(r"#0[1-9ab]0[1-9ab]0[1-9ab]\b", html), "a placeholder colour was left in a plot"
    for text in ("report.html", "report.md", "report.json"):
        assert str(home) not in (folder / text).read_text()
        assert str(BASE) not in (folder / text).read_text()
    for sentence in report["verdict"]:
        assert sentence in (folder / "report.md").read_text()
    assert len(report["verdict"]) == 3


def test_what_a_problem_says_is_escaped(tmp_path: Path) -> None:
    broken = {"quantize/awq-w4-g128": {**BROKEN, "what": "<script>alert(1)</script>"}}
    folder = SyntheticRun(tmp_path, test=60, general=20, broken=broken).write()
    render(folder, tmp_path)
    assert "<script>" not in (folder / "report.html").read_text()


@pytest.mark.parametrize("width", [80, 100, 120])
def test_the_terminal_table_is_never_cut(report: dict[str, Any], width: int) -> None:
    console = Console(width=width)
    with console.capture() as captured:
        print_report(report, console)
    text = captured.get()
    assert "…" not in text
    for slug in SHAPES:
        assert re.search(rf"^\s*{re.escape(slug)} ", text, flags=re.MULTILINE)
    assert max(len(line) for line in text.splitlines()) <= width


def test_labels_keep_off_each_other() -> None:
    """Ten points within a few points of each other: every label finds a place of its own."""
    inside, taken = Box(0, 0, 360, 300), [Box(100, 100, 130, 160)]
    for index in range(10):
        place = _best_place((110 + index, 110 + 5 * index), 60, 11, taken, inside)
        assert sum(place.overlap(other) for other in taken) == 0
        assert place.overlap(inside) == pytest.approx(60 * 11)
        taken.append(place)


def test_numbers_are_written_with_the_digits_that_their_intervals_support() -> None:
    assert value_text("task", 0.9066, [0.8687, 0.9343]) == "90.7"
    assert interval_text("task", 0.9066, [0.8687, 0.9343]) == "[86.9, 93.4]"
    assert value_text("kl_mean", 0.000541, [0.00031, 0.00077]) == "0.00054"
    assert value_text("ppl_test", 1121.4, [1013.2, 1240.9]) == "1,121"
    assert value_text("size_bytes", 4_716_000) == "4.72 MB"
    assert value_text("size_bytes", 5_700_000_000) == "5.70 GB"
    assert value_text("kl_mean", None) == "–"
    assert difference_text("task", -0.1133, [-0.16, -0.065]) == "−11.3 [−16.0, −6.5] points"
    assert difference_text("kl_mean", 0.0, [0.0, 0.0]) == "0 [0, 0] nats"


# ---- in a real browser


@pytest.mark.system
@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark"), (360, "light")])
def test_the_page_fits_the_screen(folder: Path, report: dict[str, Any], width: int, scheme: str) -> None:
    with chromium() as browser:
        page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        complaints: list[str] = []
        page.on("console", lambda message: complaints.append(message.text))
        page.on("request", lambda request: complaints.append(request.url) if "report.html" not in request.url else None)
        page.goto(folder.joinpath("report.html").as_uri())
        assert page.evaluate("document.documentElement.scrollWidth") == width
        smallest = page.evaluate(
            "Math.min(...[...document.querySelectorAll('figure svg text')].map(t => t.getBoundingClientRect().height))"
        )
        assert smallest >= 8  # px a line; below that labels of the plots cannot be read on a phone
        assert complaints == []
