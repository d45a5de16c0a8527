"""The choice of a merge base: the trained weights win, whichever they are; ties and test scores change nothing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import PreTrainedModel

from flows.results.draws import draw
from flows.results.stats import Estimand, Sums, difference_intervals, studentized
from tasks.jobs import choose, evaluate, merge, prepare, reference
from tasks.jobs.choose import Grouped, paired
from tasks.jobs.loading.load import load_bf16, load_nf4
from tasks.runtime.process.errors import StageError
from tests.jobs.build import make_job, notes, write_jsonl
from tests.jobs.test_evaluate import PARAMS as EVALUATE
from tests.jobs.test_prepare import PARAMS as PREPARE
from tests.tiny import write_base

MERGES = ("dequantized", "original")


def choice(folder: Path, **scores: Path) -> dict[str, Any]:
    """choose.run over two folders of scores, by name of the merge."""
    inputs = {f"{name}_scores": path for name, path in scores.items()} | {name: folder for name in scores}
    job = make_job("choose", folder / "out", params={}, **inputs)
    result = choose.run(job)
    assert json.loads((folder / "out" / "choice.json").read_text()) == result
    assert notes(job)["choice"].startswith(result["candidate"])
    return result


def write_scores(folder: Path, losses: np.ndarray, *, test: np.ndarray | None = None, rows: int = 2) -> Path:
    """scores.parquet with the loss of each group of dev, split over its rows; test has its own."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for split, means in (("dev", losses), ("test", losses if test is None else test)):
        for group, mean in enumerate(means):
            for row in range(rows):
                place = {"row": f"{split}{group}-{row}", "group": f"{split}{group}", "split": split, "domain": ""}
                n = 5 + group % 7
                lines.append({**place, "metric": "nll", "sum": float(mean) * n, "n": n})
                lines.append({**place, "metric": "kl", "sum": 99.0 * group, "n": n})
    pq.write_table(pa.Table.from_pylist(lines, schema=evaluate.SCORES), folder / "scores.parquet")
    return folder


# ---- by figures that are known


@pytest.mark.parametrize("devices", [("cpu", "NVIDIA L4, compute 8.9"), ("cpu", "cpu"), ("cpu", None)])
def test_nothing_is_decided_between_scores_of_two_devices(devices: tuple[str, str | None], tmp_path: Path) -> None:
    """original is better by far; scored elsewhere, that may be the devices' doing, and the default stands."""
    losses = np.full(40, 1.0) + np.random.default_rng(0).normal(0, 0.01, 40)
    scores = {
        "dequantized": write_scores(tmp_path / "d", losses + 0.5),
        "original": write_scores(tmp_path / "o", losses),
    }
    for folder, device in zip(scores.values(), devices, strict=True):
        if device is not None:
            (folder / choose.COMPUTED).write_text(json.dumps({"device": device}))
    made = choice(tmp_path, **scores)
    if len({*devices} - {None}) == 1:
        assert made["candidate"] == "original" and "undecided" not in made
    else:
        assert made["candidate"] == "dequantized" and set(made) == {"candidate", "rule", "undecided"}
        assert "merged-original on NVIDIA L4, compute 8.9" in made["undecided"]


def test_the_only_candidate_is_named_and_nothing_is_read(tmp_path: Path) -> None:
    job = make_job("choose", tmp_path / "out", params={}, original=tmp_path)
    assert choose.run(job) == {"candidate": "original"}
    assert (tmp_path / "out" / "choice.json").read_text() == '{"candidate": "original"}\n'


