"""`quench init`: from a model and a data file to a commented recipe that passes the check and runs with no edit."""

from __future__ import annotations

import argparse
import math
import re
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from flows.commands.init_data import read_data
from flows.commands.init_recipe import Detected, Fitted, notes, render
from flows.commands.terminal import Output
from flows.plan.card import hub_headers
from flows.plan.fit import STAGES, enough_tokens, fitting
from flows.plan.machine import Memory, available, named
from flows.plan.memory import StepNeeds, predict
from flows.plan.preflight import judge
from flows.plan.row_sizes import data_bytes, longest_answer, row_sizes, row_tokens, tokens_per_byte
from recipes.checks.check import load_and_read
from recipes.checks.rows import few_rows, too_few, with_spare
from recipes.checks.split import split_rows
from recipes.checks.train import without_sdpa
from recipes.data.rows import Row, Rows
from recipes.data.schema import Data
from recipes.models.headers import Headers, read_headers
from recipes.problem import Problem, RecipeError
from recipes.read.load import shown
from recipes.schema import FEWEST_ROWS, LEAST_ROWS, TOKENS_PER_INPUT, Recipe, is_hub_id
from recipes.schemes.slugs import legal_schemes
from tasks.runtime.hub.ids import HubId
from tasks.runtime.step import resolve_device

DOMAIN_NAMES = ("domain", "category", "topic", "task", "intent", "family", "type", "label", "source")
GROUP_NAMES = ("group", "conversation_id", "document_id")
DOMAIN_VALUES = range(2, 51)
SPARE = 0.8  # of the free memory is planned with: other programs want some, too
PYPROJECT = """\
# Lets `prefect deployment run finetune-and-quantize --param recipe=recipe.yaml --watch` work in this folder, while
# `quench up` runs: Prefect loads Quench's plug-in here.
[tool.prefect.plugins]
enabled = true
"""
LEAST_STEPS = 100  # optimizer steps that an adapter needs to settle


@dataclass(frozen=True, kw_only=True)
class InitResult:
    """A recipe that was written.

    Attributes:
        path: The recipe.
        notes: What was detected and chosen, by name.
        next: The command to type next.
    """

    path: Path
    notes: dict[str, str]
    next: str

    @property
    def text(self) -> str:
        """For the terminal; the last line is the next command."""
        lines = [f"  {name:<10} {note}" for name, note in self.notes.items()]
        look = f"look at what is trained: quench show {shown(self.path)}"
        return "\n".join([f"wrote {shown(self.path)}", *lines, "", look, "next:", f"  {self.next}"])

    def as_dict(self) -> dict[str, Any]:
        """For --json."""
        return asdict(self) | {"path": str(self.path)}


def command(args: argparse.Namespace) -> Output:
    """Write the recipe, say what was detected and chosen.

    Raises:
        RecipeError: As of init.
    """
    written = init(
        args.model,
        args.data,
        out=args.out,
        chat_template=args.chat_template,
        force=args.force,
        sets=args.set,
        card=named(args.gpu_gib, gpus=args.gpus, host_gib=args.host_gib),
    )
    return Output(json=written.as_dict(), text=written.text)


def init(
    model: str,
    data: str | Path,
    *,
    out: Path,
    chat_template: str | None = None,
    force: bool = False,
    sets: Sequence[str] = (),
    memory: Memory | None = None,
    card: Memory | None = None,
) -> InitResult:
    """Write a recipe for a model and a data file.

    Args:
        model: Local folder or hub id.
        data: File or folder, as data.path.
        out: Recipe to write; its folder must exist.
        chat_template: `chatml` or a Jinja file, for a base that has none.
        force: Overwrite `out`.
        sets: What the rows mean, `data.columns={prompt: ask, completion: say}`; see flows/commands/init_data.py.
        memory: Free memory to fit to; default: that of this machine.
        card: Another machine, with a GPU, to fit to in its place.

    Raises:
        RecipeError: Everything that keeps model or data from being used, or `out` exists.
    """
    detected = _look(model, Path(data), out=out, chat_template=chat_template, force=force, sets=sets)
    fitted = _fitted(_chosen(detected), detected, card or memory or available(), elsewhere=card is not None)
    before = out.read_text(encoding="utf-8") if out.exists() else None
    out.write_text(render(fitted, detected, out=out), encoding="utf-8")
    try:
        warnings = load_and_read(out).rows.warnings
    except RecipeError:
        if before is None:
            out.unlink()
        else:
            out.write_text(before, encoding="utf-8")
        raise
    remarks = notes(fitted, detected) | _of_gate(warnings, out) | _enable_prefect(out.parent)
    return InitResult(path=out, notes=remarks, next=f"quench run {shown(out)}")


