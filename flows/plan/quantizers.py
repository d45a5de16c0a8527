"""What the quantizers hold, and where: read from the sources of GPTQModel 7.6 and llm-compressor 0.14.

On a CPU everything is the host's, and was measured (tests/flows/plan). **The GPU figures follow from the sources alone:
no GPU has confirmed them.**

GPTQModel on CUDA, started as tasks/jobs/backends/gptqmodel.py does (files below gptqmodel/):

* The model is nowhere whole: it is built on the meta device, and a layer is read when its turn comes (models/loader.py,
  `offload_to_disk`). Host: embeddings, for the way to the first layer (looper/stage_inputs_capture.py, `cache_inputs`).
* Host: inputs and outputs of a decoder layer for all rows, bf16 (`calibration_data_device`; looper/forward_executor.py,
  `run_single`). GPU: the decoder layer (models/base.py, `pre_quantize`), and the activations of one row.
* GPTQ, GPU: fp32 Hessians of the layers that share an input (quantization/gptq.py, `add_batch`, `adopt_hessian_from`);
  of the layer in work the Hessian, its reordered copy and two factors, the weight, its losses and codes (`quantize`).
* AWQ, host (looper/awq_processor.py): inputs of all linear layers for all rows, bf16 (`_record_input_feature`; ours
  keeps equal ones once), the wanted output of a block (`_search_best_scale`). GPU: inputs of attention for all rows,
  for the rotary embedding (`_iter_module_forward_outputs`); for clipping products of 256 outputs, some 512 tokens and
  all inputs, bf16 (`_compute_best_clip`).
* Host, then disk: the layer while it is packed (looper/stage_layer.py, `_finalize_on_worker`). When all are saved, the
  packed layers lie on the disk twice for a moment, which is not counted.

llm-compressor on CUDA (files below llmcompressor/): the model is whole on the host, where it is loaded, and `oneshot`
brings the modules of one decoder layer to the GPU (pipelines/sequential/pipeline.py). Host: what passes between layers
(`sequential_offload_device`, by default the CPU), and AWQ's arguments of blocks (`offload_device`, which we set). GPU:
Hessians of all linear layers of the decoder layer (modifiers/gptq/base.py, `calibrate_module`); AWQ's outputs of a
block for all rows, twice (modifiers/transform/awq/base.py, `_run_samples`).

Not counted on the GPU: the record of block errors, which loads what was made there and does without if there is no room
(tasks/jobs/measuring/block_errors.py). Where there is room, the measured peak may be that of the quantized model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from recipes.models.headers import Headers
from recipes.models.linear import Linear, weight_count
from recipes.schemes.limits import size_bytes
from recipes.schemes.scheme import Scheme

# Resident GiB of a child on CPU before it has a model.
GPTQMODEL = 0.66
RTN = 0.45
LLM_COMPRESSOR = 0.67
CLIP_OUTPUTS, CLIP_TOKENS = 256, 512  # oc_batch_size and n_sample_token of _compute_best_clip
CHUNK = 1 << 30  # bytes that AWQ converts to fp32 at once: max_chunk_memory
LEADING_OUT = ("o_proj", "out_proj", "down_proj", "dense", "dense_4h_to_h", "fc2", "w2", "c_proj")
RECORD = "model of the record"  # of block errors, which does without if there is no room


class Needs(NamedTuple):
    """Bytes by part.

    Attributes:
        parts: On the device that the step works on.
        on_host: Beside a GPU, on the host; empty on a CPU.
        process: Resident GiB of the child on a CPU before it has a model.
    """

    parts: dict[str, float]
    on_host: dict[str, float]
    process: float


@dataclass(frozen=True, kw_only=True)
class Quantizer:
    """Sizes that the formulas share.

    Attributes:
        headers: Of the model.
        scheme: How it is quantized.
        tokens: Of the calibration set.
        row_tokens: Of its longest row.
        on_cpu: The step works on a CPU.
    """

    headers: Headers
    scheme: Scheme
    tokens: int
    row_tokens: int
    on_cpu: bool

    @property
    def bf16(self) -> float:
        """The model in bf16."""
        return 2 * self.headers.loaded_parameters

    @property
    def quantized(self) -> float:
        """The scheme's layers, everything else in bf16."""
        return size_bytes(self.scheme, self.headers)

    @property
    def layer(self) -> int:
        """Weights of the decoder layer with most."""
        return weight_count(self.headers.decoder_layer)

    @property
    def largest(self) -> int:
        """Weights of the largest linear layer."""
        return max(layer.weights for layer in self.headers.decoder_layer)

    @property
    def widest(self) -> int:
        """Inputs of the widest linear layer."""
        return max(layer.in_features for layer in self.headers.decoder_layer)

    @property
    def hessians(self) -> float:
        """fp32 Hessians of one decoder layer, and of its widest linear layer the inverse and a Cholesky factor."""
        inputs = [layer.in_features for layer in self.headers.decoder_layer]
        return 4 * (sum(size**2 for size in inputs) + 2 * self.widest**2)

    @property
    def row(self) -> float:
        """One row in the decoder layer: inputs and outputs of its linear layers in bf16, the widest input in fp32."""
        features = sum(layer.in_features + layer.out_features for layer in self.headers.decoder_layer)
        return self.row_tokens * (2 * features + 4 * self.widest)

    @property
    def stream(self) -> float:
        """The residual stream at all tokens, bf16."""
        return 2 * self.tokens * self.headers.hidden

    @property
    def clipping(self) -> float:
        """Products of inputs and weights from which AWQ chooses a clipping, bf16."""
        step = max(1, self.tokens // CLIP_TOKENS)
        return 2 * CLIP_OUTPUTS * -(-self.tokens // step) * self.widest

    @property
    def distinct_inputs(self) -> int:
        """Inputs of the decoder layer's linear layers, those once that several share (q, k, v; gate, up; experts)."""
        by_input = {_input(layer): layer.in_features for layer in self.headers.decoder_layer}
        return sum(by_input.values())


def needs(quantizer: Quantizer, *, searched: bool) -> Needs:
    """What one quantize step holds.

    Args:
        quantizer: Its sizes.
        searched: AWQ's scales come from another model, which was quantized before in the same process.
    """
    if quantizer.scheme.backend == "quench-rtn":
        return _rounding(quantizer)
    if quantizer.scheme.backend == "bitsandbytes":
        return _while_loading(quantizer)
    if quantizer.on_cpu:
        return _on_cpu(quantizer, searched=searched)
    return _beside_a_gpu(quantizer)


def _rounding(quantizer: Quantizer) -> Needs:
    """Shard by shard, on the host; of one layer the weight, its codes and its bits in the forms that packing takes."""
    by_file: dict[object, float] = {}
    for tensor in quantizer.headers.tensors.values():
        by_file[tensor.file] = by_file.get(tensor.file, 0.0) + tensor.n_bytes
    shard = max(by_file.values(), default=0.0)
    share = shard / max(1, quantizer.headers.weight_bytes)
    parts = {
        "file of weights": shard,
        "weights quantized": share * quantizer.quantized,
        "layer in work": 20.0 * quantizer.largest,
    }
    return Needs(parts, {}, RTN)


def _while_loading(quantizer: Quantizer) -> Needs:
    """Bitsandbytes quantizes what is loaded, tensor by tensor; the file is written from the host."""
    made = {"weights quantized": quantizer.quantized}
    if quantizer.on_cpu:
        return Needs({"weights bf16": quantizer.bf16, **made}, {}, RTN)
    return Needs({**made, "layer in work": 6.0 * quantizer.largest}, made, RTN)


def _on_cpu(quantizer: Quantizer, *, searched: bool) -> Needs:
    parts = {
        "weights bf16": quantizer.bf16,
        "weights quantized": quantizer.quantized,
        "file of weights": quantizer.bf16,
        **({"model of the search": quantizer.bf16} if searched else {}),
    }
    hidden, tokens = quantizer.headers.hidden, quantizer.tokens
    if quantizer.scheme.backend == "llm-compressor":
        if quantizer.scheme.method == "gptq":
            # Bytes per token and hidden feature: 9 measured, 29 for AWQ. The widest Hessian is ordered in 3 copies.
            parts |= {
                "hessians": quantizer.hessians,
                "layer": 8.0 * quantizer.layer,
                "activations": 10 * tokens * hidden,
            }
            parts |= {"ordered hessian": 3 * 4 * quantizer.widest**2}
        else:
            parts |= {"activations": 30 * tokens * hidden}
        return Needs(parts, {}, LLM_COMPRESSOR)
    if quantizer.scheme.method == "gptq":
        # Inputs and outputs of the decoder layer, bf16, and its weights in fp32.
        parts |= {"hessians": quantizer.hessians, "activations": 2 * quantizer.stream, "layer": 8.0 * quantizer.layer}
    else:
        parts |= _awq_inputs(quantizer)
        parts["layer in work"] = max(parts["layer in work"], quantizer.clipping)
    return Needs(parts, {}, GPTQMODEL)


def _awq_inputs(quantizer: Quantizer) -> dict[str, float]:
    """Of the calibration set on the host: kept inputs; one of them joined or in fp32; the stream in, out and wanted."""
    joined = 2.0 * quantizer.tokens * quantizer.widest
    return {
        "inputs of a layer": 2.0 * quantizer.tokens * quantizer.distinct_inputs,
        "layer in work": joined + min(CHUNK, 2 * joined),
        "activations": 3 * quantizer.stream,
    }


def _beside_a_gpu(quantizer: Quantizer) -> Needs:
    gpu, host = _llm_compressor(quantizer) if quantizer.scheme.backend == "llm-compressor" else _gptqmodel(quantizer)
    host |= {RECORD: max(0.0, quantizer.bf16 - sum(host.values()))}
    return Needs(gpu, host, GPTQMODEL)


def _gptqmodel(quantizer: Quantizer) -> tuple[dict[str, float], dict[str, float]]:
    """GPU and host. The archived backends go the same way, with the whole model on the host."""
    gpu: dict[str, float] = {"layer": 2.0 * quantizer.layer, "activations of a row": quantizer.row}
    host: dict[str, float] = {"layer in packing": 8.0 * quantizer.layer}
    if quantizer.scheme.backend == "gptqmodel":
        host |= {
            "embeddings and output layer": 2.0 * (quantizer.headers.parameters - quantizer.headers.linear_parameters)
        }
    else:
        host |= {"weights bf16": quantizer.bf16, "weights quantized": quantizer.quantized}
    if quantizer.scheme.method == "gptq":
        gpu |= {"hessians": quantizer.hessians, "weight in work": 16.0 * quantizer.largest}
        return gpu, host | {"activations": 2 * quantizer.stream}
    rest = {"weight in work": 8.0 * quantizer.largest, "tokens in work": max(quantizer.clipping, quantizer.stream)}
    return gpu | rest, host | _awq_inputs(quantizer)


def _llm_compressor(quantizer: Quantizer) -> tuple[dict[str, float], dict[str, float]]:
    """GPU and host."""
    gpu: dict[str, float] = {"layer": 2.0 * quantizer.layer, "activations of a row": quantizer.row}
    host: dict[str, float] = {"weights bf16": quantizer.bf16, "weights quantized": quantizer.quantized}
    if quantizer.scheme.method == "gptq":
        gpu |= {"hessians": quantizer.hessians, "ordered hessian": 3.0 * 4 * quantizer.widest**2}
        gpu |= {"weight in work": 12.0 * quantizer.largest}
        return gpu, host | {"activations": 5 * quantizer.stream}
    gpu |= {"weight in work": 8.0 * quantizer.largest, "outputs of a block": 2 * quantizer.stream}
    return gpu, host | {"activations": 2 * quantizer.stream + 2 * quantizer.tokens * quantizer.distinct_inputs}


def _input(layer: Linear) -> tuple[str, int]:
    """What names the input of a layer: its block and its width; what leads out of a block has an input of its own."""
    block, _, name = layer.name.rpartition(".")
    if name in LEADING_OUT:
        return layer.name, layer.in_features
    return block.partition(".experts.")[0], layer.in_features
