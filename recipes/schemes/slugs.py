"""Slugs: which schemes there are, what they are called, and the nearest one to a name that is no scheme."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from difflib import get_close_matches
from itertools import product
from typing import Literal, NamedTuple

from recipes.models.linear import Linear
from recipes.problem import Problem
from recipes.schemes.scheme import GROUP_SIZES, PER_CHANNEL, Backend, Form, Grid, Method, Rule, Scheme, listed, spelled

ATTENTION, FFN = r"\.(self_attn|attn|attention)\.", r"\.(mlp|feed_forward|block_sparse_moe)\."
_SLUG = re.compile(
    r"^(?P<family>(ct-)?(rtn|gptq|awq))-w(?P<bits>\d+)(-g(?P<group>\d+))?(?P<asym>-asym)?(?P<order>-actorder)?$"
)


class SchemeFamily(NamedTuple):
    """What comes before the bits in a slug, and what it can do.

    Attributes:
        method: How codes are found.
        backend: Who finds them, where the recipe names nobody else.
        form: What the files are.
        bits: Bits per weight.
        per_channel: Can do without groups.
        zero_points: `never`, `optional` (with -asym) or `always`.
        activation_order: Can do -actorder.
        others: Backends that the recipe may name instead.
    """

    method: Method
    backend: Backend
    form: Form
    bits: tuple[int, ...]
    per_channel: bool
    zero_points: Literal["never", "optional", "always"]
    activation_order: bool = False
    others: tuple[Backend, ...] = ()

    @property
    def group_sizes(self) -> tuple[int, ...]:
        """Inputs per scale; -1: per channel."""
        return (*GROUP_SIZES, PER_CHANNEL) if self.per_channel else GROUP_SIZES


FAMILIES = {
    "rtn": SchemeFamily("rtn", "quench-rtn", "gptq", (2, 3, 4, 8), True, "never"),
    "gptq": SchemeFamily("gptq", "gptqmodel", "gptq", (2, 3, 4, 8), True, "optional", True, ("auto-gptq",)),
    "awq": SchemeFamily("awq", "gptqmodel", "awq", (4,), False, "always", False, ("autoawq",)),
    "ct-gptq": SchemeFamily("gptq", "llm-compressor", "compressed-tensors", (3, 4, 8), True, "optional"),
    "ct-awq": SchemeFamily("awq", "llm-compressor", "compressed-tensors", (4,), False, "always"),
}

BITSANDBYTES = {
    "nf4": Scheme(slug="nf4", method="nf4", grid=Grid(4, 64, True), backend="bitsandbytes", form="bitsandbytes"),
    "int8": Scheme(
        slug="int8", method="int8", grid=Grid(8, PER_CHANNEL, True), backend="bitsandbytes", form="bitsandbytes"
    ),
}
MIXED = {
    "ct-gptq-w4-attn32-ffn128": Scheme(
        slug="ct-gptq-w4-attn32-ffn128",
        method="gptq",
        grid=Grid(4, 128, True),
        backend="llm-compressor",
        form="compressed-tensors",
        rules=(Rule(ATTENTION, Grid(4, 32, True)), Rule(FFN, Grid(4, 128, True))),
    ),
}


def parse_scheme(slug: str) -> Scheme:
    """The scheme that a slug names.

    Raises:
        RecipeError: No such form, or bits, group or option that the method cannot do.
    """
    if slug in BITSANDBYTES or slug in MIXED:
        return {**BITSANDBYTES, **MIXED}[slug]
    match = _SLUG.match(slug)
    if match is None or match["family"] not in FAMILIES:
        raise _no_scheme(slug, f"`{slug}` is no scheme.", "A scheme is METHOD-wBITS-gGROUP, nf4 or int8.").error()
    name, family, bits = match["family"], FAMILIES[match["family"]], int(match["bits"])
    if bits not in family.bits:
        why = f"{name} can do {listed(family.bits)} bits here."
        raise _no_scheme(slug, f"`{slug}` asks for {bits} bits.", why).error()
    if match["group"] is None and not family.per_channel:
        why = f"{name} has groups: of {listed(GROUP_SIZES)} inputs."
        raise _no_scheme(slug, f"`{slug}` names no group size.", why).error()
    if match["group"] is not None and int(match["group"]) not in GROUP_SIZES:
        why = f"Groups are of {listed(GROUP_SIZES)} inputs."
        raise _no_scheme(slug, f"`{slug}` asks for groups of {match['group']}.", why).error()
    if match["asym"] and family.zero_points != "optional":
        why = f"{name} {family.zero_points} has zero points."
        raise _no_scheme(slug, f"`{slug}` asks for zero points by -asym.", why).error()
    if match["order"] and not family.activation_order:
        raise _no_scheme(slug, f"`{slug}` asks for -actorder.", "Activation order is GPTQ's, by GPTQModel.").error()
    return _scheme(
        name, bits, int(match["group"] or PER_CHANNEL), asymmetric=bool(match["asym"]), desc_act=bool(match["order"])
    )


def _scheme(name: str, bits: int, group: int, *, asymmetric: bool = False, desc_act: bool = False) -> Scheme:
    family = FAMILIES[name]
    grid = Grid(bits, group, symmetric=not asymmetric and family.zero_points != "always")
    return Scheme(
        slug=spelled(family.form, family.method, grid, desc_act=desc_act),
        method=family.method,
        grid=grid,
        backend=family.backend,
        form=family.form,
        desc_act=desc_act,
    )


def by_backend(scheme: Scheme, backend: str) -> Scheme:
    """The same scheme by another backend, as `SLUG.BACKEND`.

    Raises:
        RecipeError: The backend cannot do it.
    """
    if backend == scheme.backend:
        return scheme
    family = next((family for name, family in FAMILIES.items() if scheme.slug.startswith(f"{name}-")), None)
    legal: dict[str, Backend] = {other: other for other in family.others} if family else {}
    if backend not in legal:
        others = [scheme.backend, *legal]
        raise Problem(
            what=f"The backend {backend} does not make {scheme.slug}.",
            where=scheme.slug,
            why=f"It is made by {' or '.join(others)}.",
            next=f"Write backend: {others[-1]}, or leave it out.",
        ).error()
    return replace(scheme, slug=f"{scheme.slug}.{backend}", backend=legal[backend])


def known_schemes() -> list[Scheme]:
    """Every scheme without options, for `quench schemes` and the docs."""
    return [
        *(
            _scheme(name, bits, group)
            for name, family in FAMILIES.items()
            for bits, group in product(family.bits, family.group_sizes)
        ),
        *MIXED.values(),
        *BITSANDBYTES.values(),
    ]


def _no_scheme(slug: str, what: str, why: str) -> Problem:
    forms = "; ".join(f"{name}-w{'/'.join(map(str, family.bits))}" for name, family in FAMILIES.items())
    groups = "/".join(map(str, GROUP_SIZES))
    return Problem(
        what=what,
        where=slug,
        why=why,
        next=f"Write {_nearest(slug).slug}, the nearest; legal are {forms}, each with -g{groups} (all but AWQ without, "
        f"too); {', '.join([*MIXED, *BITSANDBYTES])}.",
    )


def _nearest(slug: str) -> Scheme:
    """By numbers where there are any, else by how it begins, else by spelling."""
    match = _SLUG.match(slug)
    if match is None or match["family"] not in FAMILIES:
        by_slug = {scheme.slug: scheme for scheme in known_schemes()}
        longer = [known for known in by_slug if slug and known.startswith(slug)]
        return by_slug[(longer[-1:] or get_close_matches(slug, by_slug, n=1, cutoff=0.0))[0]]
    bits, group = int(match["bits"]), int(match["group"] or GROUP_SIZES[-1])
    of_family = [scheme for scheme in known_schemes() if scheme.slug.startswith(f"{match['family']}-w")]
    return min(of_family, key=lambda scheme: (abs(scheme.bits - bits), abs(scheme.group_size - group)))


def legal_schemes(shapes: Sequence[Linear]) -> list[Scheme]:
    """Every scheme that this model's layers allow."""
    return [scheme for scheme in known_schemes() if scheme.fits(shapes)]