def _of_gate(warnings: Sequence[Problem], out: Path) -> dict[str, str]:
    """What so few rows cannot show."""
    told = [warning.what for warning in warnings]
    return {"gate": " ".join([*told, f"What would do: quench check --data {shown(out)}"])} if told else {}


def _enable_prefect(folder: Path) -> dict[str, str]:
    """Write pyproject.toml where there is none; say what is missing in one that does not enable Prefect's plug-ins."""
    path = folder / "pyproject.toml"
    if not path.exists():
        path.write_text(PYPROJECT, encoding="utf-8")
        return {
            "prefect": f"{shown(path)}: `prefect deployment run finetune-and-quantize` works here, after `quench up`"
        }
    tools = tomllib.loads(path.read_text(encoding="utf-8")).get("tool", {})
    if tools.get("prefect", {}).get("plugins", {}).get("enabled"):
        return {}
    table = "[tool.prefect.plugins] enabled = true"
    return {"prefect": f"for `prefect deployment run finetune-and-quantize`, add {table} to {shown(path)}"}


# ---- looking


def _look(
    model: str, data: Path, *, out: Path, chat_template: str | None, force: bool, sets: Sequence[str]
) -> Detected:
    """Read headers and rows; raise everything that is wrong with either."""
    problems = list(_output_problems(out, force=force))
    headers = None
    try:
        headers = _headers(model)
    except RecipeError as error:
        problems += error.problems
    problems += _template_problems(model, data, chat_template, headers=headers)
    found = read_data(data, sets=sets) if data.exists() else None
    read, section = (found.rows, found.data) if found else (Rows(), Data(path=str(data)))
    if not data.exists():
        problems.append(
            Problem(
                what=f"There is no file or folder {data}.",
                where="--data",
                why="Rows are read from it.",
                next="Correct the path.",
            )
        )
    problems += read.problems
    group = section.group_column or next((name for name in GROUP_NAMES if _everywhere(name, read.rows)), None)
    domain = section.domain_column or _domain(read.rows, but=group)
    section = section.model_copy(update=_unmapped(section, group=group, domain=domain))
    sides = split_rows(read.rows, section)
    if read.rows and not read.problems and len(sides.rows["train"]) < FEWEST_ROWS:
        problems.append(too_few(len(sides.rows["train"]), where=str(data), dev=section.dev, test=section.test))
    if problems:
        raise RecipeError(problems)
    return Detected(
        base=model,
        template=chat_template,
        headers=headers,
        data=data,
        read=read,
        section=section,
        proposed=bool(found and found.proposed),
        domain=domain,
        group=group,
        sides=sides,
    )


def _output_problems(out: Path, *, force: bool) -> Iterator[Problem]:
    if out.exists() and not force:
        yield Problem(
            what=f"{shown(out)} is there already.", where=str(out), why="It may hold work.", next="Add --force."
        )
    if not out.parent.is_dir():
        yield Problem(
            what=f"There is no folder {out.parent}.",
            where="--out",
            why="The recipe is written into it.",
            next="Make it.",
        )


