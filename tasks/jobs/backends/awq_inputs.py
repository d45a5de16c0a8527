"""GPTQModel's AWQ with the inputs of layers that share one (q, k and v; gate and up) kept once, not once a layer.

GPTQModel 7.6 keeps the inputs of every linear layer of a decoder layer on the host, bf16, for the whole calibration set
(AWQProcessor._record_input_feature), joins each layer's into one tensor (_layer_input_features), and divides each by
the layer's scales (apply_scale). Here equal inputs are one tensor from the first step on, which is divided once.
Scales, clipping and codes stay what they were, bit by bit; an 8B Llama holds 26,624 instead of 38,912 numbers a token.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from compressed_tensors.utils import patch_attr
from torch import Tensor


@contextlib.contextmanager
def inputs_kept_once() -> Iterator[None]:
    """While it lasts, AWQ keeps equal inputs once."""
    from gptqmodel.looper import awq_processor

    processor = awq_processor.AWQProcessor
    record, join, apply = processor._record_input_feature, processor._layer_input_features, awq_processor.apply_scale
    latest = threading.local()  # kept: of each thread that runs forward passes, the input that came last

    def record_once(self: Any, name: str, feature: Tensor, **options: Any) -> None:
        record(self, name, feature, **options)
        with self.lock:
            latest.kept = _shared(self.tasks[name]["inputs"], getattr(latest, "kept", None))

    def join_once(self: Any, state: Any) -> dict[str, Tensor]:
        latest.kept = None
        return _joined(self, state, join)

    def apply_once(module: Any, scales: list[Any], input_feat_dict: dict[str, Tensor] | None = None) -> None:
        for scaling in scales:
            apply(module, [scaling], input_feat_dict=once(input_feat_dict or {}, scaling[1]))

    with (
        patch_attr(processor, "_record_input_feature", record_once),
        patch_attr(processor, "_layer_input_features", join_once),
        patch_attr(awq_processor, "apply_scale", apply_once),
    ):
        yield


def _shared(inputs: list[Tensor], before: Tensor | None) -> Tensor | None:
    """Put `before` in the place of the newest input where the two are equal; returns the one that is kept."""
    if inputs and before is not None and torch.equal(before, inputs[-1]):
        inputs[-1] = before
    return inputs[-1] if inputs else before


def _joined(processor: Any, state: Any, join: Callable[..., dict[str, Tensor]]) -> dict[str, Tensor]:
    """What `join` makes of the layers' inputs, made once for layers that share them."""
    tasks, first_of, same_as = processor.tasks, dict[tuple[int, ...], str](), dict[str, str]()
    for name in state.modules:
        inputs = tuple(id(one) for one in tasks.get(name, {}).get("inputs", ()))
        if inputs and first_of.setdefault(inputs, name) != name:
            same_as[name] = first_of[inputs]
            tasks[name]["inputs"] = []  # the first one has them
    firsts = {name: module for name, module in state.modules.items() if name not in same_as}
    joined = join(processor, replace(state, modules=firsts))
    for name, first in same_as.items():
        tasks[name] |= {key: list(tasks[first][key]) for key in ("inputs", "batch_indices")}
        for figures in (joined, processor._awq_feature_kwargs, processor._feature_stats):
            figures[name] = figures[first]
    processor._feature_task_names |= set(same_as)
    order = [*state.modules, *(name for name in joined if name not in state.modules)]
    return {name: joined[name] for name in order}


def once(inputs: dict[str, Tensor], scaled: tuple[str, ...]) -> Mapping[str, Tensor]:
    """Of the layers that are scaled together, one for each distinct input: it is divided in place, once.

    A layer that shares the input and is not scaled with them gets a copy of its own in `inputs`.

    Args:
        inputs: Tensor by layer.
        scaled: Names of the layers.
    """
    distinct = {id(inputs[name]): name for name in reversed(scaled) if name in inputs}
    for name, tensor in inputs.items():
        if name not in scaled and id(tensor) in distinct:
            inputs[name] = tensor.clone()
    return {name: inputs[name] for name in distinct.values()}
