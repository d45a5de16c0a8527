"""The recipe that `quench init` writes, as text: every line that it chose says why."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml

from flows.plan.fit import on_card
from flows.plan.machine import Memory
from flows.plan.memory import StepNeeds
from recipes.checks.split import Sides
from recipes.data.files import raw_rows
from recipes.data.formats import columns_line
from recipes.data.rows import Rows
from recipes.data.schema import Data
from recipes.models.headers import Headers
from recipes.read.load import shown
from recipes.schema import Recipe
from recipes.schemes.scheme import legal_group_sizes

COLUMN = 36  # where comments begin
ROW_CHARS = 200  # of the first row, shown


@dataclass(frozen=True, kw_only=True)
class Detected:
    """What was detected in model and data.

    Attributes:
        base: As it was named.
        template: `chatml` or a file, for a base that has none.
        headers: None for a hub id that is not local.
        data: The data file.
        read: Its rows.
        section: The fields of `data` by which they were read.
        proposed: Whether its data.columns is a proposal of ours.
        domain: Column that was detected.
        group: Column that was detected.
        sides: The split.
    """

    base: str
    template: str | None
    headers: Headers | None
    data: Path
    read: Rows
    section: Data
    proposed: bool
    domain: str | None
    group: str | None
    sides: Sides

    @property
    def unused(self) -> list[str]:
        """Columns that nothing reads."""
        return [name for name in self.read.unused if name not in (self.domain, self.group)]


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """A recipe, and what it will need of the memory that was free; nothing is known of a base that is not local."""

    recipe: Recipe
    predicted: list[StepNeeds]
    memory: Memory | None

    def needs(self, stage: str) -> str:
        """`training needs 1.2 of 18.0 GiB`, for a comment."""
        steps = [step for step in self.predicted if step.stage == stage]
        if self.memory is None or not steps:
            return "not fitted to memory: the base is not local"
        on_gpu = any(step.gpu_gib for step in steps)
        needed = max(on_card(step) if on_gpu else step.needed_gib for step in steps)
        free = self.memory.gpu_gib if on_gpu else self.memory.host_gib
        return f"needs about {needed:.1f} of {free or 0:.1f} GiB free {'on the GPU' if on_gpu else 'here'}"


def render(fitted: Fitted, detected: Detected, *, out: Path) -> str:
    """The recipe as commented YAML; paths count from the folder of `out`."""
    head = [
        "# Written by `quench init`; docs/recipe.md explains every key, and what is not here has a default.",
        f"# Check it with: quench check --data {shown(out)}",
        f"# Run it with:   quench run {shown(out)}",
        f"name: {fitted.recipe.name}",
    ]
    folder = out.resolve().parent
    parts = {
        "model": _model(detected, folder),
        "data": _data(fitted.recipe, detected, folder),
        "train": _train(fitted, detected),
        "calibrate": _calibrate(fitted.recipe, detected),
        "quantize": _quantize(fitted.recipe, detected),
        "evaluate": _evaluate(fitted),
        "measure": _measure(fitted.recipe),
        "serve": _serve(fitted.recipe),
        "run": _run(fitted),
    }
    return "\n".join([*head, *(line for name, lines in parts.items() for line in ("", f"{name}:", *lines))]) + "\n"


def notes(fitted: Fitted, detected: Detected) -> dict[str, str]:
    """What was detected and chosen, for the terminal."""
    rows = {name: len(rows) for name, rows in detected.sides.rows.items()}
    recipe = fitted.recipe
    return {
        "format": f"{detected.read.format}, detected from {detected.read.detected_from}",
        "rows": f"{rows['train']} train, {rows['dev']} dev, {rows['test']} test; "
        f"{detected.sides.duplicates} duplicates",
        **_turn_columns(detected),
        "columns": f"domain {detected.domain or 'none'}, group {detected.group or 'none: by the first question'}",
        "groups": f"{_groups(detected)}; schemes {', '.join(map(str, recipe.quantize.schemes))}",
        "memory": f"training {fitted.needs('train')}, micro-batch {recipe.micro_batch}, "
        f"rows of up to {recipe.data.max_length} tokens",
        "answers": f"of up to {recipe.evaluate.max_new_tokens} tokens: twice the longest of all rows, estimated; one "
        "that is cut off scores 0",
    }


def _line(key: str, value: object, comment: str = "") -> str:
    """`  key: value    # comment`."""
    text = yaml.safe_dump(value, default_flow_style=True, width=math.inf, allow_unicode=True)
    text = f"  {key}: {text.removesuffix(chr(10)).removesuffix(chr(10) + '...')}"
    return f"{text.ljust(COLUMN - 1)} # {comment}" if comment else text


def _path(path: str | Path, folder: Path) -> str:
    """Relative to the recipe, unless that would climb more than two folders."""
    full = Path(path).expanduser().resolve()
    relative = os.path.relpath(full, folder)
    return str(full) if relative.startswith("../../..") else relative


def _model(detected: Detected, folder: Path) -> Iterator[str]:
    headers = detected.headers
    if headers is None:
        yield _line("base", detected.base, "hub id: fetched and checked when the run starts")
    else:
        kind = str(headers.config.get("model_type", "model"))
        size = f"{headers.parameters / 1e6:,.1f} M parameters"
        yield _line("base", _path(headers.folder, folder), f"{kind}, {size}")
    if detected.template:
        name = detected.template if detected.template == "chatml" else _path(detected.template, folder)
        yield _line("chat_template", name, "the base has none; this one is saved into every artifact")


def _data(recipe: Recipe, detected: Detected, folder: Path) -> Iterator[str]:
    data, rows = recipe.data, {name: len(rows) for name, rows in detected.sides.rows.items()}
    yield _line(
        "path", _path(detected.data, folder), f"{len(detected.read.rows)} rows, {detected.sides.duplicates} duplicates"
    )
    yield f"  # Detected from {detected.read.detected_from}:"
    yield f"  # {_first_row(detected.data, data)}"
    yield _line("format", data.format)
    yield from _meaning(data, detected)
    if "domain" in data.columns:
        pass  # said above
    elif detected.domain:
        count = len({row.columns[detected.domain] for row in detected.read.rows})
        yield _line("domain", detected.domain, f"{count} values: calibration is stratified over it")
    else:
        yield "  # domain: COLUMN                  # calibration is stratified over it, metrics are shown by it"
    if "group" in data.columns:
        pass
    elif detected.group:
        yield _line("group", detected.group, "rows with one value stay on one side of the split")
    else:
        yield "  # group: COLUMN                   # keeps related rows on one side; default: those of one question"
    yield '  # general: FILE.jsonl             # rows {"text": ...} outside the domain: measures what is forgotten'
    yield _line("dev", data.dev, f"{rows['dev']} rows: whatever chooses reads only these")
    yield _line("test", data.test, f"{rows['test']} rows for published figures; {rows['train']} are left for train")
    yield _line("max_length", data.max_length, "tokens; longer rows lose leading turns, and this is counted")


def _meaning(data: Data, detected: Detected) -> Iterator[str]:
    """What the rows mean, where their columns alone do not say it."""
    if data.columns:
        line = f"  {columns_line(data.columns)}"
        yield f"{line.ljust(COLUMN - 1)} # proposed by their names" if detected.proposed else line
    if data.keep:
        left = detected.read.left_out
        yield _line("keep", dict(data.keep), f"{left} rows are left out")
    for name in ("drop_reasoning", "config", "split"):
        if value := getattr(data, name):
            yield _line(name, value)
    if detected.unused:
        yield f"  # Not used: {', '.join(detected.unused)}."


def _turn_columns(detected: Detected) -> dict[str, str]:
    """Notes on columns that were named, rows that were left out, and columns that nothing reads."""
    remarks: dict[str, str] = {}
    if detected.section.columns:
        how = "proposed by their names" if detected.proposed else "as you said"
        remarks["turns"] = f"{columns_line(detected.section.columns)}, {how}"
    if detected.read.left_out:
        remarks["kept"] = f"{detected.read.left_out} rows are left out by data.keep"
    if detected.unused:
        remarks["not used"] = ", ".join(detected.unused)
    return remarks


def _first_row(path: Path, data: Data) -> str:
    """The first row, printable and short."""
    line = json.dumps(next(raw_rows(path, config=data.config, split=data.split)).values, ensure_ascii=False)
    text = "".join(char if char.isprintable() else " " for char in line)
    return text if len(text) <= ROW_CHARS else f"{text[:ROW_CHARS]} ..."


def _train(fitted: Fitted, detected: Detected) -> Iterator[str]:
    train, rows = fitted.recipe.train, len(detected.sides.rows["train"])
    steps = math.ceil(math.ceil(rows / train.batch_size) * train.epochs)
    yield _line("rank", train.rank)
    yield _line("alpha", int(train.alpha), "the update is scaled by alpha / rank")
    yield _line("learning_rate", train.learning_rate, "by the size of the base: 2e-4 from a billion parameters on")
    yield _line("batch_size", train.batch_size, "rows per optimizer step")
    yield _line("epochs", int(train.epochs), f"{steps} steps; about 100 are needed, 5 epochs at most")
    yield _line("checkpoint_steps", train.checkpoint_steps, "a killed training goes on from the last one")
    if train.attention != "sdpa":
        yield _line("attention", train.attention, "this architecture has no other")
    if train.gradient_checkpointing:
        yield _line("gradient_checkpointing", True, "to fit into memory")


def _calibrate(recipe: Recipe, detected: Detected) -> Iterator[str]:
    calibrate, rows = recipe.calibrate, len(detected.sides.rows["train"])
    yield _line("rows", calibrate.rows, f"of {rows} train rows; 128 to 512 are usual")
    if calibrate.allow_unusual_size:
        yield _line("allow_unusual_size", calibrate.allow_unusual_size, "a reason; more rows would calibrate better")
    yield _line("seq_len", calibrate.seq_len, "rows are packed up to so many tokens")


def _groups(detected: Detected) -> str:
    if detected.headers is None:
        return "Group sizes are checked when the base is fetched"
    legal = ", ".join(map(str, legal_group_sizes(detected.headers.linears)))
    return f"Legal group sizes by config.json and headers: {legal}"


def _quantize(recipe: Recipe, detected: Detected) -> Iterator[str]:
    yield f"  # {_groups(detected)}. `quench schemes` lists all schemes."
    yield "  schemes:"
    for slug in map(str, recipe.quantize.schemes):  # init writes plain slugs
        control = "round-to-nearest, no calibration: the control" if slug.startswith("rtn") else ""
        yield f"    - {slug}".ljust(COLUMN - 1) + f" # {control}" if control else f"    - {slug}"


def _evaluate(fitted: Fitted) -> Iterator[str]:
    evaluate = fitted.recipe.evaluate
    yield "  scorers:"
    yield "    - kind: exact-match".ljust(COLUMN - 1) + " # the answer is the reference, but for white space around it"
    yield _line("on_base", evaluate.on_base, "the base quantized, the adapter on top: the alternative to merging")
    room = "twice the longest answer of all rows, estimated; one that is cut off scores 0"
    yield _line("max_new_tokens", evaluate.max_new_tokens, room)
    yield _line("batch_size", evaluate.batch_size, f"evaluation {fitted.needs('evaluate')}")


def _measure(recipe: Recipe) -> Iterator[str]:
    yield _line("prompt_tokens", recipe.measure.prompt_tokens)
    yield _line("new_tokens", recipe.measure.new_tokens)


def _serve(recipe: Recipe) -> Iterator[str]:
    yield _line(
        "engine", recipe.serve.engine, "quench check warns of what it cannot read; also transformers, exllamav2"
    )
    yield _line("tensor_parallel", recipe.serve.tensor_parallel, "GPUs that each layer is split over")


def _run(fitted: Fitted) -> Iterator[str]:
    yield "  # Where it runs, not what is made: nothing here changes an artifact's identity."
    yield _line("micro_batch", fitted.recipe.micro_batch, f"rows per forward pass; training {fitted.needs('train')}")
    run = fitted.recipe.run
    if run.processes > 1:
        yield _line("processes", run.processes, "GPUs that train together; no GPU has confirmed this estimate")
        yield _line("launcher", run.launcher, "each holds a part of the base")
