"""AWQ with scales and clipping from a search on another model: can the quantization of the base be reused?

GPTQModel 7.6 searches in two methods of AWQProcessor, once per decoder layer, and does all else (scaling, clipping,
rounding, packing) with what they return. So the search runs on the other model, what it returns is kept, and on the
model that is quantized the two methods return that. Clipping is kept as it was found: the largest absolute value of
each group.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from tasks.jobs.backends import Request


class Scaling(NamedTuple):
    """What AWQProcessor._search_best_scale returns, for layers that share an input.

    Attributes:
        before: The module that is divided by the scales.
        layers: The layers that are multiplied by them.
        scales: [in].
        loss: Of the layers' block on the model of the search.
    """

    before: str
    layers: tuple[str, ...]
    scales: Tensor
    loss: float


@dataclass
class Search:
    """Results of a search.

    Attributes:
        scalings: By number of the decoder layer and names of the layers.
        clips: By number of the decoder layer: name of a layer, largest absolute values [out, groups, 1].
    """

    scalings: dict[tuple[int, tuple[str, ...]], Scaling] = field(default_factory=dict)
    clips: dict[int, list[tuple[str, Tensor]]] = field(default_factory=dict)


@contextlib.contextmanager
def scales_found_on(model: Path, request: Request) -> Iterator[None]:
    """While it lasts, GPTQModel's AWQ takes scales and clipping from this model instead of searching for them.

    Args:
        model: bf16 model folder of the same shape as the request's.
        request: How to search. Its out folder gets what the search writes and throws away.
    """
    from tasks.jobs.backends import gptqmodel  # not in every environment that runs quantize

    with _recording() as search, tempfile.TemporaryDirectory(dir=request.out) as scratch:
        gptqmodel.quantize(replace(request, model=model, out=Path(scratch)))
    request.events.note(
        "scales from another model",
        f"{len(search.scalings)} scalings and {sum(map(len, search.clips.values()))} clippings were found on the base "
        "and are applied as they are; the losses of the layers are those of that search",
    )
    with _reusing(search):
        yield


@contextlib.contextmanager
def _recording() -> Iterator[Search]:
    from gptqmodel.looper.awq_processor import AWQProcessor

    search = Search()
    scale, clip = AWQProcessor._search_best_scale, AWQProcessor._search_best_clip

    def search_scale(self: Any, module: Any, *args: Any, **more: Any) -> tuple[str, tuple[str, ...], Tensor, float]:
        scaling = Scaling(*scale(self, module, *args, **more))
        search.scalings[_layer(self), scaling.layers] = scaling._replace(scales=scaling.scales.clone())
        return scaling

    def search_clip(self: Any, *args: Any) -> list[tuple[str, Tensor]]:
        clips = clip(self, *args)
        search.clips[_layer(self)] = [(name, most.clone()) for name, most in clips]
        return clips

    with _replaced(AWQProcessor, search_scale, search_clip):
        yield search


@contextlib.contextmanager
def _reusing(search: Search) -> Iterator[None]:
    from gptqmodel.looper.awq_processor import AWQProcessor, get_op_name

    def search_scale(self: Any, module: Any, prev_op: Any, layers: Sequence[Any], **_: Any) -> Scaling:
        scaling = search.scalings[_layer(self), tuple(get_op_name(module, layer) for layer in layers)]
        return scaling._replace(scales=scaling.scales.clone())

    def search_clip(self: Any, *_: Any) -> list[tuple[str, Tensor]]:
        return [(name, most.clone()) for name, most in search.clips[_layer(self)]]

    with _replaced(AWQProcessor, search_scale, search_clip):
        yield


def _layer(processor: Any) -> int:
    """Number of the decoder layer that this thread works on."""
    return processor._scale_context.layer_index


@contextlib.contextmanager
def _replaced(owner: Any, scale: Callable[..., Any], clip: Callable[..., Any]) -> Iterator[None]:
    before = owner._search_best_scale, owner._search_best_clip
    owner._search_best_scale, owner._search_best_clip = scale, clip
    try:
        yield
    finally:
        owner._search_best_scale, owner._search_best_clip = before
