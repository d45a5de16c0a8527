"""What an engine does not serve, with the nearest scheme that it does: by the table of engines, by shapes and heads."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from math import lcm
from typing import NamedTuple

from recipes.problem import Problem
from recipes.schemes.ranks import SIZES, Part, ServedModel, parts, shown, up_to
from recipes.schemes.reads import NAMES, READS, VLLM, Engine, rows_for
from recipes.schemes.scheme import PER_CHANNEL, Grid, Scheme, collapsed, listed, spelled
from recipes.schemes.slugs import known_schemes

TILES = ((64, 128), (128, 64))  # outputs and inputs of a rank's layer: Marlin's two tiles (marlin_padded_nk)
EXPERT_INPUTS = (
    128  # Marlin's kernel for experts pads every width but the model's own (check_moe_marlin_supports_config)
)
CPU_TILE = 32  # inputs and outputs of a rank's layer (CPUWNA16LinearKernel.can_implement)
CPU_BITS = 4
CPU_SOURCE = f"vLLM {VLLM}, kernels/linear/mixed_precision/cpu.py"


class _Reason(NamedTuple):
    """Why an engine refuses; `remedy` where another scheme is no help."""

    what: str
    why: str
    remedy: str = ""


def loaders(scheme: Scheme) -> tuple[Engine, ...]:
    """Who reads this scheme's files, whatever the model's shapes: what a reload test has to try."""
    return tuple(engine for engine in NAMES if not any(_by_format(scheme, engine)))


def refusals(scheme: Scheme | None, model: ServedModel, *, engine: Engine, tensor_parallel: int = 1) -> list[Problem]:
    """Why this engine does not serve this scheme on this model; `where` is the slug.

    Args:
        scheme: The scheme; None for the model as it is, in bf16.
        model: Its layers and heads.
        engine: Who is to serve.
        tensor_parallel: Ranks that a layer is split over.
    """
    if scheme is None:
        reasons = list(_unsplit(model, tensor_parallel)) if engine == "vllm" else []
        return [Problem(what=one.what, where="serve.tensor_parallel", why=one.why, next=one.remedy) for one in reasons]
    reasons = _reasons(scheme, model, engine, tensor_parallel)
    if not reasons:
        return []
    near = _nearest(scheme, model, engine, tensor_parallel)
    instead = f"Write {near}: {NAMES[engine]} reads it." if near else "No scheme is known that it reads on this model."
    return [
        Problem(what=reason.what, where=scheme.slug, why=reason.why, next=reason.remedy or instead)
        for reason in reasons
    ]


def cautions(scheme: Scheme, model: ServedModel, *, engine: Engine, tensor_parallel: int = 1) -> list[Problem]:
    """What this engine serves by a slower kernel only."""
    if engine != "vllm" or scheme.form == "bitsandbytes" or _reasons(scheme, model, engine, tensor_parallel):
        return []
    odd = [part for part in parts(scheme, model, tensor_parallel) if part.bits in (4, 8) and _off_tile(part)]
    if not odd:
        return []
    outputs, inputs = TILES[0]
    return [
        Problem(
            what=f"Marlin, vLLM's kernel for {scheme.slug}, has no tile for {shown(odd)}.",
            where=scheme.slug,
            why=f"A rank's layer wants outputs by {outputs} and inputs by {inputs}, or the reverse. vLLM {VLLM} pads "
            "others at every step, or takes another kernel (vllm#45295), which is slower; versions before July 2026 "
            "refuse them.",
            next="Split it over fewer ranks if speed matters.",
        )
    ]


def parallel_sizes(scheme: Scheme | None, model: ServedModel, *, engine: Engine) -> tuple[int, ...]:
    """Usual numbers of ranks over which the engine can split the model; unquantized where scheme is None."""
    if scheme is None:
        return tuple(size for size in SIZES if model.splits(size))
    return tuple(size for size in SIZES if not _reasons(scheme, model, engine, size))


def cpu_refusals(
    scheme: Scheme | None, model: ServedModel, *, avx512: bool, amx: bool = False, tensor_parallel: int = 1
) -> list[Problem]:
    """Why vLLM does not serve this scheme on an x86 CPU, beside what `refusals` says; `where` is the slug.

    Args:
        scheme: The scheme; None for the model as it is, which every CPU with AVX2 serves.
        model: Its layers and heads.
        avx512: The CPU has AVX-512.
        amx: It has AMX tiles: what the kernel for quantized experts needs.
        tensor_parallel: Ranks that a layer is split over.
    """
    if scheme is None:
        return []
    return [
        Problem(what=reason.what, where=scheme.slug, why=reason.why, next=reason.remedy)
        for reason in _on_cpu(scheme, model, avx512, amx, tensor_parallel)
    ]


# ---- reasons


def _reasons(scheme: Scheme, model: ServedModel, engine: Engine, tensor_parallel: int) -> list[_Reason]:
    reasons = list(_by_format(scheme, engine))
    if not reasons and any(part.of_experts for part in parts(scheme, model, 1)):
        reasons += _of_experts(scheme, model, engine)
    if not reasons and engine == "vllm":
        reasons += _vllm_shapes(scheme, model, tensor_parallel)
    if not reasons and engine == "onnxruntime-genai":
        reasons += _onnx_shapes(scheme, model, tensor_parallel)
    return reasons


def _by_format(scheme: Scheme, engine: Engine) -> Iterator[_Reason]:
    rows, name = rows_for(engine, scheme.form), NAMES[engine]
    if not rows:
        other = ", ".join(f"{row.form} of {row} ({row.source})" for row in READS if row.engine == engine)
        yield _Reason(f"{name} does not read {scheme.slug}.", f"Of the formats here it reads {other}.")
        return
    known = (
        f"{name} {rows[0].version} reads of {scheme.form} files {'; '.join(map(str, rows))} "
        f"({', '.join(dict.fromkeys(row.source for row in rows))})."
    )
    for grid in scheme.grids:
        able = [row for row in rows if row.takes(grid)]
        if not able:
            points = "" if grid.symmetric else " with zero points"
            yield _Reason(f"{name} does not read the {grid.bits}-bit weights{points} of {scheme.slug}.", known)
        elif scheme.desc_act and not any(row.takes_order(grid) for row in able):
            why = f"{name} {able[0].version} raises on desc_act=True in files with groups ({able[0].source})."
            yield _Reason(f"{name} does not read the activation order of {scheme.slug}.", why)


def _of_experts(scheme: Scheme, model: ServedModel, engine: Engine) -> Iterator[_Reason]:
    held = [part for part in parts(scheme, model, 1) if part.of_experts]
    for grid in dict.fromkeys(grid for part in held if (grid := scheme.grid_of(part.layer.name)) is not None):
        rows = [row for row in rows_for(engine, scheme.form) if row.takes(grid)]
        if any(row.takes_experts(grid) for row in rows):
            continue
        experts = [part.layer for part in held]
        groups = ", and only in groups of inputs" if any(row.experts == "groups" for row in rows) else ""
        yield _Reason(
            f"{NAMES[engine]} does not read {scheme.slug} in experts: {collapsed(experts)}.",
            f"Its kernels for experts do not take these weights{groups or ' at all'} ({rows[0].source}).",
        )


def padded(part: Part) -> tuple[int, int]:
    """Outputs and inputs of a rank's fused layer, padded to the cheaper of Marlin's tiles (marlin_padded_nk)."""
    group = max(part.group, 1)  # the inputs stay whole groups
    tiled = [(up_to(part.outputs, outputs), up_to(part.inputs, lcm(inputs, group))) for outputs, inputs in TILES]
    return min(tiled, key=lambda size: (size[0] * size[1], sum(size)))


def _off_tile(part: Part) -> bool:
    if part.of_experts:
        return _no_expert_tile(part) or part.inputs % TILES[1][1] != 0
    return padded(part) != (part.outputs, part.inputs)


def _unsplit(model: ServedModel, ranks: int) -> Iterator[_Reason]:
    """Heads, then layers, that do not come apart into so many ranks."""
    if model.splits(ranks):
        return
    legal = [size for size in SIZES if size < ranks and model.splits(size)]
    remedy = f"Set serve.tensor_parallel to {listed(legal, 'or')}."
    if heads := model.undivided(ranks):
        why = f"A rank holds whole heads of attention (vLLM {VLLM}, config/model.py and layers/linear.py)."
        yield _Reason(f"{ranks} ranks do not divide {heads}.", why, remedy)
    else:
        why = "Each rank holds the same share of every layer."
        yield _Reason(f"{ranks} ranks do not divide {collapsed(model.unsplit_layers(ranks))}.", why, remedy)


def _vllm_shapes(scheme: Scheme, model: ServedModel, ranks: int) -> Iterator[_Reason]:
    if scheme.form == "bitsandbytes":
        if ranks > 1:
            yield _Reason(
                f"vLLM does not split {scheme.slug} over {ranks} ranks.",
                "The state of a quantized bitsandbytes weight cannot be cut (vllm#8434, vllm-bnb-plugin).",
                "Set serve.tensor_parallel to 1, or write gptq-w4-g128.",
            )
        return
    if unsplit := list(_unsplit(model, ranks)):
        yield from unsplit
        return
    held = list(parts(scheme, model, ranks))
    if cut := [part for part in held if part.group != PER_CHANNEL and part.inputs % part.group]:
        where = f" over {ranks} ranks" if ranks > 1 else ""
        yield _Reason(
            f"A group of {scheme.slug} is cut apart{where} in {shown(cut)}.",
            "A rank needs whole groups of inputs; padding cannot mend it (vllm#45295).",
        )
    narrow = [part for part in held if part.of_experts and _no_expert_tile(part)]
    if narrow and scheme.form == "compressed-tensors" and any(part.group == PER_CHANNEL for part in narrow):
        yield _Reason(
            f"vLLM has no kernel for {scheme.slug} in {shown(narrow)}.",
            f"Marlin takes experts of a model whose width is a multiple of {EXPERT_INPUTS}, and other kernels take "
            f"groups alone (vLLM {VLLM}, compressed_tensors_moe_wna16.py).",
        )


def _onnx_shapes(scheme: Scheme, model: ServedModel, ranks: int) -> Iterator[_Reason]:
    if ranks > 1:
        yield _Reason(
            f"ONNX Runtime GenAI does not split a model over {ranks} ranks.",
            "It runs in one process, here on the CPU.",
            "Set serve.tensor_parallel to 1.",
        )
    held = list(parts(scheme, model, 1))
    if odd := [part for part in held if not _onnx_block(part)]:
        yield _Reason(
            f"ONNX Runtime has no kernel for the groups of {scheme.slug} in {shown(odd)}.",
            "MatMulNBits takes groups of 16, 32, 64 and so on, which divide the inputs; one scale per output is a "
            "group of all inputs (onnxruntime 1.32.0, matmul_nbits.cc; tried).",
        )


def _onnx_block(part: Part) -> bool:
    """The group is a power of two from 16 on, and the inputs are whole groups."""
    block = part.inputs if part.group == PER_CHANNEL else part.group
    return block >= 16 and block & (block - 1) == 0 and part.inputs % block == 0


def _no_expert_tile(part: Part) -> bool:
    """The width of the model, which is the inputs of gate and up and the outputs of down, is never padded."""
    width = part.layer.out_features if part.layer.name.endswith(("down_proj", "w2")) else part.inputs
    return width % EXPERT_INPUTS != 0


# ---- on a CPU


def _on_cpu(scheme: Scheme, model: ServedModel, avx512: bool, amx: bool, ranks: int) -> Iterator[_Reason]:
    wide = [grid for grid in scheme.grids if not _cpu_takes(scheme, grid)]
    if wide:
        yield _Reason(
            f"vLLM does not serve {scheme.slug} on a CPU.",
            f"Its kernel there multiplies by {CPU_BITS}-bit weights alone: AWQ, and GPTQ or compressed-tensors "
            f"({CPU_SOURCE}).",
            "Serve it on a GPU, or write gptq-w4-g128.",
        )
        return
    if not avx512:
        yield _Reason(
            f"vLLM does not serve {scheme.slug} on this CPU.",
            "Its 4-bit kernel is built for AVX-512 alone: without, the file loads and the first request ends in "
            "\"no attribute 'cpu_gemm_wna16'\" (tried: 0.32.0).",
            "Serve it on a machine whose /proc/cpuinfo lists avx512f, or serve the merged arm in bf16.",
        )
    held = list(parts(scheme, model, ranks))
    if odd := [part for part in held if not part.of_experts and (part.inputs % CPU_TILE or part.outputs % CPU_TILE)]:
        yield _Reason(
            f"vLLM's kernel for CPUs does not take {shown(odd)}.",
            f"It wants inputs and outputs of a rank's layer by {CPU_TILE} ({CPU_SOURCE}).",
            "Serve it on a GPU, or serve the merged arm in bf16.",
        )
    experts = [part.layer for part in held if part.of_experts]
    if experts and not (amx and _cpu_takes_experts(scheme)):
        yield _Reason(
            f"vLLM's kernels for CPUs do not take the experts of {scheme.slug}: {collapsed(experts)}.",
            f"They want AMX, and 4 bits as gptq, awq or ct without zero points in groups of 64 or more (vLLM {VLLM}, "
            "fused_moe/experts/cpu_moe.py).",
            "Serve it on a GPU, or serve the merged arm in bf16.",
        )


def _cpu_takes(scheme: Scheme, grid: Grid) -> bool:
    return scheme.form != "bitsandbytes" and grid.bits == CPU_BITS


def _cpu_takes_experts(scheme: Scheme) -> bool:
    """compressed-tensors names groups of 32 and zero points by other keys, which the kernel does not know."""
    if scheme.form != "compressed-tensors":
        return True
    return all(grid.symmetric and grid.group_size not in (PER_CHANNEL, 32) for grid in scheme.grids)


# ---- the nearest scheme


@cache
def _candidates() -> tuple[Scheme, ...]:
    plain = known_schemes()
    return (*plain, *(_asymmetric(scheme) for scheme in plain if scheme.method == "gptq" and not scheme.rules))


def _asymmetric(scheme: Scheme) -> Scheme:
    grid = scheme.grid._replace(symmetric=False)
    return replace(scheme, grid=grid, slug=spelled(scheme.form, scheme.method, grid))


def _nearest(scheme: Scheme, model: ServedModel, engine: Engine, ranks: int) -> str | None:
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
        if other.fits(model.linears) and not _reasons(other, model, engine, ranks):
            return other.slug
    return None