def _headers(model: str) -> Headers | None:
    """Headers of a folder; None of a hub id.

    Raises:
        RecipeError: It is neither, or its files cannot be read.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        return read_headers(folder)
    if is_hub_id(model, folder=Path.cwd()):
        return None
    raise Problem(
        what=f"{model} is neither a folder nor a hub id.",
        where="--model",
        why="A hub id is org/name.",
        next="Correct the path.",
    ).error()


def _template_problems(model: str, data: Path, chosen: str | None, *, headers: Headers | None) -> Iterator[Problem]:
    if chosen is not None and chosen != "chatml" and not Path(chosen).is_file():
        yield Problem(
            what=f"There is no file {chosen}.",
            where="--chat-template",
            why="It is no known name.",
            next="Name a Jinja file, or chatml.",
        )
    if headers is None:
        return
    if chosen is None and not headers.has_chat_template:
        yield Problem(
            what="The base has no chat template.",
            where=str(headers.folder),
            why="Without one, turns cannot be rendered the same way in training, calibration and serving.",
            next=f"quench init --model {model} --data {data} --chat-template chatml    (or a Jinja file; it is "
            "saved into every artifact)",
        )
    if chosen is not None and headers.has_chat_template:
        yield Problem(
            what="The base has a chat template.",
            where="--chat-template",
            why="The base was trained with its own; a second one would undo that.",
            next="Leave --chat-template out.",
        )


def _unmapped(section: Data, **columns: str | None) -> dict[str, str | None]:
    """Group and domain as fields, but for those that data.columns makes."""
    mapped = {name for source in section.parts for name in source.columns}
    return {name: column for name, column in columns.items() if name not in mapped}


def _everywhere(column: str, rows: Sequence[Row]) -> bool:
    return bool(rows) and all(isinstance(row.columns.get(column), str | int) for row in rows)


def _domain(rows: Sequence[Row], *, but: str | None) -> str | None:
    """A text column of 2 to 50 values, each in two rows or more on average; known names first, then fewest values."""
    names = [name for name in (rows[0].columns if rows else {}) if name != but]
    values = {
        name: len({row.columns[name] for row in rows})
        for name in names
        if all(isinstance(row.columns.get(name), str) for row in rows)
    }
    plausible = [name for name, count in values.items() if count in DOMAIN_VALUES and 2 * count <= len(rows)]
    known = [name for name in DOMAIN_NAMES if name in plausible]
    return known[0] if known else min(plausible, key=lambda name: values[name], default=None)


# ---- choosing


def _chosen(detected: Detected) -> Recipe:
    """Values for this model and these rows, before memory is looked at."""
    headers, train = detected.headers, len(detected.sides.rows["train"])
    limit = (headers.max_positions if headers else None) or 1 << 20
    per_byte = tokens_per_byte(headers)
    length = _length([row_tokens(row, per_byte) for row in detected.read.rows], limit=limit)
    # Twice the estimate, a whole row at most: one that is cut off scores 0, digits may be a token each, and later rows
    # may have longer answers. Room is cheap: only what does not end is decoded that far.
    answer = 2 * longest_answer(detected.read.rows, per_byte)
    batch = 16 if train >= 500 else 8
    prompt = min(128, limit // 2)
    return Recipe.model_validate(
        {
            "name": re.sub(r"[^a-z0-9]+", "-", detected.data.stem.lower()).strip("-")[:40].strip("-") or "recipe",
            "model": {"base": detected.base, "chat_template": detected.template},
            "data": detected.section.model_dump(exclude_defaults=True)
            | {"format": detected.read.format, "max_length": length},
            "train": {"learning_rate": _learning_rate(headers), "batch_size": batch}
            | ({"attention": "eager"} if headers and without_sdpa(headers) else {})
            | {"epochs": float(min(5, max(1, math.ceil(LEAST_STEPS * batch / train)))), "checkpoint_steps": 50},
            "calibrate": {"rows": _calibration_rows(detected), "seq_len": min(limit, max(512, length))}
            | ({"allow_unusual_size": few_rows(train)} if _calibration_rows(detected) < LEAST_ROWS else {}),
            "quantize": {"schemes": _schemes(headers)},
            "evaluate": {"on_base": _schemes(headers)[1:2], "max_new_tokens": _up(max(answer, 1), 16, most=length)},
            "measure": {"prompt_tokens": prompt, "new_tokens": min(32, limit - prompt)},
            "serve": {"engine": "vllm"},
        }
    )


def _length(tokens: list[int], *, limit: int) -> int:
    """The longest row; the 95th percentile where a few rows are more than twice as long as that."""
    ordered = sorted(tokens)
    usual = ordered[int(0.95 * (len(ordered) - 1))]
    return _up(ordered[-1] if ordered[-1] <= 2 * usual else usual, 64, most=limit)


def _up(value: int, unit: int, *, most: int) -> int:
    return min(most, unit * math.ceil(value / unit))


def _learning_rate(headers: Headers | None) -> float:
    """LoRA's usual 2e-4 from a billion parameters on; small models move less by the same rate."""
    size = headers.parameters if headers else 1 << 30
    return 2e-4 if size >= 1e9 else 5e-4 if size >= 1e8 else 1e-3


