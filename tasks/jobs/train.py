"""Dataset + base -> LoRA adapter: NF4 QLoRA through TRL's SFTTrainer, the same code on CPU and CUDA."""

from __future__ import annotations

import json
import math
import shutil
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoTokenizer,
    PrinterCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from recipes.problem import Problem
from tasks.jobs.backends.load import load_nf4, setup
from tasks.jobs.checkpoints import last_checkpoint, mark_whole
from tasks.jobs.gradients import check_gradients
from tasks.jobs.nf4 import write_record
from tasks.runtime.errors import StageError
from tasks.runtime.job import Job

SCHEDULES = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}
CURVES = {
    "loss": "train/loss",
    "learning_rate": "train/learning_rate",
    "grad_norm": "train/grad_norm",
    "eval_loss": "train/dev_loss",
}
OF_THE_ATTEMPT = ("tokens_per_s", "train_s", "total_s", "resumed_from_step")
DEV_ROWS = 128  # of dev, for the dev loss: rows are in the order of their hashes, so the first ones are a fair sample
DEV_POINTS = 4  # dev losses a training: each costs DEV_ROWS forward passes


def run(job: Job) -> dict[str, Any]:
    """Train the adapter.

    Reads:
        dataset: rows.parquet (train, dev) and tokenizer/. base: model folder.
    Writes:
        adapter_model.safetensors, adapter_config.json, tokenizer/ (copied), train.json. Checkpoints go to
        `job.checkpoint`; a killed training goes on from the last whole one with the same curve.
    Metrics:
        train/loss, train/learning_rate, train/grad_norm a step; train/dev_loss four times; losses are mean
        nats a completion token.

    Raises:
        StageError: Gradients differ after an evaluation; the loss is no number.
    """
    setup(job)
    started = time.monotonic()
    dataset = job.inputs["dataset"].path
    model = _model(job)
    trainer = _trainer(job, model)
    batch = next(iter(trainer.get_train_dataloader()))
    alike = check_gradients(model, {name: tensor[:2] for name, tensor in batch.items()})
    job.events.note(
        "gradients", f"before and after an evaluation: cosine {alike.cosine:.6f}, norm x {alike.norm_ratio:.4f}"
    )
    resume = last_checkpoint(job)
    first_step = int(resume.name.rpartition("-")[2]) if resume else 0
    outcome = trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    history = trainer.state.log_history
    if not any("eval_loss" in entry and entry["step"] == trainer.state.global_step for entry in history):
        trainer.evaluate()
    losses = [entry["loss"] for entry in history if "loss" in entry]
    dev_loss = [entry["eval_loss"] for entry in history if "eval_loss" in entry][-1]
    if not math.isfinite(losses[-1]) or not math.isfinite(dev_loss):
        raise StageError(
            Problem(
                what="the loss is no longer a number",
                where=f"step {trainer.state.global_step}",
                why="the adapter's weights are worthless after it",
                next="lower train.learning_rate or train.max_grad_norm",
            )
        )
    _save_adapter(model, job)
    write_record(model, job.out)
    shutil.copytree(dataset / "tokenizer", job.out / "tokenizer")
    state = trainer.state
    evaluating_s = sum(
        entry["eval_runtime"] for entry in history if entry["step"] > first_step and "eval_loss" in entry
    )
    seconds = outcome.metrics["train_runtime"] - evaluating_s
    tokens = int(state.num_input_tokens_seen)
    result = {
        "steps": state.global_step,
        "resumed_from_step": first_step,
        "epochs": state.epoch,
        "tokens": tokens,
        # of this attempt only: steps before the resume were not timed here
        "tokens_per_s": tokens * (state.global_step - first_step) / state.global_step / seconds,
        "train_s": seconds,
        "total_s": time.monotonic() - started,
        "final_loss": losses[-1],
        "dev_loss": dev_loss,
        "gradient_cosine": alike.cosine,
        "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
    }
    # Without what differs from one training to the next: equal weights are an equal adapter.
    kept = {name: value for name, value in result.items() if name not in OF_THE_ATTEMPT}
    (job.out / "train.json").write_text(json.dumps(kept, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return result


class Reporter(TrainerCallback):
    """Writes the curve to the job's events and marks whole checkpoints."""

    def __init__(self, job: Job) -> None:
        self.events, self.checkpoint = job.events, job.checkpoint

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Replay the curve of earlier attempts: the artifact's event file starts empty in each."""
        for entry in state.log_history:
            self._emit(entry, int(entry["step"]))

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """A step's figures, or a dev loss. Training ends at the first loss that is no number."""
        self._emit(logs or {}, state.global_step)
        if not math.isfinite((logs or {}).get("loss", 0.0)):
            control.should_training_stop = True

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """One optimizer step is done. None is saved after the last: resumed there, the Trainer would add a step."""
        self.events.progress(state.global_step, state.max_steps, note="training")
        if state.global_step >= state.max_steps:
            control.should_save = False

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Everything of a checkpoint is written."""
        mark_whole(self.checkpoint / f"checkpoint-{state.global_step}")

    def _emit(self, entry: dict[str, float], step: int) -> None:
        for key, name in CURVES.items():
            if key in entry:
                self.events.metric(name, entry[key], step=step)


def _model(job: Job) -> PeftModel:
    """The NF4 base with a fresh LoRA on it."""
    params = job.params
    lora = LoraConfig(
        r=params["rank"],
        lora_alpha=params["alpha"],
        lora_dropout=params["dropout"],
        target_modules=params["targets"],
        task_type="CAUSAL_LM",
    )
    return get_peft_model(load_nf4(job.inputs["base"].path, device=job.execution.device), lora)


def _trainer(job: Job, model: PeftModel) -> SFTTrainer:
    """SFTTrainer over rows that are tokenised already."""
    params, device = job.params, job.execution.device
    dataset, base = job.inputs["dataset"].path, job.inputs["base"].path
    micro_batch = job.execution.micro_batch or params["batch_size"]
    train, dev = _rows(dataset, "train"), _rows(dataset, "dev")
    dev = dev.select(range(min(DEV_ROWS, len(dev))))
    steps = params["max_steps"] or math.ceil(len(train) / params["batch_size"]) * params["epochs"]
    settings = SFTConfig(
        output_dir=str(job.checkpoint),
        per_device_train_batch_size=micro_batch,
        per_device_eval_batch_size=micro_batch,
        gradient_accumulation_steps=params["batch_size"] // micro_batch,
        num_train_epochs=params["epochs"],
        max_steps=params["max_steps"] or -1,
        learning_rate=params["learning_rate"],
        lr_scheduler_type=SCHEDULES[params["schedule"]],
        warmup_steps=params["warmup_ratio"],  # below 1: a share of the steps
        weight_decay=params["weight_decay"],
        max_grad_norm=params["max_grad_norm"],
        optim="adamw_torch" if device == "cpu" else "paged_adamw_8bit",
        bf16=True,
        use_cpu=device == "cpu",
        gradient_checkpointing=params["gradient_checkpointing"],
        seed=params["seed"],
        save_strategy="steps",
        save_steps=params["checkpoint_steps"],
        save_total_limit=2,  # the one before stays in case the last is broken
        eval_strategy="steps",
        eval_steps=max(1, math.ceil(steps / DEV_POINTS)),
        prediction_loss_only=True,
        logging_steps=1,
        logging_nan_inf_filter=False,  # the filter shows the mean of earlier steps for a loss that is no number
        include_num_input_tokens_seen="non_padding",
        dataloader_num_workers=0,
        dataloader_pin_memory=device == "cuda",
        max_length=None,  # prepare has cut the rows
        dataset_kwargs={"skip_prepare_dataset": True},  # ids and labels are given
        report_to="none",
        disable_tqdm=True,
    )
    trainer = SFTTrainer(
        model=model,
        args=settings,
        train_dataset=train,
        eval_dataset=dev,
        processing_class=AutoTokenizer.from_pretrained(str(base), local_files_only=True),
        callbacks=[Reporter(job)],
    )
    trainer.remove_callback(PrinterCallback)
    for parameter in model.parameters():
        # TRL made the adapter bf16, where Adam's late, small updates round away: after 150 steps of the quickstart
        # (learning rate 2e-3) the dev loss is 0.764 in bf16 and 0.747 in fp32, same rows and seed.
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return trainer


def _rows(dataset: Path, split: str) -> Dataset:
    """input_ids and labels of one split: -100 wherever the completion mask is False."""
    table = pq.read_table(
        dataset / "rows.parquet", columns=["input_ids", "completion_mask"], filters=[("split", "==", split)]
    )
    ids, masks = table["input_ids"].to_pylist(), table["completion_mask"].to_pylist()
    labels = [
        [token if keep else -100 for token, keep in zip(*row, strict=True)] for row in zip(ids, masks, strict=True)
    ]
    return Dataset.from_dict({"input_ids": ids, "labels": labels})


def _save_adapter(model: PeftModel, job: Job) -> None:
    """Adapter weights and config, without a path of this machine: the base is named by its digest."""
    model.save_pretrained(str(job.out), save_embedding_layers=False)
    (job.out / "README.md").unlink(missing_ok=True)
    path = job.out / "adapter_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = job.inputs["base"].digest
    config["target_modules"] = sorted(config["target_modules"])
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
