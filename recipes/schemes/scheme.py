"""Schemes: how weights are quantized. All that a model's shapes can tell about one is arithmetic here.

`gptq-w4-g128` is GPTQ (Frantar et al. 2022, arXiv:2210.17323), 4 bits, one scale for 128 inputs; without `-gGROUP`
one scale serves a whole output (per channel). `awq` is AWQ (Lin et al. 2023, arXiv:2306.00978); `rtn` is rounding to
nearest, the control that needs no calibration set. `ct-` writes the compressed-tensors format; `nf4` (Dettmers et al.
2023, arXiv:2305.14314) and `int8` (LLM.int8(), arXiv:2208.07339) are bitsandbytes' own.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

from recipes.models.linear import Linear
from recipes.problem import Problem

Method = Literal["rtn", "gptq", "awq", "nf4", "int8"]
Form = Literal["gptq", "awq", "compressed-tensors", "bitsandbytes"]
Backend = Literal["quench-rtn", "gptqmodel", "llm-compressor", "bitsandbytes", "autoawq", "auto-gptq"]
GROUP_SIZES = (32, 64, 128)
PER_CHANNEL = -1  # group_size of one scale for all inputs of an output, as config.json writes it
# Outputs that are packed together (GPTQModel 7.6, tried on layers of 8 to 48 outputs): 2- and 8-bit zero points fill
# whole 32-bit words, 3-bit ones three of them, PyTorch's int4 CPU kernel wants 16, AWQ's clipping search 64.
PACKED_OUTPUTS = {2: 16, 3: 32, 4: 16, 8: 4}
# Inputs that GPTQ's packing takes at a time: codes of one output fill whole 32-bit words. Groups see to it; per channel
# it is a rule of its own (tried: 2, 4 and 8 bits with 36, 48 and 80 inputs; 3 bits with 48 cannot be packed).
PACKED_INPUTS = {2: 16, 3: 32, 4: 8, 8: 4}
AWQ_OUTPUTS = 64
# Servers load the parts as one weight; some architectures (Phi-3) hold it as one.
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


class Grid(NamedTuple):
    """The grid of a layer's weights.

    Attributes:
        bits: Bits per weight.
        group_size: Inputs that share a scale; -1 where all of an output do.
        symmetric: No zero points: the grid is centred on 0.
    """

    bits: int
    group_size: int
    symmetric: bool


class Rule(NamedTuple):
    """Another grid for some layers, or none.

    Attributes:
        match: Regular expression, searched in the layer's full name; the first rule that matches counts. One that names
            a fused weight (qkv_proj) stands for its parts.
        grid: Their grid; None leaves them in bf16.
    """

    match: str
    grid: Grid | None

    def covers(self, name: str) -> bool:
        """True where the layer of this full name, which is not a fused one, falls under the rule."""
        stem, _, part = name.rpartition(".")
        names = [name, *(f"{stem}.{fused}" for fused, parts in FUSED.items() if part in parts and fused in self.match)]
        return any(re.search(self.match, layer) for layer in names)


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """How weights are quantized.

    Attributes:
        slug: Its name, and the arm's.
        method: How codes are found.
        grid: The grid of every layer that no rule matches. For nf4 and int8 only its bits count.
        backend: Who quantizes.
        form: What the files are.
        desc_act: GPTQ's activation order: columns in the order of their Hessian diagonal. Slower kernels.
        rules: Other grids for some layers (compressed-tensors only: what loads in plain transformers).
        kv_scales: FP8 scales of the KV cache are calibrated and written, too (llm-compressor only).
    """

    slug: str
    method: Method
    grid: Grid
    backend: Backend
    form: Form
    desc_act: bool = False
    rules: tuple[Rule, ...] = ()
    kv_scales: bool = False

    @property
    def bits(self) -> int:
        """Bits per weight, where no rule says otherwise."""
        return self.grid.bits

    @property
    def group_size(self) -> int:
        """Inputs per scale, where no rule says otherwise; -1: per channel."""
        return self.grid.group_size

    @property
    def grids(self) -> tuple[Grid, ...]:
        """Its own grid, then those of its rules, each once."""
        return tuple(dict.fromkeys((self.grid, *(rule.grid for rule in self.rules if rule.grid))))

    @property
    def needs_calibration(self) -> bool:
        """False for what looks at no data: rounding to nearest, nf4, int8."""
        return self.method in ("gptq", "awq") or self.kv_scales

    def grid_of(self, name: str) -> Grid | None:
        """The grid of the layer of this full name; None where it stays in bf16."""
        return next((rule.grid for rule in self.rules if rule.covers(parts_of(name)[0])), self.grid)

    def params(self) -> dict[str, Any]:
        """What decides the bytes: the scheme's part of the step's identity."""
        return {
            "method": self.method,
            "backend": self.backend,
            "form": self.form,
            **self.grid._asdict(),
            "desc_act": self.desc_act,
            "rules": [{"match": rule.match, "grid": rule.grid and rule.grid._asdict()} for rule in self.rules],
            "kv_scales": self.kv_scales,
        }

    @classmethod
    def of(cls, params: dict[str, Any], *, slug: str) -> Scheme:
        """The scheme that `params()` came from."""
        rules = (Rule(rule["match"], rule["grid"] and Grid(**rule["grid"])) for rule in params["rules"])
        return cls(
            slug=slug,
            method=params["method"],
            grid=Grid(params["bits"], params["group_size"], params["symmetric"]),
            backend=params["backend"],
            form=params["form"],
            desc_act=params["desc_act"],
            rules=tuple(rules),
            kv_scales=params["kv_scales"],
        )

    def check(self, shapes: Sequence[Linear]) -> list[Problem]:
        """Problems of this scheme on a model with these layers; `where` is the slug."""
        problems: list[Problem] = []
        if cut := self._ungrouped(shapes):
            problems.append(self._group_problem(cut, shapes))
        if unpackable := self._unpackable(shapes):
            problems.append(self._pack_problem(unpackable, shapes))
        if part_words := self._part_words(shapes):
            problems.append(self._word_problem(part_words, shapes))
        if split := self._split(shapes):
            problems.append(self._fused_problem(split))
        return problems

    def fits(self, shapes: Sequence[Linear]) -> bool:
        """True where every layer can be quantized by this scheme."""
        unpackable = self._unpackable(shapes) or self._part_words(shapes)
        return not (self._ungrouped(shapes) or unpackable or self._split(shapes))

    def _ungrouped(self, shapes: Iterable[Linear]) -> list[Linear]:
        if self.form == "bitsandbytes":
            return []
        return [layer for layer in shapes if (grid := self.grid_of(layer.name)) and _cut_short(layer, grid)]

    def _unpackable(self, shapes: Iterable[Linear]) -> list[Linear]:
        return [layer for layer in shapes if layer.out_features % self.packed_outputs]

    def _part_words(self, shapes: Iterable[Linear]) -> list[Linear]:
        """Layers whose codes end within a word; only per channel, since groups are whole words."""
        if self.form != "gptq" or self.group_size != PER_CHANNEL:
            return []
        return [layer for layer in shapes if layer.in_features % PACKED_INPUTS[self.bits]]

    @property
    def packed_outputs(self) -> int:
        """Outputs of a layer have to be a multiple of this."""
        if self.form in ("compressed-tensors", "bitsandbytes"):
            return 1
        return AWQ_OUTPUTS if self.method == "awq" else PACKED_OUTPUTS[self.bits]

    def _group_problem(self, bad: Sequence[Linear], shapes: Sequence[Linear]) -> Problem:
        legal = legal_group_sizes(shapes)
        whole = self._per_channel(shapes)
        remedy = f"write {whole}, one scale per output." if whole else "write nf4 or int8."
        none = f"None of {listed(GROUP_SIZES)} divides every layer of this base: {remedy}"
        return Problem(
            what=f"The group size {self._groups(bad)} of {self.slug} does not divide {collapsed(bad)}.",
            where=self.slug,
            why="A scale belongs to one whole group of inputs; no kernel reads a group that is cut short.",
            next=self._regrouped(legal[-1]) if legal else none,
        )

    def _groups(self, layers: Iterable[Linear]) -> str:
        return listed(sorted({grid.group_size for layer in layers if (grid := self.grid_of(layer.name))}))

    def _regrouped(self, group: int) -> str:
        if self.rules:
            return f"Write group_size {group} there: it is the largest legal group here."
        slug = spelled(self.form, self.method, self.grid._replace(group_size=group), desc_act=self.desc_act)
        return f"Write {slug}: {group} is the largest legal group here."

    def _pack_problem(self, bad: Sequence[Linear], shapes: Sequence[Linear]) -> Problem:
        group = max(legal_group_sizes(shapes), default=PER_CHANNEL)
        method: Method = "gptq" if self.method == "awq" else self.method
        legal = [
            spelled("gptq", method, Grid(bits, group, True))
            for bits, outputs in PACKED_OUTPUTS.items()
            if all(layer.out_features % outputs == 0 for layer in shapes)
            and (group != PER_CHANNEL or all(layer.in_features % PACKED_INPUTS[bits] == 0 for layer in shapes))
        ]
        return Problem(
            what=f"{self.slug} cannot pack {collapsed(bad, outputs=True)}.",
            where=self.slug,
            why=f"It takes the outputs of a layer {self.packed_outputs} at a time, for packing and for its kernels.",
            next=f"Legal here: {', '.join(legal)}."
            if legal
            else "Choose another base: no scheme is legal on this one.",
        )

    def _word_problem(self, bad: Sequence[Linear], shapes: Sequence[Linear]) -> Problem:
        near = self._per_channel(shapes)
        return Problem(
            what=f"{self.slug} cannot pack {collapsed(bad)}.",
            where=self.slug,
            why=f"The {self.bits}-bit codes of an output fill whole 32-bit words: {PACKED_INPUTS[self.bits]} inputs at "
            "a time.",
            next=f"Write {near}: its codes fill whole words here."
            if near
            else "Write nf4 or int8: GPTQ's packing takes no bits on this base.",
        )

    def _per_channel(self, shapes: Sequence[Linear]) -> str | None:
        """Slug of the scheme with one scale per output that fits here, at the nearest bits; for AWQ a GPTQ scheme."""
        form: Form = "gptq" if self.form == "awq" else self.form
        method: Method = "gptq" if self.method == "awq" else self.method
        for bits in sorted(PACKED_INPUTS, key=lambda bits: (abs(bits - self.bits), -bits)):
            grid = self.grid._replace(bits=bits, group_size=PER_CHANNEL)
            if replace(self, form=form, method=method, grid=grid, rules=()).fits(shapes):
                return spelled(form, method, grid, desc_act=self.desc_act)
        return None

    def _fused_problem(self, split: Sequence[str]) -> Problem:
        """Servers fuse q, k, v into one weight and gate, up into another: one grid each (vllm#50214)."""
        return Problem(
            what=f"The rules of {self.slug} give {', '.join(split)} different grids.",
            where=self.slug,
            why="Servers load these as one fused weight (qkv_proj, gate_up_proj), which has one grid.",
            next="Let one rule match all of them, for example `self_attn` or `(gate|up)_proj`.",
        )

    def _split(self, shapes: Iterable[Linear]) -> list[str]:
        grids: dict[tuple[str, tuple[str, ...]], set[Grid | None]] = {}
        for layer in shapes if self.rules else ():
            for name in parts_of(layer.name):
                stem, _, part = name.rpartition(".")
                for parts in FUSED.values():
                    if part in parts:
                        grids.setdefault((Linear(f"{stem}.", 0, 0).family, parts), set()).add(self.grid_of(name))
        return [f"{stem}{'/'.join(parts)}" for (stem, parts), own in grids.items() if len(own) > 1]

    def predicted_bytes(self, shapes: Iterable[Linear]) -> int:
        """Bytes of the quantized layers on disk: codes, fp16 scales, zero points and the int32 g_idx of GPTQ files."""
        total = 0
        for layer in shapes:
            grid = self.grid_of(layer.name)
            size = layer.weights
            if grid is None:
                total += 2 * size
            elif self.form == "bitsandbytes":  # nf4: an 8-bit absmax per 64 weights; int8: an fp32 scale per output
                total += size * 4 // 8 + size // 64 if self.method == "nf4" else size + 4 * layer.out_features
            else:
                total += self._grid_bytes(layer, grid)
        return total

    def _grid_bytes(self, layer: Linear, grid: Grid) -> int:
        groups = 1 if grid.group_size == PER_CHANNEL else -(-layer.in_features // grid.group_size)
        points = 0 if self.form == "compressed-tensors" and grid.symmetric else grid.bits
        total = layer.weights * grid.bits // 8
        total += groups * layer.out_features * (16 + points) // 8
        return total + (4 * layer.in_features if self.form == "gptq" else 0)


def parts_of(name: str) -> tuple[str, ...]:
    """The layers that a fused one (qkv_proj) stands for, which need one grid; any other layer itself."""
    stem, _, part = name.rpartition(".")
    return tuple(f"{stem}.{own}" for own in FUSED[part]) if part in FUSED else (name,)


def _cut_short(layer: Linear, grid: Grid) -> bool:
    return grid.group_size != PER_CHANNEL and layer.in_features % grid.group_size != 0


def spelled(form: Form, method: Method, grid: Grid, *, desc_act: bool = False) -> str:
    """The slug of a scheme without rules, backend or KV scales."""
    if form == "bitsandbytes":
        return method
    family = f"ct-{method}" if form == "compressed-tensors" else method
    group = "" if grid.group_size == PER_CHANNEL else f"-g{grid.group_size}"
    asymmetric = "-asym" if not grid.symmetric and method != "awq" else ""  # AWQ has zero points always
    return f"{family}-w{grid.bits}{group}{asymmetric}{'-actorder' if desc_act else ''}"


def legal_group_sizes(shapes: Iterable[Linear]) -> tuple[int, ...]:
    """Group sizes that divide the inputs of every layer, ascending."""
    inputs = {layer.in_features for layer in shapes}
    return tuple(group for group in GROUP_SIZES if all(size % group == 0 for size in inputs))


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


def listed(numbers: Iterable[int], word: str = "and") -> str:
    """`2, 3 and 4`."""
    words = [str(number) for number in numbers]
    return f" {word} ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else words[0]
