"""Logits of a tile of tokens at a time: the decoder runs once, the model's own code behind it once a tile.

The logits of a batch are rows x tokens x vocabulary: 8 GiB in bf16 for 8 rows of 2,048 tokens and a vocabulary of
262,144. What makes them is the model's own business: an output layer (tied, quantized, with an adapter), and behind it
soft caps, scales, columns that are cut off. None of that is written again here. The model is called once a tile, and in
these calls the decoder gives what it gave in the first one, cut to the tile's tokens.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

if TYPE_CHECKING:  # a seventh of the import time, and most arms have no adapter
    from peft import PeftModel

Model: TypeAlias = "PreTrainedModel | PeftModel"
# Logits of a tile in the model's type: 256 tokens of Gemma's 262,144, 512 of Llama 3's 128,256. With fewer, a GPU waits
# for the weights of the output layer: a token is one operation for each of their bytes in bf16, and by their data
# sheets a 4090 does 165 operations while it reads a byte, an H200 206.
TILE_BYTES = 128 << 20
WHOLE = "of a whole batch at once, not tile by tile: this model has no decoder that could run alone"  # a note
LARGEST_VOCABULARY = 1 << 18  # counted where config.json names none


@torch.inference_mode()
def each_tile(
    model: Model, ids: Tensor, mask: Tensor, *, places: Tensor, take: Callable[[Tensor], None], **arguments: Any
) -> bool:
    """One forward pass over a batch; `take` gets its logits tile by tile.

    Tiles depend on the batch and on config.json alone, so one model gives one batch the same bits every time.

    Args:
        model: The model.
        ids: Token ids [rows, T].
        mask: Attention mask [rows, T].
        places: [N] positions whose logits are wanted, as row * T + position.
        take: Called with [n, vocabulary] of the next n places; what it keeps of that memory is not free for the next.
        arguments: More of the model's forward: use_cache, past_key_values.

    Returns:
        False where the model's code does not follow this scheme: all its logits were computed at once, then cut.
    """
    own = _without_adapter(model)
    tiles = places.tensor_split(max(1, -(-len(places) * _token_bytes(own) // TILE_BYTES)))
    with _computed_once(own, ids.shape) as computed:
        computed.tile = tiles[0]
        logits = model(input_ids=ids, attention_mask=mask, **arguments).logits
        if logits.shape[:2] != (1, len(tiles[0])):
            for tile in tiles:
                take(logits.flatten(0, 1)[tile.to(logits.device)])
            return False
        take(logits[0])
        del logits
        for tile in tiles[1:]:
            computed.tile = tile
            its_ids = ids.flatten()[tile.to(ids.device)].unsqueeze(0)
            take(model(input_ids=its_ids, use_cache=False).logits[0])
    return True


def computes_in_tiles(model: Model) -> bool:
    """Does `each_tile` hold a tile at a time? Asked with two tokens; else it holds all logits of a batch."""
    ids = torch.zeros(1, 2, dtype=torch.long, device=model.device)
    only = torch.zeros(1, dtype=torch.long)
    return each_tile(model, ids, torch.ones_like(ids), places=only, take=lambda _: None, use_cache=False)


def last_only(model: Model) -> dict[str, int]:
    """Arguments with which its forward computes the logits of the last position alone, where it has such an argument.

    transformers' generate() gives the same to every model that takes it.
    """
    takes = inspect.signature(_without_adapter(model).forward).parameters
    return {"logits_to_keep": 1} if "logits_to_keep" in takes else {}


def read_in_rows(model: Model) -> None:
    """Hand the output layer its input in one piece of memory.

    generate() takes the last position of each row out of a batch. On a CPU torch multiplies such a slice with a frozen
    weight by a copy of the weight for every row: 8 x 1 GiB for 8 rows and the output layer of a Llama 3 8B.
    """
    layer: Any = _without_adapter(model).get_output_embeddings()
    if layer is not None:
        layer.register_forward_pre_hook(lambda _, inputs: tuple(one.contiguous() for one in inputs))


class _Computed:
    """What a decoder gave at its first call, and gives from then on for the tokens of `tile`."""

    def __init__(self, shape: torch.Size) -> None:
        self.tile = torch.zeros(0, dtype=torch.long)
        self._shape = shape
        self._decoder: Callable[..., Any] | None = None
        self._output: Any = None

    def instead_of(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """The forward of a module that may be the decoder: of several, the one that is called first."""

        def call(*args: Any, **kwargs: Any) -> Any:
            if self._decoder is None:
                self._decoder = call
                self._output = forward(*args, **kwargs)
            elif self._output is None or self._decoder is not call:  # a part of the decoder, at its first call
                return forward(*args, **kwargs)
            return self._cut(self._output)

        return call

    def _cut(self, output: Any) -> Any:
        """Hidden states [rows, T, features] -> [1, n, features]; an output without them stays as it is."""
        hidden = output[0] if isinstance(output, tuple) else getattr(output, "last_hidden_state", None)
        if not isinstance(hidden, Tensor) or hidden.shape[:2] != self._shape:
            return output
        hidden = hidden.flatten(0, 1)[self.tile.to(hidden.device)].unsqueeze(0)
        return (hidden, *output[1:]) if isinstance(output, tuple) else replace(output, last_hidden_state=hidden)


@contextlib.contextmanager
def _computed_once(model: PreTrainedModel, shape: torch.Size) -> Iterator[_Computed]:
    """Inside, the model's decoder computes once, ids of this shape."""
    computed = _Computed(shape)
    with contextlib.ExitStack() as places:
        for decoder in dict.fromkeys(_decoders(model)):
            places.enter_context(_replaced(decoder, computed.instead_of(decoder.forward)))
        yield computed


def _decoders(model: PreTrainedModel) -> Iterator[nn.Module]:
    """What may be the decoder: most models name it in base_model_prefix, Llama 4 has a language model of its own."""
    named: Any = (model.base_model, model.get_decoder())
    parts = [part for part in model.children() if isinstance(part, PreTrainedModel)]
    for part in (*named, *parts):
        if part is model:
            continue
        if isinstance(part, PreTrainedModel) and part.get_output_embeddings() is not None:
            yield from _decoders(part)
        else:
            yield part


@contextlib.contextmanager
def _replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Another forward inside; afterwards it is what it was (accelerate, too, puts one on the object)."""
    put_there = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if put_there is not None:
            module.forward = put_there


def _without_adapter(model: Model) -> PreTrainedModel:
    """The model in PEFT's wrapper; its layers keep the adapter."""
    wrapped: Any = model
    return model if isinstance(model, PreTrainedModel) else wrapped.get_base_model()


def _token_bytes(model: PreTrainedModel) -> int:
    """Bytes of one token's logits."""
    vocabulary = getattr(model.config.get_text_config(decoder=True), "vocab_size", None) or LARGEST_VOCABULARY
    return vocabulary * model.dtype.itemsize
