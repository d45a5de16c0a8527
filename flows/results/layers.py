"""Which layers suffer: the error of each attention and FFN by scheme, and the weights' variance beside it.

Read from the quantize.json of the arms (tasks/jobs/measuring/block_errors.py says how the errors were measured).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from flows.results.read import Run, RunStep

PARTS = ("attention", "FFN")


class Line(NamedTuple):
    """A scheme's errors in one half of the decoder layers.

    Attributes:
        measured: Of outputs on calibration rows; else of the weights alone.
        errors: By layer number.
    """

    slug: str
    measured: bool
    errors: dict[int, float]


def layers_of(run: Run) -> dict[str, Any]:
    """What report.json holds: arm -> kernel at load, tokens that were looked at, and its blocks."""
    layers: dict[str, Any] = {}
    for arm in run.arms:
        step = run.step(arm.model) if arm.scheme else None
        path = step.files / "quantize.json" if step is not None and step.files else None
        record = json.loads(path.read_text(encoding="utf-8")) if path is not None and path.exists() else {}
        if record.get("blocks") or "no_errors" in record:
            names = ("kernel", "error_tokens", "stream_max", "blocks")
            layers[arm.slug] = {name: record.get(name) for name in names}
            if "no_errors" in record:
                layers[arm.slug]["no_errors"] = record["no_errors"]
            layers[arm.slug]["kernel"] = record.get("kernel") or _kernel_at_reload(run.step(arm.evaluate))
    return layers


def _kernel_at_reload(step: RunStep | None) -> str | None:
    """Where the writer's environment does not load what it wrote: what the main one loaded it as, for its scores."""
    return step.manifest["result"].get("kernel") if step is not None and step.manifest else None


def part_of(block: Mapping[str, Any]) -> str:
    """`attention` or `FFN`, by the block's name in its layer."""
    return PARTS[0] if "att" in block["part"] else PARTS[1]


def lines(layers: Mapping[str, Any], part: str) -> Iterator[Line]:
    """One line per arm that has errors there; outputs where they were measured, else weights."""
    for slug, arm in layers.items():
        blocks = [block for block in arm["blocks"] if part_of(block) == part]
        for name, measured in (("output_error", True), ("weight_error", False)):
            errors = {block["layer"]: block[name] for block in blocks if block[name] is not None}
            if errors:
                yield Line(slug, measured, errors)
                break


def unmeasured(layers: Mapping[str, Any]) -> dict[str, str]:
    """Arm -> why its errors were not measured: the step was short of memory, or could not load what it had made."""
    return {slug: arm["no_errors"] for slug, arm in layers.items() if "no_errors" in arm}


def worst(layers: Mapping[str, Any]) -> dict[str, str]:
    """Arm -> `FFN of layer 5: 12 %`, where its error is largest."""
    largest: dict[str, tuple[float, str]] = {}
    for part in PARTS:
        for line in lines(layers, part):
            layer, error = max(line.errors.items(), key=lambda one: one[1])
            largest[line.slug] = max(
                largest.get(line.slug, (0.0, "")), (error, f"{part} of layer {layer}: {100 * error:.2g} %")
            )
    return {slug: text for slug, (_, text) in largest.items()}
