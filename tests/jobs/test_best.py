"""Dev losses choose: the best weights are kept, also over a kill; a training that gets no better ends."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from recipes.data.rows import side
from tasks.jobs import prepare, train
from tasks.jobs.loading.load import load_arm
from tasks.jobs.training.trainer import rows_of
from tests.jobs.build import curve, make_job, notes, write_jsonl
from tests.jobs.test_prepare import PARAMS, chat
from tests.jobs.test_train import adapter, job_for, kill_at

# So high a rate that dev gets worse after a few steps: the best is in the middle.
TOO_FAST = {"learning_rate": 0.1, "schedule": "constant", "warmup_ratio": 0.0, "eval_steps": 1, "max_steps": 10}
TOO_FAST |= {"dropout": 0.0}


@pytest.fixture(scope="module")
def dataset(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train always answers `blue` and dev never does: what is learned first helps on dev, what comes then hurts."""
    folder = tmp_path_factory.mktemp("data")
    rows: list[dict[str, Any]] = []
    for number in range(80):
        in_train = side(f"g{number}", salt=PARAMS["salt"], dev=PARAMS["dev"], test=PARAMS["test"]) == "train"
        answer = f"it is {'blue' if in_train else 'not'} {number % 7}"
        rows.append({"messages": chat(f"what is {number} ?", answer), "group": f"g{number}"})
    data = write_jsonl(folder / "rows.jsonl", rows)
    params = PARAMS | {"group": "group"}
    prepare.run(make_job("prepare", folder / "dataset", params=params, data=data, tokenizer=base))
    return folder / "dataset"


def dev_loss(base: Path, adapter: Path, dataset: Path) -> float:
    """Nats a completion token of all dev rows, one by one, by plain transformers and PEFT."""
    model = load_arm("nf4", base, adapter=adapter, device="cpu")
    nats, tokens = 0.0, 0
    for row in rows_of(dataset, "dev"):
        ids, labels = torch.tensor(row["input_ids"]), torch.tensor(row["labels"])[1:]
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(ids[None]).logits[0, :-1].float()
        nats += torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum").item()
        tokens += int((labels != -100).sum())
    return nats / tokens


def test_the_best_weights_are_kept_also_over_a_kill(
    base: Path,
    dataset: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    whole = job_for(tmp_path / "whole", base, dataset, keep="best", **TOO_FAST)
    result = train.run(whole)
    points = curve(whole, "train/dev_loss")
    best = min(points, key=lambda step: points[step])
    assert 1 < best < 10  # else keeping the last would do
    assert (result["kept_step"], result["dev_loss"]) == (best, points[best])
    # bf16 sums of rows alone and of padded batches
    assert dev_loss(base, whole.out, dataset) == pytest.approx(points[best], rel=2e-3)
    assert dev_loss(base, whole.out, dataset) < points[10] - 0.01

    # From a checkpoint before the best, whose weights lie there already, and from one after it.
    for killed, steps, resumed in ((best + 1, best - 1, best - 1), (9, 8, 8)):
        job = job_for(tmp_path / f"{killed}", base, dataset, keep="best", checkpoint_steps=steps, **TOO_FAST)
        kill_at(killed, job, monkeypatch)
        assert train.run(job)["resumed_from_step"] == resumed
        assert curve(job, "train/dev_loss") == points
        first, second = adapter(whole), adapter(job)
        assert all(torch.equal(first[name], second[name]) for name in first)


def test_training_ends_when_dev_gets_no_better(base: Path, dataset: Path, tmp_path: Path):
    job = job_for(tmp_path / "out", base, dataset, patience=2, checkpoint_steps=1, **TOO_FAST)
    result = train.run(job)
    points = curve(job, "train/dev_loss")
    best = min(points, key=lambda step: points[step])
    assert result["steps"] == result["kept_step"] == best + 2 < 10
    assert f"step {best}" in notes(job)["early stop"]
    assert not (job.checkpoint / f"checkpoint-{result['steps']}").exists()  # resumed there, it would train on
    assert all(math.isfinite(loss) for loss in points.values())
