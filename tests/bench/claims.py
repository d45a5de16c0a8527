"""What the field repeats, and what each claim is held against here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from recipes.models.linear import Linear
from recipes.schemes.slugs import parse_scheme
from tests.bench.probes import NO_BOUND, Adds, Better, Equal, Probe, Rise, Variance

MERGED = "merged-dequantized"
SIZE = "6 M parameters, one task, losses near zero: sizes of effects do not carry over, signs may"
GRADIENTS = "gradients"


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One row of the page.

    Attributes:
        said: As it is repeated.
        probes: What a run is asked.
        computed: Figures from formulas, where the claim is one of arithmetic.
        untestable: Why it cannot be tested here.
        limits: What the tiny model cannot say about it.
        extra: Name of a measurement of another kind (tests/bench/gradient_flow.py).
    """

    said: str
    probes: tuple[Probe, ...] = ()
    computed: Callable[[], str] | None = None
    untestable: str | None = None
    limits: str = SIZE
    extra: str | None = None

    @property
    def how(self) -> str:
        """Measured here, arithmetic, or not testable here; a claim may be two of them."""
        words = ["measured here"] if self.probes or self.extra else []
        words += ["arithmetic"] if self.computed else []
        words += ["not testable here"] if self.untestable else []
        return " + ".join(words)


# ---- arithmetic


def overhead() -> str:
    """Bits a weight of the schemes, counted from the files' own layout."""
    layer = Linear("x", 4096, 4096)
    weights = layer.in_features * layer.out_features

    def extra(slug: str) -> str:
        return f"{100 * (8 * parse_scheme(slug).predicted_bytes([layer]) / weights / 4 - 1):.1f} %"

    plain = {group: f"{100 * 16 / group / 4:.1f} %" for group in (128, 32)}
    return (
        f"Over 4 bits per weight, a 16-bit scale per group costs {plain[128]} (g128) and {plain[32]} (g32). The files "
        f"of a 4096 x 4096 layer: gptq g128 {extra('gptq-w4-g128')}, g32 {extra('gptq-w4-g32')} (with zero points); "
        f"awq {extra('awq-w4-g128')}, {extra('awq-w4-g32')}; compressed-tensors, symmetric, "
        f"{extra('ct-gptq-w4-g128')}, {extra('ct-gptq-w4-g32')}; nf4 {extra('nf4')}. 3 % is right for g128 without "
        f"zero points; 10 % for g32 is too low: {plain[32]} and more"
    )


def kv_cache() -> str:
    """2 x layers x KV heads x head size x bytes a token, from the published configs of three 7-8B models."""
    shapes = {"Llama 2 7B": (32, 32, 128), "Llama 3.1 8B": (32, 8, 128), "Qwen 2.5 7B": (28, 4, 128)}
    tokens, sequences = 4096, 32
    said: list[str] = []
    short: list[float] = []
    for name, (layers, heads, size) in shapes.items():
        token = 2 * layers * heads * size * 2
        one, every = token * tokens / 1e9, token * tokens * sequences / 1e9
        short.append(every / 4)
        said.append(f"{name} {token:,} bytes a token, {one:.2f} GB a sequence, {every:.1f} GB for 32")
    return (
        f"In bf16: {'; '.join(said)}; half of that in fp8. 4 GB is short by a factor of {min(short):.1f} to "
        f"{max(short):.0f}"
    )


# ---- the list

