"""Compares each quantized module of the base with the adapter's record: are these the weights that were trained on?"""

from __future__ import annotations

import json
import threading
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from recipes.models.adapters import RECORD
from tasks.jobs.loading.load import linear4bit
from tasks.jobs.merging.nf4 import Nf4, digests, module_name, sampled, ulps
from tasks.runtime.process.errors import StageError
from tasks.runtime.process.job import Job


class Records:
    """The adapter's nf4.json and what this merge found against it. Safe to use from several threads."""

    def __init__(self, folder: Path) -> None:
        path = folder / RECORD
        self.record: dict[str, Any] | None = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
        self.exact = 0
        self.close: dict[str, float] = {}
        self.other: list[str] = []
        self._lock = threading.Lock()

    @property
    def modules(self) -> dict[str, Any]:
        """Recorded modules by name; empty without a record."""
        return {} if self.record is None else self.record["modules"]

    @property
    def trained_on_cpu(self) -> bool:
        """By the record; what is without one was mostly trained elsewhere, on a GPU."""
        return self.record is not None and self.record["device"] == "cpu"

    def check_names(self, four_bit: Collection[str]) -> None:
        """Recorded modules that this base does not have as 4-bit ones are of another base."""
        self.other += sorted(self.modules.keys() - set(four_bit))

    def compare(self, module: str, weight: Nf4, values: torch.Tensor) -> None:
        """Judge one module as this merge makes it; `values` are bf16 at `sample_positions`."""
        if self.record is not None:
            self.judge(module, digests(weight.codes, weight.scales, weight.nested, weight.offset), values)

    def judge_model(self, model: nn.Module) -> None:
        """Judge the 4-bit modules of a loaded model."""
        if self.record is None:
            return
        layers = {module_name(name): layer for name, layer in linear4bit(model).items()}
        self.check_names(layers)
        for module in self.modules.keys() & layers.keys():
            state: Any = layers[module].weight.quant_state  # pyright: ignore[reportAttributeAccessIssue]
            now = digests(layers[module].weight.data, state.absmax, state.state2, state.offset)
            self.judge(module, now, sampled(layers[module]))

    def judge(self, module: str, now: Mapping[str, str], values: torch.Tensor) -> None:
        """Judge one module by its digests and its sampled values (bf16), near also where scales differ a little."""
        recorded = self.modules[module]
        recorded_values = torch.tensor(recorded["values"])
        near = now["codes"] == recorded["codes"] and ulps(recorded_values, values) <= 1
        same = near and now["scales"] == recorded["scales"]
        with self._lock:
            if same:
                self.exact += 1
            elif near:
                self.close[module] = float((recorded_values - values.float()).abs().max())
            else:
                self.other.append(module)

    def conclude(self, job: Job) -> dict[str, Any]:
        """Note and return how this base compares with the trained one.

        Raises:
            StageError: Modules are not what was trained, and the recipe does not accept it.
        """
        if self.record is None:
            job.events.note("base", "the adapter has no record of the NF4 weights that it was trained on: not compared")
            return {"record": "none"}
        if self.other and not job.params.get("accept_other_base", False):
            raise self._refusal(job)
        comparison: dict[str, Any] = {
            "record": "other" if self.other else "close" if self.close else "exact",
            "modules_exact": self.exact,
            "modules_close": len(self.close),
            "largest_difference": max(self.close.values(), default=0.0),
            "modules_other": sorted(self.other),
        }
        if self.other:
            job.events.note(
                "base",
                f"{len(self.other)} modules are not the NF4 weights that were trained; accepted by "
                f"merge.accept_other_base: {', '.join(sorted(self.other))}",
            )
        elif self.close:
            job.events.note(
                "base",
                f"scales of {len(self.close)} modules differ from the trained ones in their last bits; sampled values "
                f"by up to {comparison['largest_difference']:.3g}, at most one step of bf16",
            )
        else:
            job.events.note("base", f"all {self.exact} NF4 modules are bit for bit those that were trained")
        return comparison

    def _refusal(self, job: Job) -> StageError:
        assert self.record is not None
        trained_on, here = self.record["device"], job.execution.device
        merge_it = (
            f"run it on {trained_on}, where it was trained" if trained_on != here else "merge it into its own base"
        )
        return StageError.of(
            what=f"{len(self.other)} of {len(self.modules)} NF4 modules are not those that the adapter was trained on",
            where=", ".join(sorted(self.other)),
            why=f"another base, or another arithmetic (trained on {trained_on} with bitsandbytes "
            f"{self.record['bitsandbytes']}): the merge would not be the model that was trained",
            next=f"{merge_it}; or accept it: merge.accept_other_base: true",
        )
