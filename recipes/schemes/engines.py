"""Who reads what: format, bits, symmetry, activation order, shapes and tensor parallelism -> engine, with sources.

`vllm#38288, #45051` are pull requests or issues of that project. What no row says is unknown, and is treated like a
refusal: an artifact is recommended only where somebody has shown that it loads.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cache
from typing import Literal, NamedTuple

from recipes.models.linear import Linear
from recipes.problem import Problem
from recipes.schemes.scheme import FUSED, PER_CHANNEL, Form, Grid, Scheme, collapsed, listed, spelled
from recipes.schemes.slugs import known_schemes

Engine = Literal["transformers", "vllm", "exllamav2", "auto-gptq", "autoawq"]
NAMES: dict[Engine, str] = {
    "transformers": "transformers",
    "vllm": "vLLM",
    "exllamav2": "ExLlamaV2",
    "auto-gptq": "AutoGPTQ",
    "autoawq": "AutoAWQ",
}
# vLLM splits the inputs of these over its ranks, and the outputs of all others (RowParallelLinear in its models).
ROW_PARALLEL = ("o_proj", "down_proj", "out_proj", "c_proj", "dense", "dense_4h_to_h", "fc2", "w2", "wo")
REPEATED = ("k_proj", "v_proj")  # it repeats key-value heads where there are fewer of them than ranks
TILE_OUTPUTS, TILE_INPUTS = 64, 128  # Marlin's tile of a layer as one rank has it
SIZES = (1, 2, 4, 8)  # ranks that a server usually has


class Reads(NamedTuple):
    """One thing that an engine reads.

    Attributes:
        engine: Who reads.
        form: The file format.
        bits: Bits per weight.
        zero_points: `no`, `yes` (only with them) or `both`.
        activation_order: Reads GPTQ's -actorder, too.
        since: From which version on this holds.
        needs: What has to be installed beside the engine.
        source: Where that stands.
    """

    engine: Engine
    form: Form
    bits: tuple[int, ...]
    zero_points: Literal["no", "yes", "both"]
    activation_order: bool
    since: str
    needs: str
    source: str

    def takes(self, grid: Grid) -> bool:
        """True where it reads weights on this grid."""
        return grid.bits in self.bits and self.zero_points in ("both", "no" if grid.symmetric else "yes")

    def __str__(self) -> str:
        points = {"no": " without zero points", "yes": " with zero points", "both": ""}[self.zero_points]
        return f"{listed(self.bits)} bits{points}"


READS = (
    Reads("transformers", "gptq", (2, 3, 4, 8), "both", True, "5.23", "gptqmodel, optimum", "every run reloads it"),
    Reads("transformers", "awq", (4,), "yes", False, "5.23", "gptqmodel, optimum", "every run reloads it"),
    Reads("transformers", "compressed-tensors", (3, 4, 8), "no", False, "5.23", "compressed-tensors", "tried: 0.20.0"),
    Reads(
        "transformers",
        "compressed-tensors",
        (3, 4, 8),
        "yes",
        False,
        "5.23",
        "compressed-tensors; CompressedTensorsConfig(dequantize=True), and one grid for all layers",
        "tried: 0.20.0, which raises without it",
    ),
    Reads("transformers", "bitsandbytes", (4, 8), "no", False, "5.23", "bitsandbytes", "every run reloads it"),
    Reads("vllm", "gptq", (4, 8), "no", True, "mid-2026; older versions read more", "", "vllm#38288, #45051"),
    Reads("vllm", "awq", (4,), "yes", False, "0.5.3 or before", "", "vLLM's documentation of 0.5.3"),
    Reads("vllm", "compressed-tensors", (4, 8), "no", False, "mid-2024", "", "vllm#5385"),
    Reads("vllm", "compressed-tensors", (4,), "yes", False, "0.19 or before", "", "vllm#39980, vllm#45295"),
    Reads(
        "vllm",
        "compressed-tensors",
        (3,),
        "both",
        False,
        "August 2026",
        "humming-kernels",
        "llm-compressor#3102, compressed-tensors#719",
    ),
    Reads("vllm", "bitsandbytes", (4, 8), "no", False, "mid-2024", "vllm-bnb-plugin from 0.28 on", "vllm#5753, #43529"),
    Reads("exllamav2", "gptq", (4,), "both", True, "archived", "", "exllamav2#35, #563"),
    Reads(
        "auto-gptq",
        "gptq",
        (2, 3, 4, 8),
        "both",
        True,
        "0.7.1, archived",
        "its environment; lm_head.weight in the file where embeddings are tied",
        "tried: 0.7.1",
    ),
    Reads("autoawq", "awq", (4,), "yes", False, "0.2.9, archived", "its environment", "tried: 0.2.9"),
)


class _Reason(NamedTuple):
    """Why an engine refuses; `remedy` where another scheme is no help."""

    what: str
    why: str
    remedy: str = ""


def loaders(scheme: Scheme) -> tuple[Engine, ...]:
    """Who reads this scheme's files, whatever the model's shapes: what a reload test has to try."""
    return tuple(engine for engine in NAMES if not any(_by_format(scheme, engine)))


def rows_of(scheme: Scheme, engine: Engine) -> tuple[Reads, ...]:
    """The rows by which an engine reads a scheme."""
    grids = _grids(scheme)
    return tuple(row for row in READS if (row.engine, row.form) == (engine, scheme.form) and any(map(row.takes, grids)))


def refusals(scheme: Scheme, linears: Sequence[Linear], engine: Engine, tensor_parallel: int = 1) -> list[Problem]:
    """Why this engine does not serve this scheme on a model with these layers; `where` is the slug.

    Args:
        scheme: The scheme.
        linears: The model's linear layers.
        engine: Who is to serve.
        tensor_parallel: Ranks that a layer is split over.
    """
    near = _nearest(scheme, linears, engine, tensor_parallel)
    instead = f"Write {near}: {NAMES[engine]} reads it." if near else "No scheme is known that it reads on this model."
    return [
        Problem(what=reason.what, where=scheme.slug, why=reason.why, next=reason.remedy or instead)
        for reason in _reasons(scheme, linears, engine, tensor_parallel)
    ]


def cautions(scheme: Scheme, linears: Sequence[Linear], engine: Engine, tensor_parallel: int = 1) -> list[Problem]:
    """What this engine serves in some versions only, or by a slower kernel."""
    if engine != "vllm" or scheme.form == "bitsandbytes" or _reasons(scheme, linears, engine, tensor_parallel):
        return []
    odd = [part for part in _parts(scheme, linears, tensor_parallel) if part.bits in (4, 8) and _off_tile(part)]
    if not odd:
        return []
    return [
        Problem(
            what=f"Marlin, vLLM's kernel for {scheme.slug}, has no tile for {_shown(odd)}.",
            where=scheme.slug,
            why=f"A rank's layer wants outputs by {TILE_OUTPUTS} and inputs by {TILE_INPUTS}. vLLM pads others since "
            "June 2026 (vllm#45295); before, it refuses them or takes a slower kernel.",
            next="Serve it with a vLLM of July 2026 or later, or split it over fewer ranks.",
        )
    ]


def parallel_sizes(scheme: Scheme | None, linears: Sequence[Linear], engine: Engine) -> tuple[int, ...]:
    """Usual numbers of ranks over which the engine can split the model; unquantized where scheme is None."""
    if scheme is None:
        return tuple(size for size in SIZES if not any(_undivided(linears, size)))
    return tuple(size for size in SIZES if not _reasons(scheme, linears, engine, size))


# ---- reasons


def _reasons(scheme: Scheme, linears: Sequence[Linear], engine: Engine, tensor_parallel: int) -> list[_Reason]:
    reasons = list(_by_format(scheme, engine))
    return reasons or (list(_vllm_shapes(scheme, linears, tensor_parallel)) if engine == "vllm" else [])


def _grids(scheme: Scheme) -> set[Grid]:
    return {scheme.grid, *(rule.grid for rule in scheme.rules if rule.grid)}


def _by_format(scheme: Scheme, engine: Engine) -> Iterator[_Reason]:
    rows = [row for row in READS if row.engine == engine and row.form == scheme.form]
    name = NAMES[engine]
    if not rows:
        other = ", ".join(f"{row.form} of {row} ({row.source})" for row in READS if row.engine == engine)
        yield _Reason(f"{name} does not read {scheme.slug}.", f"Of the formats here it reads {other}.")
        return
    known = f"Of {scheme.form} files it reads {'; '.join(map(str, rows))} ({', '.join(row.source for row in rows)})."
    for grid in _grids(scheme):
        if not any(row.takes(grid) for row in rows):
            points = "" if grid.symmetric else " with zero points"
            yield _Reason(f"{name} does not read the {grid.bits}-bit weights{points} of {scheme.slug}.", known)
    if scheme.desc_act and not any(row.activation_order for row in rows):
        yield _Reason(f"{name} does not read the activation order of {scheme.slug}.", known)


class _Part(NamedTuple):
    """A layer, or several that are fused, as one rank has it."""

    layer: Linear
    inputs: int
    outputs: int
    bits: int
    group: int


def _parts(scheme: Scheme, linears: Iterable[Linear], ranks: int) -> Iterator[_Part]:
    """Every quantized layer with what a rank holds of it; q, k, v and gate, up count together, as they are fused."""
    fused: dict[tuple[str, tuple[str, ...]], int] = {}
    for layer in linears:
        fused[_fused(layer)] = fused.get(_fused(layer), 0) + layer.out_features
    for layer in linears:
        grid = scheme.grid_of(layer.name)
        if grid is None:
            continue
        together = fused[_fused(layer)]
        if _is_row_parallel(layer):
            yield _Part(layer, layer.in_features // ranks, together, grid.bits, grid.group_size)
        else:
            yield _Part(layer, layer.in_features, together // ranks, grid.bits, grid.group_size)


def _fused(layer: Linear) -> tuple[str, tuple[str, ...]]:
    stem, _, part = layer.name.rpartition(".")
    return stem, next((parts for parts in FUSED.values() if part in parts), (part,))


def _is_row_parallel(layer: Linear) -> bool:
    return layer.name.rpartition(".")[2] in ROW_PARALLEL


def _off_tile(part: _Part) -> bool:
    return bool(part.outputs % TILE_OUTPUTS or part.inputs % TILE_INPUTS)


def _undivided(linears: Iterable[Linear], ranks: int) -> Iterator[Linear]:
    """Layers that do not come apart into so many ranks."""
    for layer in linears:
        split = layer.in_features if _is_row_parallel(layer) else layer.out_features
        if split % ranks and not layer.name.endswith(REPEATED):
            yield layer


def _vllm_shapes(scheme: Scheme, linears: Sequence[Linear], ranks: int) -> Iterator[_Reason]:
    if scheme.form == "bitsandbytes":
        if ranks > 1:
            yield _Reason(
                f"vLLM does not split {scheme.slug} over {ranks} ranks.",
                "The state of a quantized bitsandbytes weight cannot be cut (vllm#8434, vllm-bnb-plugin).",
                "Set serve.tensor_parallel to 1, or write gptq-w4-g128.",
            )
        return
    if whole := list(_undivided(linears, ranks)):
        legal = max(size for size in range(1, ranks) if not any(_undivided(linears, size)))
        why = "Each rank holds the same share of every layer."
        yield _Reason(
            f"{ranks} ranks do not divide {collapsed(whole)}.", why, f"Set serve.tensor_parallel to {legal} or less."
        )
        return
    parts = list(_parts(scheme, linears, ranks))
    cut = [part for part in parts if part.group != PER_CHANNEL and part.inputs % part.group]
    if cut:
        where = f" over {ranks} ranks" if ranks > 1 else ""
        yield _Reason(
            f"A group of {scheme.slug} is cut apart{where} in {_shown(cut)}.",
            "A rank needs whole groups of inputs; padding cannot mend it (vllm#45295).",
        )
    if scheme.desc_act and (odd := [part for part in parts if part.group != PER_CHANNEL and _off_tile(part)]):
        yield _Reason(
            f"Marlin has no tile for {_shown(odd)} in activation order.",
            f"It wants outputs by {TILE_OUTPUTS} and inputs by {TILE_INPUTS}, and pads no layer whose inputs are "
            "reordered (vllm#45295).",
        )
    experts = [part.layer for part in parts if ".experts." in part.layer.name]
    if experts and scheme.form == "compressed-tensors" and not scheme.grid.symmetric:
        yield _Reason(
            f"vLLM does not read zero points of experts: {collapsed(experts)}.",
            "Its kernels for experts in this format are symmetric (vllm#39980).",
        )


def _shown(parts: Iterable[_Part]) -> str:
    """By family: `model.layers.*.mlp.down_proj (1376 inputs, 256 outputs a rank, 32 layers)`."""
    families: dict[tuple[str, int, int], int] = {}
    for part in parts:
        key = (part.layer.family, part.inputs, part.outputs)
        families[key] = families.get(key, 0) + 1
    return ", ".join(
        f"{family} ({inputs} inputs, {outputs} outputs a rank, {count} layer{'s' if count > 1 else ''})"
        for (family, inputs, outputs), count in families.items()
    )


# ---- the nearest scheme


@cache
def _candidates() -> tuple[Scheme, ...]:
    plain = known_schemes()
    return (*plain, *(_asymmetric(scheme) for scheme in plain if scheme.method == "gptq" and not scheme.rules))


def _asymmetric(scheme: Scheme) -> Scheme:
    grid = scheme.grid._replace(symmetric=False)
    return replace(scheme, grid=grid, slug=spelled(scheme.form, scheme.method, grid))


def _nearest(scheme: Scheme, linears: Sequence[Linear], engine: Engine, ranks: int) -> str | None:
    """By bits, then zero points, method, format and group; None where the engine reads nothing here."""

    def distance(other: Scheme) -> tuple[float, ...]:
        groups = [float("inf") if size == PER_CHANNEL else size for size in (other.group_size, scheme.group_size)]
        apart = 0.0 if groups[0] == groups[1] else abs(groups[0] - groups[1])
        return (
            abs(other.bits - scheme.bits),
            other.grid.symmetric != scheme.grid.symmetric,
            other.method != scheme.method,
            other.method == "rtn",
            other.form != scheme.form,
            apart,
        )

    for other in sorted(_candidates(), key=distance):
        if other.fits(linears) and not _reasons(other, linears, engine, ranks):
            return other.slug
    return None
