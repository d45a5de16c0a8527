"""Dataset + base -> LoRA adapter: NF4 QLoRA through TRL's SFTTrainer, the same code on CPU and CUDA."""

from __future__ import annotations

import math
import shutil
import time
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from peft import PeftModel

from tasks.jobs.loading.cpu_nf4 import note_other_scales
from tasks.jobs.loading.load import load_nf4, setup
from tasks.jobs.merging.nf4 import write_record
from tasks.jobs.training.checkpoints import last_checkpoint, restore_best
from tasks.jobs.training.gradients import check_gradients
from tasks.jobs.training.lora import add_adapter, finish, note_mixture, save_weights
from tasks.jobs.training.packing import check_packing
from tasks.jobs.training.trainer import Trainer, make_trainer, rows_of
from tasks.jobs.training.unquantized import check_unquantized
from tasks.runtime.process.errors import StageError
from tasks.runtime.process.job import Job

OF_THE_ATTEMPT = ("tokens_per_s", "padding_share", "train_s", "total_s", "resumed_from_step")


def run(job: Job) -> dict[str, Any]:
    """Train the adapter; as one of several ranks where `accelerate launch` started them.

    Reads:
        dataset: rows.parquet (train, dev) and tokenizer/. base: model folder.
    Writes:
        adapter_model.safetensors, adapter_config.json, tokenizer/ (copied), train.json. Checkpoints go to
        `job.checkpoint`; a killed training goes on from the last whole one with the same curve. Rank 0 writes.
    Metrics:
        train/loss, train/learning_rate, train/grad_norm per step; train/dev_loss every `eval_steps`; losses are mean
        nats per completion token.

    Raises:
        StageError: Gradients differ after an evaluation; packed rows see each other; too much of the base stays
            unquantized; the loss is not a number.
    """
    setup(job)
    started = time.monotonic()
    model = _model(job)
    trainer = make_trainer(job, model)
    _check(job, trainer, model)
    checkpoint = _restored_checkpoint(job)
    first_step = int(checkpoint.name.rpartition("-")[2]) if checkpoint else 0
    outcome = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    state = trainer.state
    if not any(point.step == state.global_step for point in trainer.dev_losses):
        trainer.evaluate()
    final_loss = _final_loss(trainer)
    kept = trainer.best if job.params["keep"] == "best" else trainer.dev_losses[-1]
    train_s = outcome.metrics["train_runtime"] - _evaluating_s(trainer, first_step)
    result = {
        "steps": state.global_step,
        "resumed_from_step": first_step,
        "epochs": state.epoch,
        "tokens": int(state.num_input_tokens_seen),
        # of this attempt only: steps before the resume were not timed here
        "tokens_per_s": trainer.tokens_here / train_s,
        "padding_share": trainer.padding_share(),
        "train_s": train_s,
        "total_s": time.monotonic() - started,
        "final_loss": final_loss,
        "dev_loss": kept.loss,
        "kept_step": kept.step,
        "gradient_cosine": trainer.gradient_cosine,
        "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
    }
    weights = trainer.whole_weights()  # every rank has to ask
    if job.rank == 0:
        save_weights(model, job.out, state=weights)
        write_record(model, job.out)
        finish(job, best=kept.step != state.global_step)
        shutil.copytree(job.inputs["dataset"].path / "tokenizer", job.out / "tokenizer")
        # Without what differs from one training to the next: equal weights are an equal adapter.
        job.write_json("train.json", {name: value for name, value in result.items() if name not in OF_THE_ATTEMPT})
    trainer.accelerator.wait_for_everyone()  # a rank that ends earlier takes the others' connection with it
    return result


def _model(job: Job) -> PeftModel:
    """The NF4 base with a fresh adapter on it."""
    execution = job.execution
    sharded = execution.processes > 1 and execution.launcher == "fsdp-qlora"
    base = load_nf4(
        job.inputs["base"].path, device=execution.device, attention=job.params["attention"], sharded=sharded
    )
    check_unquantized(base, job)
    note_other_scales(base, job.events.note)
    model = add_adapter(base, job.params)
    note_mixture(model, job)
    return model


def _check(job: Job, trainer: Trainer, model: PeftModel) -> None:
    """Everything that is checked on real rows before step 1.

    Raises:
        StageError: Gradients differ after an evaluation; packed rows see each other.
    """
    rows, collate = rows_of(job.inputs["dataset"].path, "train", most=2).to_list(), trainer.data_collator
    if job.params["packing"]:
        error = check_packing(model, rows, collate=collate)
        job.events.note("packing", f"packed rows give what they give alone: hidden states differ by {error:.2%} (bf16)")
    gradients = check_gradients(model, collate(rows))
    trainer.gradient_cosine = gradients.cosine
    job.events.note(
        "gradients", f"before and after an evaluation: cosine {gradients.cosine:.6f}, norm x {gradients.norm_ratio:.4f}"
    )


def _restored_checkpoint(job: Job) -> Path | None:
    """The checkpoint to resume from, the same on every rank, with its best weights put back."""
    [checkpoint] = broadcast_object_list([last_checkpoint(job) if job.rank == 0 else None])
    if job.rank == 0:
        restore_best(job, checkpoint)
    return checkpoint


def _final_loss(trainer: Trainer) -> float:
    """Loss of the last step.

    Raises:
        StageError: It, or the last dev loss, is not a number.
    """
    loss = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry][-1]
    if not math.isfinite(loss) or not math.isfinite(trainer.dev_losses[-1].loss):
        raise StageError.of(
            what="the loss is no longer a number",
            where=f"step {trainer.state.global_step}",
            why="the adapter's weights are worthless after it",
            next="lower train.learning_rate or train.max_grad_norm",
        )
    return loss


def _evaluating_s(trainer: Trainer, first_step: int) -> float:
    """Seconds that this attempt's dev losses took."""
    return sum(
        entry["eval_runtime"]
        for entry in trainer.state.log_history
        if entry["step"] > first_step and "eval_loss" in entry
    )
