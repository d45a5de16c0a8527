"""What lies on disk after quantization, counted: which linear layers are packed, at how many bits, with which codes.

What a backend says it did is not asked. A merge or an export that goes wrong in silence writes weights in bf16 under a
quantization_config, and whatever loads them runs. So the headers are read, and of every packed layer as many codes as
show that its grid is used: a few KiB of a good layer, all of a bad one. Standard library only: no model is loaded.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from recipes.models.decoder import is_tower
from recipes.models.headers import Headers
from recipes.models.linear import Linear, weight_count
from recipes.models.weights import Tensor, read_tensors
from recipes.problem import Problem
from recipes.schemes.codes import codes_used
from recipes.schemes.limits import UNQUANTIZED, quantized_linears
from recipes.schemes.scheme import PER_CHANNEL, Grid, Scheme

CODES = ("qweight", "weight_packed")  # GPTQ and AWQ, compressed-tensors; bitsandbytes has its codes in `weight`
SCALES = ("scales", "weight_scale", "SCB")
INT8_LEVELS = 255  # LLM.int8() rounds to -127 ... 127
# With fewer weights a level a good layer may miss half of the levels by chance: of 4,096 normal weights on a grid of 8
# bits that ends at 4 deviations, 190 lie in the outer half.
WEIGHTS_A_LEVEL = 16
# What a layer holds beside codes, scales and zero points: bitsandbytes' tables (16 and 256 fp32, 150 bytes of JSON).
BESIDE_BYTES = 2048
BESIDE_SHARE = 0.02  # NF4's second scales are 0.05 %; scales in fp32 where 16 bits are promised are 3 % at g128
NAMED = 4  # layers that a message names in full; of more it names the families

_PART = re.compile(
    r"^(?P<module>.+?)\.(?P<part>qweight|qzeros|scales|g_idx|SCB|weight_format"
    r"|weight(_packed|_scale|_zero_point|_shape|_g_idx)?(\..+)?)$"
)
_FROM_LAYER = re.compile(r"\w+\.\d+\..+$")  # layers.0.mlp.down_proj: savers may change what stands before


class Packed(NamedTuple):
    """A linear layer whose file holds codes.

    Attributes:
        layer: Name and shape, as the model before has them.
        bits: A code's, as the sizes of the tensors show.
        groups: Scales of one output; None where the format says it otherwise (NF4).
        codes: The tensor with the codes.
        n_bytes: Codes, scales, zero points, and whatever else is stored for the layer but its bias.
    """

    layer: Linear
    bits: int
    groups: int | None
    codes: Tensor
    n_bytes: int


class Dense(NamedTuple):
    """A linear layer whose file holds its weights as they are, and their type."""

    layer: Linear
    dtype: str


@dataclass(frozen=True, kw_only=True)
class OnDisk:
    """A quantized folder, counted.

    Attributes:
        folder: It.
        scheme: What it should hold.
        linears: Linear layers of the text decoder, experts that are stored one by one among them.
        weights: Their weights, and those of experts that are stored as one weight a layer.
        packed: Layers that hold codes.
        dense: Layers that the scheme quantizes, and that hold floats.
        absent: Layers that the scheme quantizes, and that are not there.
        beyond: Packed modules that the scheme leaves alone: lm_head, towers, routers, layers that a rule keeps.
    """

    folder: Path
    scheme: Scheme
    linears: int
    weights: int
    packed: tuple[Packed, ...]
    dense: tuple[Dense, ...]
    absent: tuple[Linear, ...]
    beyond: tuple[str, ...]

    @property
    def packed_share(self) -> float:
        """Share of the linear weights that is packed."""
        return weight_count(stored.layer for stored in self.packed) / self.weights

    @property
    def bits_a_weight(self) -> float:
        """Bits on disk a packed weight, scales and zero points among them."""
        return self._a_weight(sum(stored.n_bytes for stored in self.packed))

    @property
    def promised_bits_a_weight(self) -> float:
        """The same by the scheme's arithmetic."""
        return self._a_weight(self.scheme.predicted_bytes(stored.layer for stored in self.packed))

    def _a_weight(self, n_bytes: int) -> float:
        return 8 * n_bytes / max(1, weight_count(stored.layer for stored in self.packed))

    def problem(self, claimed: Collection[str] = ()) -> Problem | None:
        """Why this is not the model that the scheme's name says; None where it is.

        Args:
            claimed: Layers that the backend says it quantized. Others that it left in bf16 it has told by a note, and
                config.json names them for whoever loads: up to 5 % of the linear weights they may be.
        """
        told = [stored for stored in self.dense if stored.layer.name not in claimed]
        if weight_count(stored.layer for stored in told) > UNQUANTIZED * self.weights:
            told = []
        if dense := [stored for stored in self.dense if stored not in told]:
            return self._dense_problem(dense)
        if self.absent:
            return self._absent_problem()
        if other := [stored for stored in self.packed if not _on_grid(stored, self.scheme)]:
            return self._grid_problem(other)
        return None

    def _dense_problem(self, dense: Sequence[Dense]) -> Problem:
        types = " and ".join(sorted({stored.dtype for stored in dense}))
        layers = [stored.layer for stored in dense]
        return Problem(
            what=f"{len(dense)} of {self.linears} linear layers are stored as {types} where {self.scheme.slug} "
            f"promises codes: {named(layer.name for layer in layers)}.",
            where=str(self.folder),
            why=f"Their weights were not quantized ({weight_count(layers) / self.weights:.0%} of the linear weights). "
            "They run all the same, so nothing else would show that this is not the model that its name says.",
            next=f"Do not serve it. Take another scheme for this model (quench schemes lists them), and report it with "
            f"the log: {self.scheme.backend} wrote it without an error.",
        )

    def _absent_problem(self) -> Problem:
        return Problem(
            what=f"{len(self.absent)} of {self.linears} linear layers are not in the quantized files: "
            f"{named(layer.name for layer in self.absent)}.",
            where=str(self.folder),
            why="Whatever loads the model fills them with random numbers, with a warning in a log at most.",
            next=f"Take another scheme for this model (quench schemes lists them): {self.scheme.backend} "
            "renamed, fused or lost these.",
        )

    def _grid_problem(self, other: Sequence[Packed]) -> Problem:
        first = other[0]
        promised = self.scheme.grid_of(first.layer.name) or self.scheme.grid
        return Problem(
            what=f"{len(other)} of {self.linears} linear layers are on another grid than {self.scheme.slug} promises: "
            f"{named(stored.layer.name for stored in other)}.",
            where=str(self.folder),
            why=f"{first.layer.name} holds {first.bits}-bit codes with {_scales(first.groups)}; "
            f"{promised.bits} bits with {_scales(_groups(first.layer, promised))} are promised.",
            next=f"Do not serve it. Take another scheme for this model (quench schemes lists them), and report it with "
            f"the log: {self.scheme.backend} wrote it without an error.",
        )

    def notes(self, used: Mapping[str, Collection[int]]) -> Iterator[str]:
        """What is odd, and no failure.

        Args:
            used: Codes of every packed layer, as `codes_used` gives them.
        """
        few = [stored for stored in self.packed if self._wastes(stored, len(used[stored.layer.name]))]
        if few:
            least = min(few, key=lambda stored: len(used[stored.layer.name]))
            yield (
                f"{len(few)} layers use at most half of their codes, which fewer bits would hold: "
                f"{named(stored.layer.name for stored in few)}; least {least.layer.name}, "
                f"{len(used[least.layer.name])} of {self.levels(least.bits)}"
            )
        promised = self.scheme.predicted_bytes(stored.layer for stored in self.packed)
        extra = sum(stored.n_bytes for stored in self.packed) - promised
        if abs(extra) > BESIDE_BYTES * len(self.packed) + BESIDE_SHARE * promised:
            yield f"{self.bits_a_weight:.3f} bits a weight on disk, {self.promised_bits_a_weight:.3f} promised"
        if self.beyond:
            yield f"{len(self.beyond)} modules are packed that {self.scheme.slug} leaves alone: {named(self.beyond)}"

    def _wastes(self, stored: Packed, used: int) -> bool:
        levels = self.levels(stored.bits)
        return 2 * used <= levels and stored.layer.weights >= WEIGHTS_A_LEVEL * levels

    def levels(self, bits: int) -> int:
        """Codes that a grid has."""
        return INT8_LEVELS if self.scheme.method == "int8" else 1 << bits

    def codes_used(self) -> dict[str, frozenset[int]]:
        """Which codes every packed layer uses, by its name; LLM.int8()'s are signed.

        Reads each layer until every level was seen.
        """
        return {
            stored.layer.name: codes_used(
                stored.codes,
                stored.bits,
                inputs=stored.layer.in_features,
                levels=self.levels(stored.bits),
                signed=self.scheme.method == "int8",
            )
            for stored in self.packed
        }

    def record(self, used: Mapping[str, Collection[int]]) -> dict[str, Any]:
        """The figures, as a manifest has them; `codes` by bits: the fewest codes that a layer uses, the widest of all.

        Args:
            used: Codes of every packed layer, as `codes_used` gives them.
        """
        by_bits: dict[int, list[Collection[int]]] = {}
        for stored in self.packed:
            by_bits.setdefault(stored.bits, []).append(used[stored.layer.name])
        return {
            "layers": self.linears,
            "packed_layers": len(self.packed),
            "packed_share": round(self.packed_share, 6),
            "bits_a_weight": round(self.bits_a_weight, 4),
            "promised_bits_a_weight": round(self.promised_bits_a_weight, 4),
            "codes": {
                str(bits): {
                    "levels": self.levels(bits),
                    "fewest_used": min(map(len, codes)),
                    "widest": max((abs(code) for own in codes for code in own), default=0),
                }
                for bits, codes in sorted(by_bits.items())
            },
        }


