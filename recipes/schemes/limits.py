"""What a backend cannot do to an architecture, found by trying: one row each, with the reason and a way round.

Versions: GPTQModel 7.6, bitsandbytes 0.50, transformers 5.23. What is not listed here
tests/jobs/backends/test_contract.py tries on tiny Llama-, Qwen3-, Mistral- and Gemma-type models.

The archived backends carry a list of model types and end with `TypeError: TYPE isn't supported yet.` for any other.
What they quantize here is the part of that list that was tried in their environments (infra/locks/autoawq.txt,
autogptq.txt): tiny models of these types, whose files load in transformers with the same weights (tests/interop).
"""

from __future__ import annotations

from typing import NamedTuple

from recipes.models.decoder import is_expert
from recipes.models.headers import Headers
from recipes.models.linear import Linear, weight_count
from recipes.problem import Problem
from recipes.schemes.scheme import Backend, Method, Scheme

UNQUANTIZED = 0.05  # share of the linear weights; more in bf16 is hardly the model that a scheme's name says
GIB = 1 << 30


class Limit(NamedTuple):
    """Something that ends in an error, or in a file that does not load.

    Attributes:
        backends: Whose limit it is.
        methods: Of what it makes.
        model_types: `model_type` in config.json.
        why: What happens.
        next: What works.
    """

    backends: tuple[Backend, ...]
    methods: tuple[Method, ...]
    model_types: tuple[str, ...]
    why: str
    next: str


LIMITS = (
    Limit(
        ("gptqmodel", "quench-rtn", "bitsandbytes", "llm-compressor"),
        ("rtn", "gptq", "awq", "nf4", "int8"),
        ("gpt2", "openai-gpt"),
        "Its layers are Conv1D with weights [in, out]; what is written of them does not load.",
        "Choose a base with plain linear layers; evaluate the bf16 and nf4-adapter arms alone.",
    ),
    Limit(
        ("gptqmodel",),
        ("awq",),
        ("gemma3", "gemma3_text", "gemma3n", "gemma3n_text", "gemma4", "gemma4_text"),
        "Its rotary embedding is another one by layer type, and GPTQModel's AWQ asks for it without one: the process "
        "ends (Gemma3RotaryEmbedding.forward() missing 1 required positional argument: 'layer_type').",
        "Write a gptq- scheme, or ct-awq.",
    ),
    Limit(
        ("gptqmodel",),
        ("gptq", "awq"),
        ("phi3", "phi4mm", "glm4"),
        "GPTQModel splits its fused gate_up_proj, and names of the file are no longer those of the model.",
        "Write an rtn- scheme, nf4 or int8.",
    ),
    Limit(
        ("gptqmodel",),
        ("awq",),
        ("starcoder2",),
        "AWQ scales the activation of its FFN, which has no gate; transformers expects those scales (act.scales), and "
        "GPTQModel does not write them.",
        "Write a gptq- or an rtn- scheme.",
    ),
    Limit(
        ("gptqmodel",),
        ("gptq", "awq"),
        ("gpt_oss", "llama4", "llama4_text", "granitemoe"),
        "GPTQModel takes its stacked experts apart, and the layers that it makes are not those of the model.",
        "Write an rtn- scheme, nf4 or int8: they leave the experts in bf16 (quantize.accept_unquantized).",
    ),
    Limit(
        ("gptqmodel",),
        ("gptq", "awq"),
        ("nemotron_h",),
        "GPTQModel takes the inputs of the first decoder layer for those of attention; its first layer is a state "
        "space ('NoneType' object is not subscriptable, in cache_inputs).",
        "Write an rtn- scheme.",
    ),
    Limit(
        ("llm-compressor",),
        ("gptq", "awq"),
        ("gemma4_text",),
        "Its layers share keys and values by layer type, which llm-compressor's pipeline, layer by layer, does not "
        "pass on (KeyError: 'sliding_attention').",
        "Write a gptq- or an rtn- scheme.",
    ),
)
# Mixtures with experts stored one by one of which llm-compressor's symmetric GPTQ loads in transformers 5.23.
# Zero points do not load; GPTQModel's packed experts stay at random numbers there.
PACKED_EXPERTS = ("qwen3_moe", "olmoe")


class Archived(NamedTuple):
    """A backend that nobody maintains any more.

    Attributes:
        package: Name, version and year.
        model_types: `model_type` of config.json that it quantizes here.
        untried: More types of its list, as words.
        source: Where its list stands.
    """

    package: str
    model_types: tuple[str, ...]
    untried: str
    source: str


ARCHIVED: dict[Backend, Archived] = {
    "autoawq": Archived(
        package="AutoAWQ 0.2.9 (2025)",
        model_types=("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2"),
        untried="mixtral qwen3_moe phi3 falcon opt bloom gptj gpt_neox gpt_bigcode mpt starcoder2 stablelm cohere "
        "exaone deepseek_v2 deepseek_v3 minicpm minicpm3 internlm2 aquila Yi qwen baichuan",
        source="awq/models/auto.py, AWQ_CAUSAL_LM_MODEL_MAP",
    ),
    "auto-gptq": Archived(
        package="AutoGPTQ 0.7.1 (2024)",
        model_types=("llama", "mistral", "qwen2", "gemma"),
        untried="mixtral falcon opt bloom gptj gpt2 gpt_neox gpt_bigcode codegen qwen baichuan internlm xverse moss "
        "deci stablelm_epoch longllama Yi",
        source="auto_gptq/modeling/_const.py, SUPPORTED_MODELS",
    ),
}