def _calibration_rows(detected: Detected) -> int:
    """256, or as many as the widest layer's Hessian asks for at 4 bytes per token; 512 and 9 in 10 of train at most."""
    rows, train = detected.read.rows, len(detected.sides.rows["train"])
    needed = TOKENS_PER_INPUT * detected.headers.largest_in_features if detected.headers else 0
    mean = sum(len(turn["content"].encode()) / 4 + 4 for row in rows for turn in row.messages) / len(rows)
    spare = max(LEAST_ROWS, with_spare(train)) if train >= LEAST_ROWS else with_spare(train)
    return min(512, spare, max(256, math.ceil(needed / mean)))


def _schemes(headers: Headers | None) -> list[str]:
    """AWQ and GPTQ at 4 bits with the largest legal group, the smallest one, and round-to-nearest as control."""
    legal = {scheme.slug: scheme for scheme in legal_schemes(headers.linears)} if headers else None
    groups = sorted(
        {scheme.group_size for slug, scheme in legal.items() if slug.startswith("gptq-w4-g")} if legal else {32, 128}
    )
    large, small = (groups[-1], groups[0]) if groups else (128, 32)
    wanted = [f"awq-w4-g{large}", f"gptq-w4-g{large}", f"gptq-w4-g{small}", f"rtn-w4-g{large}"]
    wanted = list(dict.fromkeys(wanted))
    fitting = [slug for slug in wanted if legal is None or slug in legal]
    return fitting or list(legal or ())[-1:]


# ---- fitting


def _fitted(recipe: Recipe, detected: Detected, memory: Memory, *, elsewhere: bool) -> Fitted:
    """The recipe with the largest batch and length that fit; as it is where nothing is known of the base.

    An estimate that no GPU has confirmed shrinks the recipe where that helps, and refuses nothing.

    Args:
        recipe: The recipe to shrink.
        detected: Model and rows.
        memory: To fit to.
        elsewhere: The memory is that of another machine, with a GPU. Of a base on a hub the headers are read then.

    Raises:
        RecipeError: No batch or length fits; or the hub does not give the headers.
    """
    headers = detected.headers
    if headers is None and elsewhere:
        headers = hub_headers(HubId(name=detected.base, revision=None, kind="model", field="--model"))
    if headers is None:
        return Fitted(recipe=recipe, predicted=[], memory=None)
    device = "cuda" if elsewhere else resolve_device(recipe.run.device)
    gpu_gib = None if memory.gpu_gib is None else SPARE * memory.gpu_gib
    spared = Memory(SPARE * memory.host_gib, gpu_gib, memory.gpus)
    per_byte = tokens_per_byte(headers)
    rows = row_sizes(
        detected.read.rows, data_bytes=data_bytes(detected.read.rows[0].origin, detected.read.rows), per_byte=per_byte
    )

    def steps(recipe: Recipe) -> list[StepNeeds]:
        return predict(recipe, headers, device=device, rows=rows)

    confirmed = {step.key for step in steps(recipe) if step.confirmed}
    for stage in STAGES:
        fit = fitting(
            stage, recipe, memory=spared, steps=steps, allows=lambda smaller: enough_tokens(smaller, headers, rows)
        )
        if confirmed & set(fit.never):
            raise RecipeError(judge(recipe, headers, memory=spared, device=device, rows=rows).problems)
        recipe = fit.setting.applied(recipe) if fit.setting else recipe
    return Fitted(recipe=recipe, predicted=steps(recipe), memory=memory)
