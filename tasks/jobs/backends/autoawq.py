"""AWQ by AutoAWQ 0.2.9, the archived original, in the environment `autoawq`; on CPU and CUDA (the GPU that it sees).

What it does without saying so: it drops rows longer than `max_calib_seq_len` and those behind `max_calib_samples`,
joins the rest and cuts them into blocks, and leaves out the last, shorter one; it searches the clipping on about 512 of
the tokens; it does not scale o_proj under grouped-query attention.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import nn

from tasks.jobs.backends import LayerRecord, Quantized, Request, equal_lengths
from tasks.jobs.backends.archived import note_habits, refuse_overflow, write_checkpoint
from tasks.runtime.process.events import Events

CLIP_TOKENS = 512  # n_sample_token of its _compute_best_clip


def quantize(request: Request) -> Quantized:
    """Quantize and save in the gemm layout. On a CPU the scales are searched in fp32.

    Raises:
        StageError: A weight does not fit fp16.
    """
    model, params, events = request.model, request.params, request.events
    awq: Any = importlib.import_module("awq")
    blocks = equal_lengths(request.rows, events=events, why="AutoAWQ runs all sequences as one tensor")
    searched = (
        torch.float32 if request.device == "cpu" else torch.float16
    )  # fp16 on a CPU: 65 s per layer of the quickstart
    loaded = awq.AutoAWQForCausalLM.from_pretrained(
        str(model), torch_dtype=searched, trust_remote_code=False, local_files_only=True
    )
    refuse_overflow(loaded.model)
    figures = _LayerFigures(loaded.model)
    loaded.quantize(
        quant_config={"w_bit": params["bits"], "q_group_size": params["group_size"], "zero_point": True},
        calib_data=blocks,
        max_calib_samples=len(blocks),
        max_calib_seq_len=len(blocks[0]),  # one row per block: nothing is dropped or cut
        quantizer_cls=_recorder(figures, events=events),
    )
    write_checkpoint(request, loaded.model.state_dict(), quantization=loaded.quant_config.to_transformers_dict())
    config, tokens = loaded.model.config, sum(map(len, blocks))
    if len(set(getattr(config, "layer_types", ()))) > 1 and (config.sliding_window or 0) < len(blocks[0]):
        events.note("attention", "AutoAWQ gives every layer the first one's mask; layers here differ in their window")
    if tokens // CLIP_TOKENS > 1:
        events.note("clipping", f"searched on every {tokens // CLIP_TOKENS}th of {tokens} calibration tokens")
    layers = figures.records()
    note_habits(model, layers, tokens=tokens, events=events)
    return Quantized(backend=f"autoawq:{awq.__version__}", packer="WQLinear_GEMM", layers=layers)


class _LayerFigures:
    """Losses and tokens of each linear layer, by its full name."""

    def __init__(self, model: nn.Module) -> None:
        self.names = {module: name for name, module in model.named_modules()}
        self.loss: dict[str, float] = {}
        self.tokens: dict[str, int] = {}

    def records(self) -> list[LayerRecord]:
        """In the order of the model."""
        return [
            LayerRecord(name=name, loss=self.loss.get(name), tokens=self.tokens[name])
            for name in self.names.values()
            if name in self.tokens
        ]


def _recorder(figures: _LayerFigures, *, events: Events) -> Any:
    """AutoAWQ's quantizer class with losses, tokens and progress recorded; AutoAWQ lets a caller replace it.

    The loss is that of the scale search: mean squared error of the output of the block that the layers feed (attention,
    MLP, or the layer itself), before clipping; layers that are scaled together share it.
    """
    base: Any = importlib.import_module("awq.quantize.quantizer").AwqQuantizer

    class AwqRecorder(base):
        def _get_input_feat(self, layer: nn.Module, named_linears: dict[str, nn.Module]) -> dict[str, torch.Tensor]:
            features = super()._get_input_feat(layer, named_linears)
            for name, module in named_linears.items():
                figures.tokens[figures.names[module]] = features[name].numel() // features[name].shape[-1]
            return features

        def _search_best_scale(self, module: nn.Module, prev_op: nn.Module, layers: list[nn.Module], **rest: Any):
            self.losses: list[float] = []
            best = super()._search_best_scale(module, prev_op, layers, **rest)
            figures.loss |= {figures.names[layer]: min(self.losses) for layer in layers}
            return best

        def _compute_loss(self, *outputs: Any) -> float:
            self.losses.append(super()._compute_loss(*outputs))
            return self.losses[-1]

        def _apply_quant(self, module: nn.Module, named_linears: dict[str, nn.Module]) -> None:
            super()._apply_quant(module, named_linears)
            events.progress(1 + list(self.modules).index(module), len(self.modules), unit="layer")

    return AwqRecorder
