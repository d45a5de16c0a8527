"""Which models a backend does not quantize, known before anything is spent.

Both archived packages carry a list of model types and end with `TypeError: TYPE isn't supported yet.` for any other.
What they quantize here is the part of that list that was tried in their environments (infra/locks/autoawq.txt,
autogptq.txt): tiny models of these types, whose files load in transformers with the same weights (tests/interop).
"""

from __future__ import annotations

from typing import NamedTuple

from recipes.headers import TRANSPOSED, Headers
from recipes.problem import Problem
from recipes.schemes import Backend, Scheme


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


def model_problem(scheme: Scheme, headers: Headers) -> Problem | None:
    """Why the scheme's backend does not quantize a model of this type; None where it does. `where` is the slug."""
    if scheme.backend == "llm-compressor":
        return _llm_compressor_problem(scheme, headers)
    known = ARCHIVED.get(scheme.backend)
    found = str(headers.text_config.get("model_type"))
    if known is None or found in known.model_types:
        return None
    says = "was not tried with them" if found in known.untried.split() else f"does not know them ({known.source})"
    return Problem(
        what=f"The backend {scheme.backend} does not quantize {found} models.",
        where=scheme.slug,
        why=f"{known.package} {says}; it quantizes {', '.join(known.model_types)}.",
        next=f"Leave `backend: {scheme.backend}` out: GPTQModel makes the same scheme.",
    )


def _llm_compressor_problem(scheme: Scheme, headers: Headers) -> Problem | None:
    """Mixtures of experts and Conv1D layers."""
    model_type = str(headers.text_config.get("model_type"))
    if headers.expert_parameters:
        why = "transformers 5.23 fuses experts, and does not read those that llm-compressor 0.14 writes (Qwen3-MoE)."
    elif model_type in TRANSPOSED:
        why = "It quantizes linear modules; transformers has Conv1D there."
    else:
        return None
    return Problem(
        what=f"llm-compressor does not quantize {model_type} models here.",
        where=scheme.slug,
        why=why,
        next="Take a gptq- or awq- scheme: GPTQModel makes them.",
    )
