"""llm-compressor's modifiers, with what they keep to themselves; imported in the environment llmcompressor only."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationScheme,
    QuantizationStrategy,
    QuantizationType,
)
from compressed_tensors.utils import patch_attr
from llmcompressor.modifiers.gptq import GPTQModifier  # pyright: ignore[reportMissingImports]
from llmcompressor.modifiers.gptq import base as gptq  # pyright: ignore[reportMissingImports]
from llmcompressor.modifiers.quantization import QuantizationModifier  # pyright: ignore[reportMissingImports]
from llmcompressor.modifiers.transform.awq import AWQModifier  # pyright: ignore[reportMissingImports]
from llmcompressor.pipelines.cache import IntermediatesCache  # pyright: ignore[reportMissingImports]
from llmcompressor.utils.metric_logging import CompressionLogger  # pyright: ignore[reportMissingImports]
from loguru import logger  # pyright: ignore[reportMissingImports]
from pydantic import PrivateAttr

from recipes.schemes.scheme import Grid, Scheme
from tasks.jobs.backends.llm_compressor_watch import Watch

FP8_CACHE = QuantizationArgs(
    num_bits=8, type=QuantizationType.FLOAT, strategy=QuantizationStrategy.TENSOR, symmetric=True, dynamic=False
)


def modifiers(
    scheme: Scheme,
    targets: Mapping[Grid, Sequence[str]],
    ignore: Sequence[str],
    *,
    damp: float | None,
    watch: Watch,
    offload: torch.device | None,
) -> list[Any]:
    """The scheme in llm-compressor's words.

    Args:
        scheme: How it is quantized.
        targets: Layers by grid.
        ignore: Linear modules that stay as they are.
        damp: GPTQ's damping.
        watch: Gets figures and warnings.
        offload: Where AWQ keeps the arguments of the blocks; None leaves them where they are, which on CUDA is the GPU.
    """
    common: dict[str, Any] = {
        "config_groups": {
            f"group_{index}": QuantizationScheme(targets=list(names), weights=_weights(grid))
            for index, (grid, names) in enumerate(targets.items())
        },
        "ignore": list(ignore),
        "kv_cache_scheme": FP8_CACHE if scheme.kv_scales else None,
    }
    if scheme.method == "awq":
        awq_modifier = WatchedAWQ() if offload is None else WatchedAWQ(offload_device=offload)
        awq_modifier._watch = watch
        return [awq_modifier, QuantizationModifier(**common)]
    gptq_modifier = WatchedGPTQ(**common, dampening_frac=damp, actorder="static")
    gptq_modifier._watch = watch
    return [gptq_modifier]


def _weights(grid: Grid) -> QuantizationArgs:
    per_channel = grid.group_size == -1
    return QuantizationArgs(
        num_bits=grid.bits,
        type=QuantizationType.INT,
        symmetric=grid.symmetric,
        strategy=QuantizationStrategy.CHANNEL if per_channel else QuantizationStrategy.GROUP,
        group_size=None if per_channel else grid.group_size,
    )


@contextlib.contextmanager
def watched(watch: Watch) -> Iterator[None]:
    """Warnings become notes. Without an accelerator AWQ's cache is not pinned: it would raise there."""
    sink = logger.add(watch.note_warning, level="WARNING")
    try:
        with contextlib.ExitStack() as stack:
            if not torch.accelerator.is_available():
                stack.enter_context(patch_attr(IntermediatesCache, "pin_memory", lambda *_: None))
            yield
    finally:
        logger.remove(sink)


class WatchedGPTQ(GPTQModifier):
    """GPTQ that counts tokens and dead inputs and keeps losses."""

    _watch: Watch = PrivateAttr()

    def calibrate_module(self, module: torch.nn.Module, args: tuple[torch.Tensor, ...], _output: torch.Tensor) -> None:
        """Add a batch to the Hessian."""
        self._watch.tokens[self._module_names[module]] += args[0].shape[:-1].numel()
        super().calibrate_module(module, args, _output)

    def compress_module_list(self, module_list: list[torch.nn.Module]) -> None:
        """Quantize the layers of a decoder layer."""
        for module in module_list:
            if dead := int((self._hessians[module].diagonal() == 0).sum()):
                self._watch.dead[self._module_names[module]] = dead
        with patch_attr(gptq, "CompressionLogger", partial(_LossKeeper, self._watch.losses, self._module_names)):
            super().compress_module_list(module_list)

    def on_sequential_epoch_end(self, *args: Any, **kwargs: Any) -> None:
        """All batches have passed a decoder layer."""
        super().on_sequential_epoch_end(*args, **kwargs)
        self._watch.layer_done()

    def on_finalize(self, *args: Any, **kwargs: Any) -> bool:
        """Before its lists are emptied."""
        self._watch.rounded = list(self._rtn_fallback_module_names)
        return super().on_finalize(*args, **kwargs)


class _LossKeeper(CompressionLogger):
    """Its log rounds a loss to two decimals; this keeps it."""

    def __init__(self, losses: dict[str, float], names: Mapping[torch.nn.Module, str], module: torch.nn.Module) -> None:
        super().__init__(module)
        self._losses, self._layer = losses, names[module]

    def set_results(self, name: str | None = None, loss: float | None = None) -> None:
        """Called once per layer."""
        super().set_results(name, loss)
        if loss is not None:
            self._losses[self._layer] = loss


class WatchedAWQ(AWQModifier):
    """AWQ that keeps the error of each search for all layers that share its scales."""

    _watch: Watch = PrivateAttr()

    def _compute_best_scale(self, mapping: Any, *args: Any) -> torch.Tensor:
        tokens = int(self._smooth_activation_stats[mapping.smooth_name][1])
        scales = super()._compute_best_scale(mapping, *args)
        for name in mapping.balance_names:
            self._watch.losses[name] = self._error_metrics[-1]["best_error"]
            self._watch.tokens[name] = tokens
        return scales

    def on_sequential_epoch_end(self, *args: Any, **kwargs: Any) -> None:
        """All batches have passed a decoder layer."""
        super().on_sequential_epoch_end(*args, **kwargs)
        self._watch.layer_done()