@pytest.mark.parametrize(("shift", "wins"), [(0.02, "dequantized"), (-0.02, "original"), (0.0, "dequantized")])
def test_the_lower_loss_wins_and_a_tie_goes_to_the_dequantized_base(tmp_path: Path, shift: float, wins: str) -> None:
    rng = np.random.default_rng(0)
    losses = rng.gamma(1.0, 1.0, 40)
    noise = rng.normal(0, 0.02, 40)  # standard error 0.003: a shift of 0.02 is six of them
    chosen = choice(
        tmp_path,
        dequantized=write_scores(tmp_path / "d", losses),
        original=write_scores(tmp_path / "o", losses + shift + noise - noise.mean()),
    )
    assert chosen["candidate"] == wins
    low, high = chosen["ci95"]
    assert (low <= 0 <= high) == (shift == 0)
    assert (chosen["rows"], chosen["groups"]) == (80, 40)
    assert chosen["tokens"] == 2 * sum(5 + group % 7 for group in range(40))
    assert chosen["difference"] == pytest.approx(chosen["loss"]["dequantized"] - chosen["loss"]["original"])


def test_equal_scores_and_a_single_group_are_ties(tmp_path: Path) -> None:
    same = write_scores(tmp_path / "same", np.ones(9))
    chosen = choice(tmp_path / "equal", dequantized=same, original=same)
    assert (chosen["candidate"], chosen["difference"], chosen["ci95"]) == ("dequantized", 0.0, [0.0, 0.0])
    scores = [write_scores(tmp_path / name, np.array([loss])) for name, loss in (("d", 2.0), ("o", 1.0))]
    chosen = choice(tmp_path / "one", dequantized=scores[0], original=scores[1])
    assert (chosen["candidate"], chosen["difference"], chosen["ci95"]) == ("dequantized", 1.0, None)


def test_scores_of_test_change_nothing(tmp_path: Path) -> None:
    losses = np.random.default_rng(1).gamma(1.0, 1.0, 30)
    worse = losses + 0.1
    before = choice(
        tmp_path / "before",
        dequantized=write_scores(tmp_path / "d", worse),
        original=write_scores(tmp_path / "o", losses),
    )
    assert before["candidate"] == "original"
    for name, test in (("swapped", losses - 9), ("nan", np.full(30, np.nan))):
        after = choice(
            tmp_path / name,
            dequantized=write_scores(tmp_path / f"d-{name}", worse, test=test),
            original=write_scores(tmp_path / f"o-{name}", losses, test=losses + 9),
        )
        assert after == before


def test_other_rows_and_losses_that_are_no_number_are_refused(tmp_path: Path) -> None:
    good, fewer = write_scores(tmp_path / "good", np.ones(9)), write_scores(tmp_path / "fewer", np.ones(8))
    with pytest.raises(StageError, match="same rows of dev"):
        choice(tmp_path, dequantized=good, original=fewer)
    broken = write_scores(tmp_path / "broken", np.array([1.0] * 8 + [np.nan]))
    with pytest.raises(StageError, match="is not a number"):
        choice(tmp_path, dequantized=good, original=broken)


def draws(kind: str, rng: np.random.Generator, groups: int) -> np.ndarray:
    """[groups] differences with mean 0: of even and of heavy tails, and skewed."""
    return {
        "normal": lambda: rng.normal(0, 1, groups),
        "heavy": lambda: rng.standard_t(3, groups),
        "skewed": lambda: rng.lognormal(0, 1, groups) - np.exp(0.5),
    }[kind]()


@pytest.mark.parametrize("kind", ["normal", "heavy"])
def test_where_nothing_differs_the_original_base_is_seldom_chosen(kind: str) -> None:
    """2.5 % by design; 4 % is three standard errors above it over 1,000 trials. Skewed differences: see docs/adr."""
    rng = np.random.default_rng(5)
    wrong = 0
    for _ in range(1000):
        tokens = rng.integers(5, 60, 40).astype(float)
        comparison = paired(Grouped(draws(kind, rng, 40) * tokens, tokens), Grouped(np.zeros(40), tokens))
        assert comparison.ci95 is not None
        wrong += comparison.ci95[0] > 0
    assert wrong <= 40


