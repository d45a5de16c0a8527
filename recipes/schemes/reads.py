"""The table of engines: which files each of them reads, by format, bits, zero points and activation order.

The rows of vLLM come from the source of the version that stands beside them; `python -m tests.bench.engines` reads
that source again and prints every cell that differs. `vllm#38288, #45051` are pull requests or issues of that project.
What no row says is unknown, and is treated like a refusal: an artifact is recommended only where somebody has shown
that it loads.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from recipes.schemes.scheme import PER_CHANNEL, Form, Grid, Scheme, listed

Engine = Literal["transformers", "vllm", "exllamav2", "auto-gptq", "autoawq", "onnxruntime-genai"]
NAMES: dict[Engine, str] = {
    "transformers": "transformers",
    "vllm": "vLLM",
    "exllamav2": "ExLlamaV2",
    "auto-gptq": "AutoGPTQ",
    "autoawq": "AutoAWQ",
    "onnxruntime-genai": "ONNX Runtime GenAI",
}
VLLM = "0.32.0"  # the version whose source the rows of vLLM are read from


class Reads(NamedTuple):
    """One thing that an engine reads.

    Attributes:
        engine: Who reads.
        form: The file format.
        bits: Bits per weight.
        zero_points: `no`, `yes` (only with them) or `both`.
        version: The version that was read or tried.
        source: Where that stands.
        activation_order: Reads GPTQ's -actorder, too; `per channel`: only with one scale per output, where the order
            changes nothing.
        experts: Reads these weights in the experts of a mixture; `groups`: not with one scale per output.
        needs: What has to be installed beside the engine.
        kernel: What multiplies by them on an NVIDIA GPU; empty where nobody looked.
        gpu: The lowest compute capability of that kernel (75 is Turing: T4, RTX 20); 0 where nobody looked.
    """

    engine: Engine
    form: Form
    bits: tuple[int, ...]
    zero_points: Literal["no", "yes", "both"]
    version: str
    source: str
    activation_order: Literal["no", "per channel", "yes"] = "no"
    experts: Literal["no", "groups", "yes"] = "yes"
    needs: str = ""
    kernel: str = ""
    gpu: int = 0

    def takes(self, grid: Grid) -> bool:
        """True where it reads weights on this grid."""
        return grid.bits in self.bits and self.zero_points in ("both", "no" if grid.symmetric else "yes")

    def takes_order(self, grid: Grid) -> bool:
        """True where it reads this grid in activation order, too."""
        return self.activation_order == "yes" or (
            self.activation_order == "per channel" and grid.group_size == PER_CHANNEL
        )

    def takes_experts(self, grid: Grid) -> bool:
        """True where it reads this grid in the experts of a mixture, too."""
        return self.experts == "yes" or (self.experts == "groups" and grid.group_size != PER_CHANNEL)

    def __str__(self) -> str:
        points = {"no": " without zero points", "yes": " with zero points", "both": ""}[self.zero_points]
        return f"{listed(self.bits)} bits{points}"


TRIED = "every run reloads it"
DEQUANTIZE = "compressed-tensors; CompressedTensorsConfig(dequantize=True), and one grid for all layers"
MARLIN = "Marlin; Machete on Hopper"  # the first that can, in the order of _POSSIBLE_KERNELS (kernels/linear)
HUMMING = "Humming"
ONNX = "0.18.0"
ONNX_NEEDS = "its environment; a conversion"
PLUGIN = "vllm-bnb-plugin (0.0.3)"  # vLLM itself dropped the format (vllm#43529)
READS = (
    Reads(
        "transformers",
        "gptq",
        (2, 3, 4, 8),
        "both",
        "5.23.0",
        TRIED,
        activation_order="yes",
        needs="gptqmodel, optimum",
    ),
    Reads("transformers", "awq", (4,), "yes", "5.23.0", TRIED, needs="gptqmodel, optimum"),
    Reads("transformers", "compressed-tensors", (3, 4, 8), "no", "5.23.0", "tried: 0.20.0", needs="compressed-tensors"),
    Reads(
        "transformers",
        "compressed-tensors",
        (3, 4, 8),
        "yes",
        "5.23.0",
        "tried: 0.20.0, which raises without it",
        needs=DEQUANTIZE,
    ),
    Reads("transformers", "bitsandbytes", (4, 8), "no", "5.23.0", TRIED, needs="bitsandbytes"),
    Reads(
        "vllm",
        "gptq",
        (4, 8),
        "no",
        VLLM,
        "auto_gptq.py, gptq_utils.py; vllm#38288, #45051",
        activation_order="per channel",
        kernel=MARLIN,
        gpu=75,
    ),
    Reads("vllm", "awq", (4,), "yes", VLLM, "auto_awq.py; vllm#45295", kernel=MARLIN, gpu=75),
    Reads("vllm", "compressed-tensors", (4, 8), "no", VLLM, "compressed_tensors_wNa16.py", kernel=MARLIN, gpu=75),
    Reads("vllm", "compressed-tensors", (4,), "yes", VLLM, "compressed_tensors_wNa16.py", kernel=MARLIN, gpu=75),
    Reads(
        "vllm",
        "compressed-tensors",
        (2, 3, 5, 6, 7),
        "both",
        VLLM,
        "compressed_tensors_wNa16.py, humming.py; llm-compressor#3102",
        experts="groups",
        kernel=HUMMING,
        gpu=75,
    ),
    Reads(
        "vllm",
        "compressed-tensors",
        (8,),
        "yes",
        VLLM,
        "compressed_tensors_wNa16.py, humming.py; llm-compressor#3102",
        experts="no",
        kernel="Humming; Machete on Hopper",
        gpu=75,
    ),
    Reads(
        "vllm",
        "bitsandbytes",
        (4,),
        "no",
        VLLM,
        "vllm-bnb-plugin's bitsandbytes_loader.py; vllm#5753, #43529",
        needs=PLUGIN,
        kernel="bitsandbytes",
        gpu=70,
    ),
    Reads(
        "vllm",
        "bitsandbytes",
        (8,),
        "no",
        VLLM,
        "vllm-bnb-plugin's bitsandbytes_loader.py; vllm#5753, #43529",
        experts="no",
        needs=PLUGIN,
        kernel="bitsandbytes",
        gpu=70,
    ),
    Reads("exllamav2", "gptq", (4,), "both", "archived", "exllamav2#35, #563", activation_order="yes"),
    Reads(
        "auto-gptq",
        "gptq",
        (2, 3, 4, 8),
        "both",
        "0.7.1, archived",
        "tried: 0.7.1",
        activation_order="yes",
        needs="its environment; lm_head.weight in the file where embeddings are tied",
    ),
    Reads("autoawq", "awq", (4,), "yes", "0.2.9, archived", "tried: 0.2.9", needs="its environment"),
    Reads(
        "onnxruntime-genai",
        "gptq",
        (2, 4, 8),
        "both",
        ONNX,
        "models/loaders/gptq.py and base.py; tried on a Llama",
        activation_order="yes",
        experts="no",
        needs=ONNX_NEEDS,
    ),
    Reads(
        "onnxruntime-genai",
        "awq",
        (4,),
        "yes",
        ONNX,
        "models/loaders/awq.py; tried on a Llama",
        experts="no",
        needs=ONNX_NEEDS,
    ),
)


def rows_for(engine: Engine, form: Form) -> tuple[Reads, ...]:
    """The rows of an engine that are about this format."""
    return tuple(row for row in READS if (row.engine, row.form) == (engine, form))


def rows_of(scheme: Scheme, engine: Engine) -> tuple[Reads, ...]:
    """The rows by which an engine reads a scheme."""
    return tuple(row for row in rows_for(engine, scheme.form) if any(map(row.takes, scheme.grids)))


def needs_of(scheme: Scheme, engine: Engine) -> tuple[str, ...]:
    """What has to be installed beside an engine for this scheme, each thing once."""
    return tuple(dict.fromkeys(row.needs for row in rows_of(scheme, engine) if row.needs))
