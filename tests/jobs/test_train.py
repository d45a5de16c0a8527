"""Training: the right tokens are trained, gradients are checked, a killed training goes on exactly."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from bitsandbytes.functional import has_avx512bf16
from safetensors.torch import load_file

from recipes.schema import Train
from tasks.jobs import train
from tasks.jobs.loading.load import linear4bit, load_arm
from tasks.jobs.training import trainer
from tasks.jobs.training.gradients import check_gradients
from tasks.runtime.process.errors import StageError
from tasks.runtime.process.job import Job
from tests.jobs.build import curve, make_job, notes

STEPS = 12
SETTINGS = Train(rank=4, alpha=8, learning_rate=5e-3, batch_size=8, max_steps=STEPS, checkpoint_steps=4, dropout=0.1)


def job_for(out: Path, base: Path, dataset: Path, *, micro_batch: int | None = None, **changed: Any) -> Job:
    params = SETTINGS.model_dump() | changed
    return make_job("train", out, params=params, base=base, dataset=dataset, micro_batch=micro_batch)


@pytest.fixture(scope="module")
def whole(base: Path, dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Job, dict[str, Any]]:
    """An uninterrupted training and its result."""
    job = job_for(tmp_path_factory.mktemp("whole") / "out", base, dataset)
    return job, train.run(job)


class Killed(BaseException):
    """What stands in for SIGKILL inside the test's process."""