def read(folder: Path, scheme: Scheme, headers: Headers) -> OnDisk:
    """Read the headers of a quantized folder.

    Args:
        folder: The quantized model.
        scheme: What it should hold.
        headers: Of the model that was quantized, which says which linear layers there are.

    Raises:
        RecipeError: Its index or a header is broken.
    """
    modules = _modules(read_tensors(folder))
    alike = _renamed(modules, headers)
    packed: list[Packed] = []
    dense: list[Dense] = []
    absent: list[Linear] = []
    counted: set[str] = set()
    for layer in quantized_linears(scheme, headers):
        if scheme.grid_of(layer.name) is None:
            continue
        module = layer.name if layer.name in modules else alike.get(_from_layer(layer.name), layer.name)
        counted.add(module)
        stored = _stored(layer, modules.get(module, {}))
        if isinstance(stored, Packed):
            packed.append(stored)
        elif isinstance(stored, Dense):
            dense.append(stored)
        else:
            absent.append(layer)
    return OnDisk(
        folder=folder,
        scheme=scheme,
        linears=len(headers.linears),
        weights=headers.linear_parameters + sum(tensor.numel for tensor in headers.stacked_experts),
        packed=tuple(packed),
        dense=tuple(dense),
        absent=tuple(absent),
        beyond=tuple(module for module in modules if module not in counted and _codes(modules[module])),
    )


