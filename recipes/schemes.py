"""Schemes: how weights are quantized. All that a model's shapes can tell about one is arithmetic here.

`gptq-w4-g128` is GPTQ (Frantar et al. 2022, arXiv:2210.17323), 4 bits, one scale for 128 inputs; `awq` is AWQ
(Lin et al. 2023, arXiv:2306.00978); `rtn` is rounding to nearest, the control that needs no calibration set.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import product
from typing import Any, Literal, NamedTuple

from recipes.problem import Problem, RecipeError

Method = Literal["rtn", "gptq", "awq"]
METHODS: dict[str, tuple[int, ...]] = {"rtn": (2, 3, 4, 8), "gptq": (2, 3, 4, 8), "awq": (4,)}  # bits of each
GROUP_SIZES = (32, 64, 128)
# Outputs that are packed together (GPTQModel 7.6, tried on layers of 8 to 48 outputs): 2- and 8-bit zero points fill
# whole 32-bit words, 3-bit ones three of them, PyTorch's int4 CPU kernel wants 16, AWQ's clipping search 64.
PACKED_OUTPUTS = {2: 16, 3: 32, 4: 16, 8: 4}
AWQ_OUTPUTS = 64
_SLUG = re.compile(r"^(?P<method>[a-z]+)-w(?P<bits>\d+)-g(?P<group>\d+)$")


class Linear(NamedTuple):
    """A linear layer that a scheme quantizes: the weight's name without `.weight`, and its shape."""

    name: str
    in_features: int
    out_features: int

    @property
    def family(self) -> str:
        """The name with layer numbers as `*`: one for all layers of a kind."""
        return re.sub(r"(?<=\.)\d+(?=\.)|^\d+(?=\.)", "*", self.name)


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """How weights are quantized.

    Attributes:
        slug: `METHOD-wBITS-gGROUP`.
        method: `rtn`, `gptq` or `awq`.
        bits: Bits a weight.
        group_size: Inputs that share a scale.
        symmetric: No zero points: the grid is centred on 0. AWQ's kernels know zero points only.
        backend: Who quantizes: GPTQModel, or the few lines of our own that round.
        desc_act: GPTQ's activation order; off, because its kernels are slower and few servers have them.
    """

    slug: str
    method: Method
    bits: int
    group_size: int
    symmetric: bool
    backend: str
    desc_act: bool = False

    @property
    def needs_calibration(self) -> bool:
        """Rounding to nearest looks at no data."""
        return self.method != "rtn"

    def params(self) -> dict[str, Any]:
        """What decides the bytes: the scheme's part of the step's identity."""
        return {
            "method": self.method,
            "bits": self.bits,
            "group_size": self.group_size,
            "symmetric": self.symmetric,
            "desc_act": self.desc_act,
        }

    def check(self, shapes: Sequence[Linear]) -> list[Problem]:
        """Problems of this scheme on a model with these layers; `where` is left to the caller as the slug."""
        return [problem for problem in (self._group_problem(shapes), self._pack_problem(shapes)) if problem]

    def _ungrouped(self, shapes: Iterable[Linear]) -> list[Linear]:
        return [layer for layer in shapes if layer.in_features % self.group_size]

    def _unpackable(self, shapes: Iterable[Linear]) -> list[Linear]:
        return [layer for layer in shapes if layer.out_features % self._outputs]

    @property
    def _outputs(self) -> int:
        return AWQ_OUTPUTS if self.method == "awq" else PACKED_OUTPUTS[self.bits]

    def fits(self, shapes: Sequence[Linear]) -> bool:
        """True where every layer can be quantized by this scheme."""
        return not self._ungrouped(shapes) and not self._unpackable(shapes)

    def _group_problem(self, shapes: Sequence[Linear]) -> Problem | None:
        bad = self._ungrouped(shapes)
        if not bad:
            return None
        legal = legal_group_sizes(shapes)
        none = (
            f"None of the group sizes {_listed(GROUP_SIZES)} divides every layer of this base: choose a base whose "
            "hidden and intermediate sizes are multiples of 32."
        )
        return Problem(
            what=f"The group size {self.group_size} of {self.slug} does not divide {collapsed(bad)}.",
            where=self.slug,
            why="A scale belongs to one whole group of inputs; no kernel reads a group that is cut short.",
            next=f"Write {self.method}-w{self.bits}-g{legal[-1]}: {legal[-1]} is the largest legal group here."
            if legal
            else none,
        )

    def _pack_problem(self, shapes: Sequence[Linear]) -> Problem | None:
        bad = self._unpackable(shapes)
        if not bad:
            return None
        legal = [scheme.slug for scheme in legal_schemes(shapes) if scheme.group_size == legal_group_sizes(shapes)[-1]]
        return Problem(
            what=f"{self.slug} cannot pack {collapsed(bad, outputs=True)}.",
            where=self.slug,
            why=f"It takes the outputs of a layer {self._outputs} at a time, for packing and for its kernels.",
            next=f"Legal here: {', '.join(legal)}."
            if legal
            else "Choose another base: no scheme is legal on this one.",
        )

    def predicted_bytes(self, shapes: Iterable[Linear]) -> int:
        """Bytes of the quantized layers on disk: codes, fp16 scales, zero points and, but for AWQ, the int32 g_idx."""
        total = 0
        for layer in shapes:
            groups = -(-layer.in_features // self.group_size)
            total += layer.in_features * layer.out_features * self.bits // 8
            total += groups * layer.out_features * (16 + self.bits) // 8
            total += 0 if self.method == "awq" else 4 * layer.in_features
        return total


def parse_scheme(slug: str) -> Scheme:
    """The scheme that a slug names.

    Raises:
        RecipeError: Not of the form METHOD-wBITS-gGROUP, or bits or group that the method cannot do.
    """
    match = _SLUG.match(slug)
    if match is None or match["method"] not in METHODS:
        raise _refused(slug, f"`{slug}` is no scheme.", "A scheme is METHOD-wBITS-gGROUP.")
    method, bits, group = match["method"], int(match["bits"]), int(match["group"])
    if bits not in METHODS[method]:
        can = _listed(METHODS[method])
        raise _refused(slug, f"`{slug}` asks for {bits} bits.", f"{method} can do {can} bits here.")
    if group not in GROUP_SIZES:
        raise _refused(slug, f"`{slug}` asks for groups of {group}.", f"Groups are of {_listed(GROUP_SIZES)} inputs.")
    return _scheme(method, bits, group)


def _scheme(method: str, bits: int, group: int) -> Scheme:
    known: dict[str, Method] = {"rtn": "rtn", "gptq": "gptq", "awq": "awq"}
    return Scheme(
        slug=f"{method}-w{bits}-g{group}",
        method=known[method],
        bits=bits,
        group_size=group,
        symmetric=method != "awq",
        backend="quench-rtn" if method == "rtn" else "gptqmodel",
    )


def known_schemes() -> list[Scheme]:
    """Every scheme there is, for `quench schemes` and the docs."""
    return [
        _scheme(method, bits, group)
        for method, widths in METHODS.items()
        for bits, group in product(widths, GROUP_SIZES)
    ]


def _refused(slug: str, what: str, why: str) -> RecipeError:
    forms = "; ".join(f"{method}-w{'/'.join(map(str, bits))}" for method, bits in METHODS.items())
    near = _nearest(slug).slug
    groups = "/".join(map(str, GROUP_SIZES))
    remedy = f"Write {near}, the nearest; legal are {forms}, each with -g{groups}."
    return RecipeError([Problem(what=what, where=slug, why=why, next=remedy)])


def _nearest(slug: str) -> Scheme:
    """By numbers where there are any, else by how it begins, else by spelling."""
    match = _SLUG.match(slug)
    if match is None or match["method"] not in METHODS:
        by_slug = {scheme.slug: scheme for scheme in known_schemes()}
        begun = [known for known in by_slug if slug and known.startswith(slug)]
        return by_slug[(begun[-1:] or get_close_matches(slug, by_slug, n=1, cutoff=0.0))[0]]
    bits, group = int(match["bits"]), int(match["group"])
    same = [scheme for scheme in known_schemes() if scheme.method == match["method"]]
    return min(same, key=lambda scheme: (abs(scheme.bits - bits), abs(scheme.group_size - group)))


def legal_group_sizes(shapes: Iterable[Linear]) -> tuple[int, ...]:
    """Group sizes that divide the inputs of every layer, ascending."""
    inputs = {layer.in_features for layer in shapes}
    return tuple(group for group in GROUP_SIZES if all(size % group == 0 for size in inputs))


def legal_schemes(shapes: Sequence[Linear]) -> list[Scheme]:
    """Every scheme that this model's layers allow."""
    return [scheme for scheme in known_schemes() if scheme.fits(shapes)]


def collapsed(layers: Iterable[Linear], *, outputs: bool = False) -> str:
    """All layers by family, with what is wrong: `model.layers.*.mlp.down_proj (in_features 344, 6 layers)`."""
    families: dict[tuple[str, int], int] = {}
    for layer in layers:
        key = (layer.family, layer.out_features if outputs else layer.in_features)
        families[key] = families.get(key, 0) + 1
    side = "out_features" if outputs else "in_features"
    return ", ".join(
        f"{family} ({side} {size}, {count} layer{'s' if count > 1 else ''})"
        for (family, size), count in families.items()
    )


def _listed(numbers: Iterable[int]) -> str:
    words = [str(number) for number in numbers]
    return " and ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else words[0]