def kill_at(step: int, job: Job, patch: pytest.MonkeyPatch, *, when: str = "on_step_end") -> None:
    """Run the job until `step` optimizer steps are done, then die; files/ is emptied as the store does."""
    original = getattr(trainer.Reporter, when)

    def die(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        original(self, args, state, control, **kwargs)
        if state.global_step == step:
            raise Killed

    with patch.context() as context:
        context.setattr(trainer.Reporter, when, die)
        with pytest.raises(Killed):
            train.run(job)
    shutil.rmtree(job.out)
    job.out.mkdir()


def adapter(job: Job) -> dict[str, torch.Tensor]:
    return load_file(job.out / "adapter_model.safetensors")


def test_the_adapter_is_a_plain_peft_folder(whole: tuple[Job, dict[str, Any]], base: Path, dataset: Path) -> None:
    job, result = whole
    names = {path.name for path in job.out.iterdir()}
    assert names == {
        "adapter_model.safetensors",
        "adapter_config.json",
        "tokenizer",
        "train.json",
        "nf4.json",
        "events.jsonl",
    }
    config = json.loads((job.out / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == job.inputs["base"].digest  # no path of this machine
    assert len(adapter(job)) == 2 * 14  # A and B of every linear layer; nothing of the base
    for path in (dataset / "tokenizer").iterdir():
        assert (job.out / "tokenizer" / path.name).read_bytes() == path.read_bytes()
    assert load_arm("nf4", base, adapter=job.out, device="cpu").peft_config["default"].r == 4
    assert result["steps"] == STEPS
    assert result["trainable_parameters"] == sum(tensor.numel() for tensor in adapter(job).values())
    assert result["gradient_cosine"] > 0.999


def test_it_learns_and_says_so(whole: tuple[Job, dict[str, Any]]) -> None:
    job, result = whole
    loss = curve(job, "train/loss")
    assert list(loss) == list(range(1, STEPS + 1))
    assert loss[STEPS] < loss[1] - 0.5  # from 5.7, the logarithm of the vocabulary; 12 steps give about 2 nats
    assert set(curve(job, "train/grad_norm")) == set(curve(job, "train/learning_rate")) == set(loss)
    assert curve(job, "train/dev_loss")[STEPS] == result["dev_loss"]
    assert len(curve(job, "train/dev_loss")) == trainer.DEV_POINTS


def test_labels_are_exactly_the_mask(base: Path, dataset: Path, tmp_path: Path) -> None:
    """Also where the padding token is the token that ends a turn: padding is told by place, not by id."""
    config = json.loads((dataset / "tokenizer" / "tokenizer_config.json").read_text())
    same = shutil.copytree(base, tmp_path / "base")
    (same / "tokenizer_config.json").write_text(json.dumps(config | {"pad_token": config["eos_token"]}))
    job = job_for(tmp_path / "out", same, dataset)
    built = trainer.make_trainer(job, train._model(job))
    rows = pq.read_table(dataset / "rows.parquet", filters=[("split", "==", "train")]).to_pylist()
    expected = {
        tuple(row["input_ids"]): [
            token if inside else -100 for token, inside in zip(row["input_ids"], row["completion_mask"], strict=True)
        ]
        for row in rows
    }
    seen = 0
    for batch in built.get_train_dataloader():
        for ids, labels, attended in zip(batch["input_ids"], batch["labels"], batch["attention_mask"], strict=True):
            length = int(attended.sum())
            assert labels[:length].tolist() == expected[tuple(ids[:length].tolist())]
            assert set(labels[length:].tolist()) <= {-100}
            seen += 1
    assert seen == len(rows) > 30


def test_the_same_job_gives_the_same_adapter(
    whole: tuple[Job, dict[str, Any]], base: Path, dataset: Path, tmp_path: Path
) -> None:
    job = job_for(tmp_path / "out", base, dataset)
    train.run(job)
    first, second = adapter(whole[0]), adapter(job)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(("killed", "when", "resumed"), [(10, "on_step_end", 8), (STEPS, "on_train_end", 8)])
def test_a_killed_training_goes_on_exactly(
    whole: tuple[Job, dict[str, Any]],
    base: Path,
    dataset: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    killed: int,
    when: str,
    resumed: int,
) -> None:
    """Optimizer, schedule, data order and dropout go on: same curve, same weights; the early curve is told again."""
    job = job_for(tmp_path / "out", base, dataset)
    kill_at(killed, job, monkeypatch, when=when)
    result = train.run(job)
    assert result["resumed_from_step"] == resumed
    assert notes(job)["checkpoint"] == f"resuming from checkpoint-{resumed}"
    for name in trainer.CURVES.values():
        assert curve(job, name) == curve(whole[0], name)
    first, second = adapter(whole[0]), adapter(job)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert result["tokens"] == whole[1]["tokens"]
    assert (job.out / "train.json").read_bytes() == (whole[0].out / "train.json").read_bytes()


@pytest.mark.parametrize("damage", ["truncated", "missing", "unfinished"])
def test_a_broken_last_checkpoint_falls_back_to_the_one_before(
    whole: tuple[Job, dict[str, Any]],
    base: Path,
    dataset: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    damage: str,
) -> None:
    job = job_for(tmp_path / "out", base, dataset)
    kill_at(10, job, monkeypatch)
    last = job.checkpoint / "checkpoint-8"
    if damage == "truncated":
        (last / "optimizer.pt").write_bytes((last / "optimizer.pt").read_bytes()[:-100])
    elif damage == "missing":
        (last / "trainer_state.json").unlink()
    else:
        (last / "whole.json").unlink()
    result = train.run(job)
    assert result["resumed_from_step"] == 4
    assert curve(job, "train/loss") == curve(whole[0], "train/loss")


def test_checkpoints_of_other_inputs_are_not_used(
    base: Path, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fingerprint says what was asked for; a remade dataset may hold other bytes under the same one."""
    job = job_for(tmp_path / "out", base, dataset)
    kill_at(6, job, monkeypatch)
    (job.checkpoint / "inputs.json").write_text(json.dumps({"base": "digest-base", "dataset": "another"}))
    assert train.run(job)["resumed_from_step"] == 0
    assert "other inputs" in notes(job)["checkpoint"]


def test_accumulation_is_the_whole_batch(
    whole: tuple[Job, dict[str, Any]], base: Path, dataset: Path, tmp_path: Path
) -> None:
    """Same rows a step and a mean over tokens: without dropout only rounding differs."""
    whole_batch = job_for(tmp_path / "one", base, dataset, dropout=0.0, max_steps=3)
    two = job_for(tmp_path / "two", base, dataset, dropout=0.0, max_steps=3, micro_batch=2)
    train.run(whole_batch)
    train.run(two)
    expected = curve(whole_batch, "train/loss")
    # Rounding makes up to 5e-5 of it here; a mean of the micro-batches' means would be off by 7e-3.
    assert curve(two, "train/loss") == pytest.approx(expected, rel=5e-4)


@pytest.mark.skipif(not has_avx512bf16(), reason="this CPU lacks AVX512-BF16, so bitsandbytes' fault cannot show")
@pytest.mark.filterwarnings("ignore:bitsandbytes.*autograd kernel was not registered")
def test_the_gradient_check_fires_on_the_kernel_without_backward(base: Path, dataset: Path, tmp_path: Path) -> None:
    job = job_for(tmp_path / "out", base, dataset)
    model = train._model(job)
    batch = next(iter(trainer.make_trainer(job, model).get_train_dataloader()))
    assert check_gradients(model, batch).sound
    for layer in linear4bit(model).values():
        layer.support_avx512bf16_for_cpu = True  # what load_nf4 turns off
    with pytest.raises(StageError, match="gradient") as refused:
        check_gradients(model, batch)
    assert "cosine 0." in refused.value.problem.where


def test_a_loss_that_is_no_number_is_refused(base: Path, dataset: Path, tmp_path: Path) -> None:
    job = job_for(tmp_path / "out", base, dataset, learning_rate=1e30, max_grad_norm=1e30)
    with pytest.raises(StageError, match="no longer a number"):
        train.run(job)
    assert len(curve(job, "train/loss")) < STEPS  # it did not train on
