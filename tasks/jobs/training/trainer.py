"""TRL's SFTTrainer on tokenised rows, with an exact dev loss, the best weights, and events."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any, NamedTuple, cast

import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq
import torch
from accelerate import PartialState
from datasets import Dataset
from peft import PeftModel
from transformers import (
    PrinterCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from tasks.jobs.text.tokenizer import load_tokenizer
from tasks.jobs.training.checkpoints import best_weights, link_best, mark_whole
from tasks.jobs.training.lora import WEIGHTS, save_weights, to_fp32
from tasks.runtime.process.job import Job

pc: Any = pyarrow.compute  # its functions are made when it is imported: no types
SCHEDULES = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}
CURVES = {
    "loss": "train/loss",
    "learning_rate": "train/learning_rate",
    "grad_norm": "train/grad_norm",
    "eval_loss": "train/dev_loss",
}
DEV_ROWS = 128  # of dev, for the dev loss: rows are in the order of their hashes, so the first ones are a fair sample
IGNORED = pa.scalar(-100, pa.int32())  # label of a token that is not trained: torch's loss leaves it out
IDS = pa.list_(pa.int32())
DEV_POINTS = 4  # dev losses per training, where eval_steps is not set: each costs DEV_ROWS forward passes


class DevLoss(NamedTuple):
    """Mean nats per completion token of the first DEV_ROWS dev rows after a step."""

    step: int
    loss: float


class Trainer(SFTTrainer):
    """SFTTrainer with a dev loss that depends on nothing but the weights: not on batches, packing or processes."""

    job: Job
    dev: list[dict[str, Any]]
    gradient_cosine: float = math.nan
    _positions = 0

    @property
    def dev_losses(self) -> list[DevLoss]:
        """So far, with those of earlier attempts: checkpoints carry the history."""
        return [
            DevLoss(int(entry["step"]), entry["eval_loss"]) for entry in self.state.log_history if "eval_loss" in entry
        ]

    @property
    def best(self) -> DevLoss:
        """The lowest dev loss; the earliest of equal ones."""
        return min((point for point in self.dev_losses if math.isfinite(point.loss)), key=lambda point: point.loss)

    @property
    def tokens_here(self) -> int:
        """Tokens trained in this attempt, over all ranks, without padding."""
        return int(self.state.num_input_tokens_seen - self._initial_num_input_tokens_seen)

    def padding_share(self) -> float:
        """Share of padding among the positions of this attempt's training batches, over all ranks."""
        positions: Any = self.accelerator.reduce(torch.tensor(self._positions, device=self.args.device))
        return 1 - self.tokens_here / positions.item()

    def training_step(self, model: torch.nn.Module, inputs: dict[str, Any], *args: Any) -> torch.Tensor:
        """Forward and backward of one micro-batch; counts its positions."""
        self._positions += inputs["input_ids"].numel()
        return super().training_step(model, inputs, *args)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Dev loss, the sum of nats over the sum of tokens; then keep a new best, or stop where none has come."""
        clock, model = time.monotonic(), cast("torch.nn.Module", self.model)
        model.eval()
        # Not through compute_loss: it gathers metrics once per batch, and ranks may have different numbers of them.
        sums = torch.zeros(2, dtype=torch.float64, device=self.args.device)
        for batch in self._dev_batches():
            with torch.no_grad(), self.accelerator.autocast():
                out = model(**self._prepare_inputs(batch), use_cache=False, fused_lm_head=True)
            sums += torch.stack([-out.log_probs.double().sum(), out.label_mask.double().sum()])
        summed: Any = self.accelerator.reduce(sums)
        nats, tokens = summed.tolist()
        metrics = {"eval_loss": nats / tokens, "eval_runtime": time.monotonic() - clock}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self._keep_or_stop()
        return metrics

    def _dev_batches(self) -> list[dict[str, Any]]:
        """This rank's share of dev. Rows without labels fill up, so that FSDP ranks do as many forward passes."""
        world, rank, size = self.args.world_size, self.args.process_index, self.args.per_device_eval_batch_size
        rows = self.dev
        silent = {"input_ids": rows[0]["input_ids"], "labels": [-100] * len(rows[0]["input_ids"])}
        mine = [*rows, *[silent] * (-len(rows) % world)][rank::world]
        return [self.data_collator(mine[start : start + size]) for start in range(0, len(mine), size)]

    def _keep_or_stop(self) -> None:
        """Keep the weights of a new best; stop after `patience` dev losses without one."""
        params, losses = self.job.params, self.dev_losses
        finite = [point for point in losses if math.isfinite(point.loss)]
        if params["keep"] == "best" and finite and self.best == losses[-1]:
            self._keep_best()
        if params["patience"] and finite:
            since = len(losses) - 1 - losses.index(self.best)
            if since >= params["patience"]:
                self.job.events.note(
                    "early stop",
                    f"{since} dev losses in a row above that of step {self.best.step}: {self.best.loss:.4f}",
                )
                self.control.should_training_stop = True
                self.control.should_save = False  # resumed there, the Trainer would go on training

    def _keep_best(self) -> None:
        weights = self.whole_weights()
        if self.job.rank == 0:
            draft = self.job.checkpoint / "best.draft"
            save_weights(self.accelerator.unwrap_model(self.model), draft, state=weights)
            (draft / WEIGHTS).replace(best_weights(self.job))

    def whole_weights(self) -> Any:
        """All tensors, gathered from the ranks (every rank has to ask); None where they are not sharded."""
        return self.accelerator.get_state_dict(self.model_wrapped) if self.is_fsdp_enabled else None