CLAIMS: tuple[Claim, ...] = (
    Claim(
        said="Merged-then-quantized is 5-10 % better than quantized base + adapter",
        probes=(
            Rise("gptq-w4-g128.on-base", "gptq-w4-g128", 5, 10),
            Rise("awq-w4-g128.on-base", "awq-w4-g128", 5, 10),
            Better("gptq-w4-g128", "gptq-w4-g128.on-base"),
            Better("awq-w4-g128", "awq-w4-g128.on-base"),
            Better("gptq-w4-g128", "gptq-w4-g128.on-base", "task"),
            Better("awq-w4-g128", "awq-w4-g128.on-base", "task"),
        ),
    ),
    Claim(
        said="Quantization of the base cannot be reused after fine-tuning",
        probes=(
            Better("awq-w4-g128", "awq-w4-g128.scales-from-base"),
            Better("awq-w4-g128", "awq-w4-g128.scales-from-base", "task"),
            Better(MERGED, "gptq-w4-g128.on-base", "task"),
        ),
        limits=f"{SIZE}. The adapter moves a tiny model far; on a large one activations move less",
    ),
    Claim(
        said="128-512 in-domain samples beat generic calibration for AWQ",
        probes=(
            Better("awq-w4-g128", "awq-w4-g128.calib-generic"),
            Better("awq-w4-g128", "awq-w4-g128.calib-generic", "task"),
            Better("awq-w4-g128", "awq-w4-g128.calib-random"),
        ),
        limits=f"{SIZE}. 256 rows, one domain; docstrings as generic text (docs/results/calibration.md has more draws)",
    ),
    Claim(
        said="AWQ = GPTQ g32 > GPTQ g128 > NF4",
        probes=(
            Equal("awq-w4-g128", "gptq-w4-g32"),
            Equal("awq-w4-g32", "gptq-w4-g32"),
            Better("gptq-w4-g32", "gptq-w4-g128"),
            Better("gptq-w4-g128", "nf4", merge="original"),
            Better("gptq-w4-g128", "nf4", "task", merge="original"),
        ),
    ),
    Claim(
        said="3-bit GPTQ g128 is competitive with 4-bit AWQ",
        probes=(Equal("gptq-w3-g128", "awq-w4-g128"), Equal("gptq-w3-g128", "awq-w4-g128", "task")),
        limits=f"{SIZE}. Large models lose less at 3 bits",
    ),
    Claim(
        said="g128 costs 3 % and g32 10 % of memory",
        computed=overhead,
        limits="nothing: the count holds for any layer; embeddings in bf16 dilute it, in small models most",
    ),
    Claim(
        said="g32 is noticeably better on small models",
        probes=(
            Better("gptq-w4-g32", "gptq-w4-g128"),
            Better("awq-w4-g32", "awq-w4-g128"),
            Better("gptq-w4-g32", "gptq-w4-g128", "task"),
            Better("awq-w4-g32", "awq-w4-g128", "task"),
        ),
        limits="whether it is less on large ones: there is one size",
    ),
    Claim(
        said="Attention has higher weight variance than the FFN, so mixed groups pay",
        probes=(
            Variance("gptq-w4-g128"),
            Better("ct-gptq-w4-attn32-ffn128", "ct-gptq-w4-g128"),
            Better("ct-gptq-w4-attn32-ffn128", "ct-gptq-w4-g128", "task"),
        ),
    ),
    Claim(
        said="8-bit stays under 0.5 %",
        probes=(Rise("gptq-w8-g128", MERGED, NO_BOUND, 0.5), Equal("gptq-w8-g128", MERGED, "task")),
    ),
    Claim(
        said="NF4 beats int4 at equal bits",
        probes=(
            Better("nf4", "rtn-w4-g128", merge="original"),
            Better("nf4", "rtn-w4-g128", "task", merge="original"),
            Better("nf4", "rtn-w4-g128"),
        ),
        limits=f"{SIZE}. 4.13 bits per weight against 4.16, both without calibration. Merged into the dequantized "
        "base, weights are NF4's own values plus the adapter's small change, of which NF4 rounds a part away again",
    ),
    Claim(
        said="NF4 is the only format with gradient flow",
        extra=GRADIENTS,
        limits="CPU kernels; fused inference kernels of a GPU may have no backward. nf4 is of merged weights here, "
        "which moves them most (see the claim above)",
    ),
    Claim(
        said="bitsandbytes is 20-40 % slower than AWQ",
        untestable="a statement about CUDA kernels; CPU kernels of either format are no serving kernels",
        limits="everything",
    ),
    Claim(
        said="KV quantization adds to weight quantization and costs 0.5-1 %",
        probes=(
            *(Rise(f"gptq-w4-g128.kv-{kv}", "gptq-w4-g128", 0.5, 1) for kv in ("fp8", "fp8-calibrated", "int8")),
            *(Rise(f"{MERGED}.kv-{kv}", MERGED, 0.5, 1) for kv in ("fp8", "fp8-calibrated", "int8")),
            Adds("gptq-w4-g128", MERGED, "kv-fp8"),
            Adds("gptq-w4-g128", MERGED, "kv-int8"),
        ),
        limits=f"{SIZE}. Contexts of some 60 tokens; storage is simulated",
    ),
    Claim(
        said="A 7B at 4k x 32 needs 4 GB of KV cache",
        computed=kv_cache,
        limits="nothing: it follows from the config",
    ),
    Claim(
        said="A bigger model at 3 bits beats a smaller one in bf16",
        untestable="there is one base; two sizes trained alike would be needed",
        limits="everything",
    ),
    Claim(
        said="QAT beats post-training quantization on small models",
        untestable="QAT is not built yet",
        limits="everything",
    ),
)