def quantized_linears(scheme: Scheme, headers: Headers) -> tuple[Linear, ...]:
    """The linear layers that the scheme's backend quantizes: bitsandbytes knows no experts of a mixture.

    transformers 5 holds the experts of a layer as one 3-D parameter, and bitsandbytes replaces linear modules.
    """
    return headers.dense_linears if scheme.backend == "bitsandbytes" else headers.linears


def left_in_bf16(scheme: Scheme, headers: Headers) -> int:
    """Parameters of linear weights that this scheme leaves in bf16: experts of a mixture.

    Layers that a rule of the recipe keeps are not counted: the recipe says so.
    """
    stacked = sum(tensor.numel for tensor in headers.stacked_experts)
    return headers.expert_parameters if scheme.backend == "bitsandbytes" else stacked


def size_bytes(scheme: Scheme, headers: Headers) -> float:
    """Bytes of the weights that the scheme makes of a model: its layers, and everything else in bf16."""
    linears = quantized_linears(scheme, headers)
    rest = headers.parameters - weight_count(linears)
    return scheme.predicted_bytes(linears) + 2 * rest


def unquantized_problem(scheme: Scheme, headers: Headers) -> Problem | None:
    """More than 5 % of the linear weights would stay bf16; `where` is the slug."""
    kept = left_in_bf16(scheme, headers)
    share = kept / max(1, headers.dense_linear_parameters + headers.expert_parameters)
    if share <= UNQUANTIZED:
        return None
    size, saved = size_bytes(scheme, headers) / GIB, 2 * headers.parameters / GIB
    return Problem(
        what=f"{scheme.slug} would leave {share:.0%} of the base's linear weights in bf16: {2 * kept / GIB:.1f} GiB "
        "of experts.",
        where=scheme.slug,
        why=f"transformers holds a mixture's experts as 3-D weights, which {scheme.backend} does not quantize: the "
        f"model would be {size:.1f} GiB in place of {saved:.1f}.",
        next="Set quantize.accept_unquantized: true if that is small enough, or take a dense base.",
    )


def limit_problems(scheme: Scheme, headers: Headers) -> list[Problem]:
    """What the scheme's backend cannot do to this architecture; `where` is the slug."""
    if _packs_experts(scheme, headers) and not _experts_load(scheme, headers):
        held = 2 * headers.expert_parameters / GIB
        return [
            Problem(
                what=f"{scheme.slug} would pack the experts of this model one by one.",
                where=scheme.slug,
                why="transformers 5 holds the experts of a layer as one weight and leaves packed ones out: they would "
                "be random numbers in every evaluation, with a warning in a log.",
                next=f"{_packed_way(headers)}Write nf4 or int8: they leave the experts in bf16 ({held:.1f} GiB; "
                "quantize.accept_unquantized: true).",
            )
        ]
    kinds = {headers.config.get("model_type"), headers.text_config.get("model_type")}
    problems = [
        Problem(
            what=f"{scheme.backend} cannot make {scheme.slug} of a {'/'.join(sorted(map(str, kinds)))} model.",
            where=scheme.slug,
            why=limit.why,
            next=limit.next,
        )
        for limit in LIMITS
        if scheme.backend in limit.backends and scheme.method in limit.methods and kinds & set(limit.model_types)
    ]
    archived = _archived_problem(scheme, str(headers.text_config.get("model_type")))
    return [*problems, archived] if archived else problems


def _packs_experts(scheme: Scheme, headers: Headers) -> bool:
    apart = scheme.form in ("gptq", "awq") and any(is_expert(layer.name) for layer in headers.linears)
    return apart or (scheme.backend == "llm-compressor" and headers.expert_parameters > 0)


def _experts_load(scheme: Scheme, headers: Headers) -> bool:
    """Transformers reads the packed experts that this backend writes."""
    plain = scheme.backend == "llm-compressor" and scheme.method == "gptq" and scheme.grid.symmetric
    return plain and headers.text_config.get("model_type") in PACKED_EXPERTS and not headers.stacked_experts


def _packed_way(headers: Headers) -> str:
    loads = headers.text_config.get("model_type") in PACKED_EXPERTS and not headers.stacked_experts
    return "Write ct-gptq-w4-g128, whose experts load. " if loads else ""


def _archived_problem(scheme: Scheme, model_type: str) -> Problem | None:
    known = ARCHIVED.get(scheme.backend)
    if known is None or model_type in known.model_types:
        return None
    untried = model_type in known.untried.split()
    says = "was not tried with them" if untried else f"does not know them ({known.source})"
    return Problem(
        what=f"The backend {scheme.backend} does not quantize {model_type} models.",
        where=scheme.slug,
        why=f"{known.package} {says}; it quantizes {', '.join(known.model_types)}.",
        next=f"Leave `backend: {scheme.backend}` out: GPTQModel makes the same scheme.",
    )
