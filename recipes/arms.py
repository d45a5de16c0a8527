"""The evaluation matrix, spelled out: every way the fine-tune could be shipped, under a readable slug."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from recipes.problem import Problem, RecipeError
from recipes.schema import LayerRule, Recipe, SchemeSpec
from recipes.schemes import Grid, Rule, Scheme
from recipes.slugs import by_backend, parse_scheme

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
        scheme: How it is quantized; None where nothing is but the base, to NF4.
        on_base: The scheme is applied to the base, and the adapter stays on top.
        adapter: The adapter is loaded on top.
    """

    slug: str
    kind: Kind
    merge_base: MergeBase | None = None
    scheme: Scheme | None = None
    on_base: bool = False
    adapter: bool = False


def arms(recipe: Recipe) -> tuple[Arm, ...]:
    """All arms in the order of the report.

    Raises:
        RecipeError: A slug names no scheme; two specs have one name.
    """
    schemes = [specified(entry) for entry in recipe.quantize.schemes]
    on_base = [parse_scheme(slug) for slug in recipe.evaluate.on_base]
    problems = [*_repeated(schemes, field="quantize.schemes"), *_repeated(on_base, field="evaluate.on_base")]
    if problems:
        raise RecipeError(problems)
    return (
        Arm(slug="base", kind="bf16"),
        Arm(slug="nf4-adapter", kind="nf4", adapter=True),
        Arm(slug="merged-dequantized", kind="bf16", merge_base="dequantized"),
        Arm(slug="merged-original", kind="bf16", merge_base="original"),
        *(Arm(slug=one.slug, kind="quantized", merge_base=recipe.merge.base, scheme=one) for one in schemes),
        *(Arm(slug=f"{one.slug}.on-base", kind="quantized", scheme=one, on_base=True, adapter=True) for one in on_base),
    )


def specified(entry: str | SchemeSpec) -> Scheme:
    """The scheme of an entry of quantize.schemes, under the name of its arm.

    Raises:
        RecipeError: No such scheme; a backend, rules or KV scales that it cannot have.
    """
    if isinstance(entry, str):
        return parse_scheme(entry)
    scheme = parse_scheme(entry.scheme)
    if entry.backend is not None:
        scheme = by_backend(scheme, entry.backend)
    if (entry.rules or entry.kv_scales) and scheme.form != "compressed-tensors":
        raise RecipeError(
            [
                Problem(
                    what=f"{entry.scheme} cannot have {'rules' if entry.rules else 'kv_scales'}.",
                    where=entry.scheme,
                    why="Files of other formats with mixed grids or KV scales load in no server.",
                    next="Write a ct- scheme, for example ct-gptq-w4-g128.",
                )
            ]
        )
    own = tuple(_rule(one, scheme) for one in entry.rules)
    return replace(scheme, slug=entry.name or scheme.slug, rules=(*own, *scheme.rules), kv_scales=entry.kv_scales)


def _rule(asked: LayerRule, scheme: Scheme) -> Rule:
    if asked.keep:
        return Rule(asked.match, None)
    grid = scheme.grid
    bits, group = asked.bits or grid.bits, asked.group_size or grid.group_size
    return Rule(asked.match, Grid(bits, group, grid.symmetric))


def _repeated(schemes: list[Scheme], *, field: str) -> list[Problem]:
    slugs = [scheme.slug for scheme in schemes]
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