@pytest.mark.parametrize("kind", ["normal", "heavy", "skewed"])
def test_the_interval_is_close_to_the_reports_bootstrap(kind: str) -> None:
    rng = np.random.default_rng(7)
    tokens = rng.integers(5, 60, 200).astype(float)
    total = draws(kind, rng, 200) * tokens
    comparison = paired(Grouped(total, tokens), Grouped(np.zeros(200), tokens))
    estimand = Estimand(Sums(total, tokens), Sums(np.zeros(200), tokens))
    (wanted,) = difference_intervals(studentized([estimand], draw(200)))
    assert comparison.ci95 is not None
    width = wanted.high - wanted.low
    # The bootstrap widens for the tails that it sees.
    assert np.abs(np.array(comparison.ci95) - np.array(wanted)).max() < 0.06 * width


# ---- by models that were really trained


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base/ and dataset/: the answer follows from the question, so that what is learnt holds on dev."""
    folder = tmp_path_factory.mktemp("choose")
    base = write_base(folder / "base")
    words = ("blue", "SELECT name FROM books", "the sky", "year > 1990")
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"what {'is ' * (i % 4)}the answer {i} ?"},
                {"role": "assistant", "content": words[i % 4]},
            ]
        }
        for i in range(160)
    ]
    data = write_jsonl(folder / "rows.jsonl", rows)
    params = PREPARE | {"dev": 0.4, "test": 0.05}
    prepare.run(make_job("prepare", folder / "dataset", params=params, data=data, tokenizer=base))
    return folder


def train_on(weights: Callable[..., PreTrainedModel], world: Path, out: Path) -> Path:
    """A LoRA on the base as `weights` loads it, trained on train for 40 steps; PEFT folder with tokenizer/."""
    torch.manual_seed(0)
    rows = [r for r in pq.read_table(world / "dataset" / "rows.parquet").to_pylist() if r["split"] == "train"]
    ids = torch.zeros(len(rows), max(len(row["input_ids"]) for row in rows), dtype=torch.long)
    labels = torch.full_like(ids, -100)
    for i, row in enumerate(rows):
        ids[i, : len(row["input_ids"])] = torch.tensor(row["input_ids"])
        masked = [token if keep else -100 for token, keep in zip(row["input_ids"], row["completion_mask"], strict=True)]
        labels[i, : len(masked)] = torch.tensor(masked)
    lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(weights(world / "base", device="cpu"), lora).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.data = parameter.data.float()
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    for _ in range(40):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(out, save_embedding_layers=False)
    shutil.copytree(world / "dataset" / "tokenizer", out / "tokenizer")
    return out


@pytest.mark.parametrize(("weights", "wins"), [(load_nf4, "dequantized"), (load_bf16, "original")])
def test_the_weights_that_were_trained_win(
    weights: Callable[..., PreTrainedModel], wins: str, world: Path, tmp_path: Path
) -> None:
    adapter = train_on(weights, world, tmp_path / "adapter")
    base, dataset = world / "base", world / "dataset"
    params = {"batch_size": 64, "reference_gib": 4.0, "seed": 0}
    job = make_job("reference", tmp_path / "ref", params=params, dataset=dataset, base=base, adapter=adapter)
    reference.run(job)
    scores = {}
    for onto in MERGES:
        model = tmp_path / onto
        merge.run(make_job("merge", model, params={"onto": onto}, base=base, adapter=adapter))
        scores[onto] = tmp_path / f"{onto}-scores"
        params = EVALUATE | {"max_new_tokens": 1, "batch_size": 64}
        inputs = {"model": model, "dataset": dataset, "reference": tmp_path / "ref"}
        evaluate.run(make_job("evaluate", scores[onto], params=params, **inputs))
    chosen = choice(tmp_path / "choice", **scores)
    assert chosen["candidate"] == wins
    low, high = chosen["ci95"]
    assert high < 0 if wins == "dequantized" else low > 0  # shown, not left to the tie rule