def named(names: Iterable[str]) -> str:
    """Up to four names; of more, their families: `model.layers.*.mlp.up_proj (28)`."""
    every = list(names)
    if len(every) <= NAMED:
        return ", ".join(every)
    families: dict[str, int] = {}
    for name in every:
        family = Linear(name, 0, 0).family
        families[family] = families.get(family, 0) + 1
    return ", ".join(f"{family} ({number})" for family, number in families.items())


def _modules(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Module -> its tensors by what follows its name, for modules that have a weight or codes; without biases."""
    modules: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if match := _PART.match(name):
            modules.setdefault(match["module"], {})[match["part"]] = tensor
    return modules


def _renamed(modules: Iterable[str], headers: Headers) -> dict[str, str]:
    """Modules that are called otherwise than in the model before, by their name from the layer number on."""
    before = {name.removesuffix(".weight") for name in headers.tensors}
    others = (module for module in modules if module not in before and not is_tower(module))
    return {_from_layer(module): module for module in others}


def _from_layer(name: str) -> str:
    match = _FROM_LAYER.search(name)
    return match.group() if match else name


def _codes(parts: Mapping[str, Tensor]) -> Tensor | None:
    """The tensor that holds a module's codes."""
    weight = parts.get("weight")
    if weight is not None and weight.dtype in ("U8", "I8"):
        return weight
    return next((parts[part] for part in CODES if part in parts), None)


def _stored(layer: Linear, parts: Mapping[str, Tensor]) -> Packed | Dense | None:
    """How a layer is stored; None where it is not."""
    codes, weight = _codes(parts), parts.get("weight")
    if codes is None:
        return Dense(layer, weight.dtype) if weight is not None else None
    scales = next((parts[part] for part in SCALES if part in parts), None)
    return Packed(
        layer=layer,
        bits=8 * codes.n_bytes // layer.weights,  # rounded down: rows of compressed-tensors end with whole words
        groups=scales.numel // layer.out_features if scales else None,
        codes=codes,
        n_bytes=sum(tensor.n_bytes for tensor in parts.values()),
    )


def _on_grid(stored: Packed, scheme: Scheme) -> bool:
    grid = scheme.grid_of(stored.layer.name)
    if grid is None or stored.bits != grid.bits:
        return False
    return scheme.form == "bitsandbytes" or stored.groups == _groups(stored.layer, grid)


def _groups(layer: Linear, grid: Grid) -> int:
    """Scales of one output."""
    return 1 if grid.group_size == PER_CHANNEL else layer.in_features // grid.group_size


def _scales(groups: int | None) -> str:
    return f"{groups} scale{'s' if groups != 1 else ''} an output" if groups else "scales of blocks"
