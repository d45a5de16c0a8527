"""The evaluation matrix, spelled out: every way the fine-tune could be shipped, under a readable slug."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from recipes.problem import Problem, RecipeError
from recipes.schema import Recipe

Kind = Literal["bf16", "nf4", "quantized"]
MergeBase = Literal["dequantized", "original", "auto"]


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way to ship, and what is loaded for it.

    Attributes:
        slug: Its name everywhere.
        kind: How the model folder is loaded.
        merge_base: The weights that the adapter was merged into; `auto` where the run decides, None where nothing is
            merged.
        scheme: Slug of the scheme; None where nothing is quantized but to NF4.
        on_base: The scheme is applied to the base, and the adapter stays on top.
        adapter: The adapter is loaded on top.
    """

    slug: str
    kind: Kind
    merge_base: MergeBase | None = None
    scheme: str | None = None
    on_base: bool = False
    adapter: bool = False


def arms(recipe: Recipe) -> tuple[Arm, ...]:
    """All arms in the order of the report.

    Raises:
        RecipeError: A scheme is named twice in quantize.schemes or evaluate.on_base.
    """
    problems = [
        *_repeated(recipe.quantize.schemes, field="quantize.schemes"),
        *_repeated(recipe.evaluate.on_base, field="evaluate.on_base"),
    ]
    if problems:
        raise RecipeError(problems)
    return (
        Arm(slug="base", kind="bf16"),
        Arm(slug="nf4-adapter", kind="nf4", adapter=True),
        Arm(slug="merged-dequantized", kind="bf16", merge_base="dequantized"),
        Arm(slug="merged-original", kind="bf16", merge_base="original"),
        *(
            Arm(slug=slug, kind="quantized", merge_base=recipe.merge.base, scheme=slug)
            for slug in recipe.quantize.schemes
        ),
        *(
            Arm(slug=f"{slug}.on-base", kind="quantized", scheme=slug, on_base=True, adapter=True)
            for slug in recipe.evaluate.on_base
        ),
    )


def _repeated(slugs: list[str], *, field: str) -> list[Problem]:
    first = {slug: index for index, slug in reversed(list(enumerate(slugs)))}
    return [
        Problem(
            what=f"The scheme {slug} stands twice in {field}.",
            where=f"{field}.{index}",
            why=f"Two arms would have one name; the first is {field}.{first[slug]}.",
            next="Remove one of the two.",
        )
        for index, slug in enumerate(slugs)
        if first[slug] != index
    ]
