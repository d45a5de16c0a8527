"""`quench schemes`: every scheme, who makes it, who reads it, and whether this machine can make it."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace

from flows.commands.terminal import Output
from recipes.arms import specified
from recipes.checks.serving import scheme_entries
from recipes.models.linear import Linear
from recipes.problem import Problem
from recipes.schema import Recipe
from recipes.schemes.engines import loaders
from recipes.schemes.reads import NAMES, rows_of
from recipes.schemes.scheme import PER_CHANNEL, Backend, Scheme
from recipes.schemes.slugs import FAMILIES, known_schemes
from tasks.quantize import ENVIRONMENTS
from tasks.runtime.process.environments import environment_problem

LAYER = Linear("", 4096, 4096)  # for bits per weight


@dataclass(frozen=True, kw_only=True)
class Listed:
    """A scheme as it is listed.

    Attributes:
        slug: Its name in a recipe.
        backend: Who makes it.
        others: Backends that a recipe may name instead.
        bits: Bits per weight, without scales.
        bits_a_weight: With codes, scales and zero points of a 4096 x 4096 layer.
        group_size: Inputs per scale; -1: all.
        zero_points: The grid is not centred on 0.
        calibration: Reads the calibration set.
        form: File format.
        outputs_by: Outputs of a layer have to be a multiple of this.
        loaders: Engines that read it -> the version that was read or tried, and what has to be installed beside them.
        makeable: This machine can make it.
        command: What has to be typed first; empty where it can.
    """

    slug: str
    backend: Backend
    others: tuple[Backend, ...]
    bits: int
    bits_a_weight: float
    group_size: int
    zero_points: bool
    calibration: bool
    form: str
    outputs_by: int
    loaders: dict[str, str]
    makeable: bool
    command: str

    def as_dict(self) -> dict[str, object]:
        """For --json."""
        return asdict(self)


def command(args: argparse.Namespace) -> Output:
    """List all schemes."""
    schemes = listed_schemes()
    return Output(json=[scheme.as_dict() for scheme in schemes], text=text(schemes))


def listed_schemes() -> list[Listed]:
    """All of them, in the order of the documentation."""
    return [_listed(scheme) for scheme in known_schemes()]


def missing(backend: Backend) -> str:
    """The command that lets this machine quantize by a backend; empty where it can."""
    problem = environment_problem(ENVIRONMENTS.get(backend))
    return problem.next.removeprefix("Run: ") if problem else ""


def not_here(recipe: Recipe) -> Iterator[Problem]:
    """Schemes of a recipe that this machine cannot make yet; `plan` and `run` refuse, unless they are in the store."""
    for field, entry in scheme_entries(recipe):
        if problem := environment_problem(ENVIRONMENTS.get(specified(entry).backend)):
            yield replace(problem, where=field)


def _listed(scheme: Scheme) -> Listed:
    command = missing(scheme.backend)
    return Listed(
        slug=scheme.slug,
        backend=scheme.backend,
        others=next((family.others for name, family in FAMILIES.items() if scheme.slug.startswith(f"{name}-w")), ()),
        bits=scheme.bits,
        bits_a_weight=round(8 * scheme.predicted_bytes([LAYER]) / LAYER.weights, 3),
        group_size=scheme.group_size,
        zero_points=not scheme.grid.symmetric,
        calibration=scheme.needs_calibration,
        form=scheme.form,
        outputs_by=scheme.packed_outputs,
        loaders={engine: _terms(scheme, engine) for engine in loaders(scheme)},
        makeable=not command,
        command=command,
    )


def _terms(scheme: Scheme, engine: str) -> str:
    row = next(row for name in NAMES if name == engine for row in rows_of(scheme, name))
    return f"{row.version}{f', with {row.needs}' if row.needs else ''}"


def text(schemes: Sequence[Listed]) -> str:
    """A table for a terminal of 120 columns or more."""
    rows = [("scheme", "made by", "bits", "group", "read by", "here"), *map(_cells, schemes)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([*lines, "", *_notes()])


SHORT = {"exllamav2": "exl2", "onnxruntime-genai": "onnx"}  # the table has 120 columns


def _cells(row: Listed) -> tuple[str, ...]:
    group = "row" if row.group_size == PER_CHANNEL else str(row.group_size)
    readers = " ".join(SHORT.get(engine, engine) for engine in row.loaders)
    return (row.slug, row.backend, f"{row.bits_a_weight:.3f}", group, readers, row.command or "yes")


def _notes() -> Iterator[str]:
    yield "bits: per weight of a 4096 x 4096 layer, with scales and zero points. group: inputs per scale (row: all)."
    yield "read by: engines that load the files; docs/schemes.md says from which version, with what, and who says so."
    yield "exl2: ExLlamaV2. onnx: ONNX Runtime GenAI, on CPUs."
    yield "here: whether this machine can make it, or what to type first."
    others: dict[Backend, str] = {backend: name for name, family in FAMILIES.items() for backend in family.others}
    for backend, family in others.items():
        yield f"`backend: {backend}` makes {family} schemes, too: {missing(backend) or 'here'}."
    yield "-asym (gptq, ct-gptq) and -actorder (gptq) behind a slug: with zero points, in activation order."
