"""What a backend cannot do to an architecture, found by trying: a row each, with the reason and a way round.

Versions: GPTQModel 7.6, bitsandbytes 0.50, transformers 5.23. What is not listed here tests/jobs/test_contract.py tries
on tiny Llama-, Qwen3-, Mistral- and Gemma-type models.
"""

from __future__ import annotations

from typing import NamedTuple

from recipes.headers import Headers, is_expert
from recipes.problem import Problem
from recipes.schemes import Backend, Method, Scheme


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
        ("gptqmodel", "quench-rtn", "bitsandbytes"),
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
        ("phi3", "phi4mm"),
        "GPTQModel splits its fused gate_up_proj, and names of the file are no longer those of the model.",
        "Write an rtn- scheme, nf4 or int8.",
    ),
)


def limit_problems(scheme: Scheme, headers: Headers) -> list[Problem]:
    """What the scheme's backend cannot do to this architecture; `where` is left to the caller as the slug."""
    if scheme.form in ("gptq", "awq") and any(is_expert(layer.name) for layer in headers.linears):
        return [
            Problem(
                what=f"{scheme.slug} would pack the experts of this model one by one.",
                where=scheme.slug,
                why="transformers 5 holds the experts of a layer as one weight and leaves packed ones out: they would "
                "be random numbers in every evaluation, with a warning in a log.",
                next="Write nf4 or int8: they leave the experts in bf16.",
            )
        ]
    kinds = {headers.config.get("model_type"), headers.text_config.get("model_type")}
    return [
        Problem(
            what=f"{scheme.backend} cannot make {scheme.slug} of a {'/'.join(sorted(map(str, kinds)))} model.",
            where=scheme.slug,
            why=limit.why,
            next=limit.next,
        )
        for limit in LIMITS
        if scheme.backend in limit.backends and scheme.method in limit.methods and kinds & set(limit.model_types)
    ]