class Reporter(TrainerCallback):
    """Writes the curve to the job's events and marks whole checkpoints."""

    def __init__(self, job: Job) -> None:
        self.job, self.events = job, job.events

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
        """An optimizer step is done. Nothing is saved after the last: resumed there, the Trainer would add a step."""
        self.events.progress(state.global_step, state.max_steps, note="training")
        if state.global_step >= state.max_steps:
            control.should_save = False

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Everything of a checkpoint is written, by every rank."""
        PartialState().wait_for_everyone()
        if self.job.rank == 0:
            folder = self.job.checkpoint / f"checkpoint-{state.global_step}"
            link_best(self.job, folder)
            mark_whole(folder)

    def _emit(self, entry: dict[str, float], step: int) -> None:
        for key, name in CURVES.items():
            if key in entry:
                self.events.metric(name, entry[key], step=step)


def make_trainer(job: Job, model: PeftModel) -> Trainer:
    """The trainer of a job, its adapter in fp32."""
    dataset = job.inputs["dataset"].path
    train, dev = rows_of(dataset, "train"), rows_of(dataset, "dev", most=DEV_ROWS)
    batch = job.params["batch_size"]
    if job.execution.processes > 1 and len(train) % batch:
        job.events.note(
            "ranks",
            f"the last step of an epoch has {len(train) % batch} rows of {batch} and is filled up with its first",
        )
    trainer = Trainer(
        model=model,
        args=_settings(job, rows=len(train)),
        train_dataset=train,
        eval_dataset=dev,  # the Trainer wants one; `evaluate` reads `dev`
        processing_class=load_tokenizer(job.inputs["base"].path),
        callbacks=[Reporter(job)],
    )
    trainer.job, trainer.dev = job, dev.to_list()
    weigh_tokens(trainer)
    trainer.remove_callback(PrinterCallback)
    to_fp32(model)
    return trainer


def weigh_tokens(trainer: Trainer) -> None:
    """Every completion token of a batch weighs the same, in whatever micro-batches and on whatever rank it stands.

    transformers counts a batch's tokens only for classes that take the count themselves. Gemma 4, Qwen3-VL, Qwen3.5 and
    others say that theirs does not (accepts_loss_kwargs = False): then each micro-batch has its own mean, and a mean of
    those is another objective for each run.micro_batch. TRL's trainer divides by the count itself, over labels that it
    shifts, so that every class may be treated alike.
    """
    trainer.model_accepts_loss_kwargs = True
    trainer._loss_shifts_labels = True


def _settings(job: Job, *, rows: int) -> SFTConfig:
    params, execution = job.params, job.execution
    on_cpu = execution.device == "cpu"
    batch, processes = params["batch_size"], execution.processes
    micro_batch = execution.micro_batch or max(1, batch // processes)
    steps = params["max_steps"] or math.ceil(rows / batch) * params["epochs"]
    return SFTConfig(
        output_dir=str(job.checkpoint),
        per_device_train_batch_size=micro_batch,
        per_device_eval_batch_size=micro_batch,
        gradient_accumulation_steps=batch // (micro_batch * processes),
        num_train_epochs=params["epochs"],
        max_steps=params["max_steps"] or -1,
        learning_rate=params["learning_rate"],
        lr_scheduler_type=SCHEDULES[params["schedule"]],
        warmup_steps=params["warmup_ratio"],  # below 1: a share of the steps
        weight_decay=params["weight_decay"],
        max_grad_norm=params["max_grad_norm"],
        optim="adamw_torch" if on_cpu else "paged_adamw_8bit",
        bf16=True,
        use_cpu=on_cpu,
        ddp_backend="gloo" if on_cpu and processes > 1 else None,
        ddp_find_unused_parameters=False,
        gradient_checkpointing=params["gradient_checkpointing"],
        seed=params["seed"],
        save_strategy="steps",
        save_steps=params["checkpoint_steps"],
        save_total_limit=2,  # the one before stays in case the last is broken
        eval_strategy="steps",
        eval_steps=params["eval_steps"] or max(1, math.ceil(steps / DEV_POINTS)),
        logging_steps=1,
        logging_nan_inf_filter=False,  # the filter shows the mean of earlier steps for a loss that is not a number
        # Packed batches have no attention mask: every position is a token.
        include_num_input_tokens_seen="all" if params["packing"] else "non_padding",
        dataloader_num_workers=0,
        dataloader_pin_memory=not on_cpu,
        max_length=None,  # prepare has cut the rows
        # Not TRL's `packing`, which makes sequences of several rows: a batch would no longer be `batch_size` rows.
        padding_free=params["packing"],
        dataset_kwargs={"skip_prepare_dataset": True},  # ids and labels are given
        # A mixture's load-balancing loss is a mean per micro-batch: run.micro_batch would change the objective.
        router_aux_loss_coef=0.0,
        report_to="none",
        disable_tqdm=True,
    )


def rows_of(dataset: Path, split: str, *, most: int | None = None) -> Dataset:
    """input_ids and labels of one split: -100 wherever the completion mask is False.

    They stay Arrow columns, 8 bytes a token; a row becomes Python lists when it is asked for.

    Args:
        dataset: The dataset.
        split: train, dev or test.
        most: Rows, the first ones of the file.
    """
    table = pq.read_table(
        dataset / "rows.parquet", columns=["input_ids", "completion_mask"], filters=[("split", "==", split)]
    )
    batches = table.slice(0, most).to_batches()
    labels = [_labels(batch["input_ids"], batch["completion_mask"]) for batch in batches]
    columns = {"input_ids": pa.chunked_array([batch["input_ids"] for batch in batches], IDS)}
    table = pa.table(columns | {"labels": pa.chunked_array(labels, IDS)})
    return Dataset(table, fingerprint=split)  # else datasets would hash all of it


def _labels(ids: Any, mask: Any) -> pa.Array:
    """Of list arrays: the ids where the mask is True, IGNORED elsewhere."""
    starts = pc.subtract(ids.offsets, ids.offsets[0])  # flatten() leaves out what a slice does not show
    return pa.ListArray.from_arrays(starts, pc.if_else(mask.flatten(), ids.flatten(), IGNORED))
