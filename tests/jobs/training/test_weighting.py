"""Every completion token weighs the same: micro-batches change the memory, not the curve, whatever the class says."""

from __future__ import annotations

from pathlib import Path

import pytest

from tasks.jobs import train
from tasks.jobs.training import trainer
from tests.jobs.build import curve, notes
from tests.jobs.test_train import job_for
from tests.jobs.training.test_lora import write_mixture
from tests.jobs.whole_models import write_whole

STEPS = {"dropout": 0.0, "max_steps": 3, "eval_steps": 3}


def losses(base: Path, dataset: Path, out: Path, micro_batch: int, **changed: object) -> dict[int, float]:
    job = job_for(out, base, dataset, micro_batch=micro_batch, **STEPS | changed)
    train.run(job)
    assert ("towers" in notes(job)) == (base.name != "mixture")
    return curve(job, "train/loss")


@pytest.mark.parametrize("name", ["qwen3-vl", "mistral3"])  # accepts_loss_kwargs = False, and none
def test_two_micro_batches_one_curve(name: str, dataset: Path, tmp_path: Path):
    base = write_whole(tmp_path / "base", name)
    whole = losses(base, dataset, tmp_path / "by-8", 8)
    parts = losses(base, dataset, tmp_path / "by-2", 2, gradient_checkpointing=True)
    assert parts == pytest.approx(whole, rel=5e-4)  # bf16 sums in another order, as with a text model


def test_left_to_transformers_such_a_class_has_another_curve(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(trainer, "weigh_tokens", lambda _: None)
    base = write_whole(tmp_path / "base", "qwen3-vl")
    whole, parts = (losses(base, dataset, tmp_path / f"by-{size}", size) for size in (8, 2))
    assert parts != pytest.approx(whole, rel=5e-3)  # rows are uneven: a mean of means is not the mean


def test_a_mixtures_balance_is_no_part_of_the_objective(base: Path, dataset: Path, tmp_path: Path):
    (tmp_path / "mixture").mkdir()
    mixture = write_mixture(tmp_path / "mixture", base)
    whole, parts = (losses(mixture, dataset, tmp_path / f"by-{size}", size, accept_unquantized=True) for size in (8, 2))
    assert parts == pytest.approx(whole, rel=5e-4)
    said = notes(job_for(tmp_path / "by-8", mixture, dataset))["mixture"]
    assert "gate_up_proj" in said and "load-balancing" in said
