"""`quench quantize MODEL OUT --scheme SLUG --calibration ROWS`: calibrate and quantize without a recipe or a server."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from flows.commands.merge import check_disk, check_out, find
from flows.run.progress import Display
from recipes.data.rows import Rows, read_rows
from recipes.models.headers import Headers, read_headers
from recipes.problem import Problem, RecipeError
from recipes.schema import LEAST_ROWS, MOST_ROWS, Calibrate
from recipes.schemes.limits import limit_problems
from recipes.schemes.scheme import Scheme
from recipes.schemes.slugs import by_backend, parse_scheme
from tasks import calibrate, quantize
from tasks.runtime.hub.ids import DATA_FILES, MODEL_FILES, Snapshot
from tasks.runtime.outside import make_folder, work_folder
from tasks.runtime.pin import Digests, external_file, external_folder
from tasks.runtime.process.environments import environment_problem
from tasks.runtime.process.errors import StepFailed
from tasks.runtime.process.launch import Launcher
from tasks.runtime.process.leases import Leases, cpu_slots
from tasks.runtime.step import Context, External, Limits, Step, resolve_device, run_step
from tasks.runtime.store.local import Store, find_home
from tasks.runtime.tokenizer_files import TOKENIZER_FILES

USUAL = Calibrate().rows
OPTIONS = {"calibrate.rows": "--rows", "calibrate.seq_len": "--seq-len"}  # a job names the recipe's fields


@dataclass(frozen=True, kw_only=True)
class Asked:
    """The command line.

    Attributes:
        model: Folder or hub id.
        out: Folder to write.
        scheme: Slug.
        backend: Another one than the scheme's own.
        calibration: File or folder of rows; None where the scheme needs none.
        rows: Rows to draw; None takes 256, or all where there are fewer.
        seq_len: Tokens a packed sequence.
        seed: Draws the rows, and the quantizer's.
        device: auto, cpu or cuda.
    """

    model: str
    out: Path
    scheme: str
    backend: str | None
    calibration: Path | None
    rows: int | None
    seq_len: int
    seed: int
    device: str


class Checked(NamedTuple):
    """What is asked for, found and without a problem; `rows` is None where the scheme needs none."""

    model: Snapshot
    headers: Headers
    scheme: Scheme
    rows: Rows | None


def quantize_into(asked: Asked, display: Display) -> dict[str, Any]:
    """Make OUT.

    Returns:
        The manifest.

    Raises:
        RecipeError: Everything that is wrong with model, scheme, rows and OUT, before anything is started.
        StepFailed: A stage failed.
    """
    out = asked.out.absolute()
    checked = _check(asked, out)
    home, work = find_home(), work_folder(out)
    digests = Digests(home if home.exists() else work)
    model = external_folder(
        "model",
        checked.model.folder,
        patterns=(*MODEL_FILES, *TOKENIZER_FILES),
        digests=digests,
        source=checked.model.source,
    )
    if home.exists():
        digests.save()
    with Launcher() as launcher, display:
        context = Context(
            store=Store(work),
            launcher=launcher,
            leases=Leases(home if home.exists() else work),
            limits=Limits(device=resolve_device(asked.device), threads=cpu_slots()),
            on_event=lambda step, event: _tell(step, event, display),
        )
        inputs: dict[str, External | Step] = {"model": model}
        made = {"model": model.artifact}
        if checked.rows is not None:
            inputs["calibset"] = step = _calibset(asked, checked, digests)
            display.started(step.key)
            there = {name: one.artifact for name, one in step.inputs.items() if isinstance(one, External)}
            made["calibset"] = run_step(step, there, context).artifact
            display.ended(step.key, f"  made  {step.key}")
        step = quantize.alone(checked.scheme.slug, checked.scheme, inputs=inputs, seed=asked.seed)
        display.started(step.key)
        manifest = make_folder(step, made, context, out=out)
        display.ended(step.key, f"  made  {step.key}")
    return manifest


def retold(error: StepFailed) -> StepFailed:
    """The same in the words of the command line: a job names the recipe's fields."""
    parts = error.problem.as_dict()
    for field, option in OPTIONS.items():
        for name, text in parts.items():
            parts[name] = text.replace(f"set {field} to", f"give {option}").replace(field, option)
    return StepFailed(error.step, Problem(**parts), log=error.log, returncode=error.returncode)


def _check(asked: Asked, out: Path) -> Checked:
    model = find("model", asked.model, kind="model")
    problems = list(check_out(out, [model.folder]))
    scheme = headers = rows = None
    try:
        scheme = parse_scheme(asked.scheme)
        scheme = by_backend(scheme, asked.backend) if asked.backend else scheme
    except RecipeError as error:
        problems += error.problems
    try:
        headers = read_headers(model.folder)
    except RecipeError as error:
        problems += error.problems
    if scheme is not None and headers is not None:
        absent = environment_problem(quantize.ENVIRONMENTS.get(scheme.backend))
        problems += [*scheme.check(headers.linears), *limit_problems(scheme, headers), *([absent] if absent else [])]
        rest = max(headers.weight_bytes - 2 * headers.linear_parameters, 0)  # embeddings, norms, head stay as they are
        problems += check_disk(out, scheme.predicted_bytes(headers.linears) + rest, what="the quantized model")
    if scheme is not None and scheme.needs_calibration:
        rows = read_rows(asked.calibration) if asked.calibration and asked.calibration.exists() else None
        problems += _row_problems(asked, headers, rows)
    if problems or scheme is None or headers is None:
        raise RecipeError(problems)
    return Checked(model, headers, scheme, rows)


def _row_problems(asked: Asked, headers: Headers | None, rows: Rows | None) -> Iterator[Problem]:
    """What is wrong with the rows, and with options on a model like this."""
    if rows is None:
        yield Problem(
            what="No calibration rows are named." if asked.calibration is None else "The rows are not there.",
            where=str(asked.calibration or "--calibration"),
            why=f"{asked.scheme} looks at activations: the rows decide what it keeps.",
            next="Give --calibration FILE (JSONL, JSON, CSV, parquet, or a folder of them), or take an rtn- scheme.",
        )
        return
    yield from rows.problems
    there = len(rows.rows)
    if rows.rows and not LEAST_ROWS <= (asked.rows or min(USUAL, there)) <= min(MOST_ROWS, there):
        yield Problem(
            what=f"{asked.rows or USUAL} rows are asked for, {there} are there.",
            where=f"--rows, {asked.calibration}",
            why=f"Calibration takes {LEAST_ROWS} to {MOST_ROWS}: fewer starve the Hessian, more only cost time.",
            next=f"Give --rows {min(there, MOST_ROWS)}." if there >= LEAST_ROWS else "Give more rows.",
        )
    limit = headers.max_positions if headers else None
    if limit is not None and asked.seq_len > limit:
        yield Problem(
            what=f"--seq-len is {asked.seq_len} tokens; the model ends at {limit}.",
            where="--seq-len",
            why="Positions behind the longest context were never trained.",
            next=f"Give --seq-len {limit} or less.",
        )
    if rows.rows and rows.format != "text" and headers is not None and not headers.has_chat_template:
        yield Problem(
            what="The model has no chat template, and the rows have turns.",
            where=str(asked.calibration),
            why="Turns are rendered as the model will see them when it serves.",
            next='Give rows {"text": ...}, or put the model\'s chat_template.jinja into its folder.',
        )


def _calibset(asked: Asked, checked: Checked, digests: Digests) -> Step:
    assert checked.rows is not None and asked.calibration is not None
    path = asked.calibration
    rows = (
        external_folder("rows", path, patterns=DATA_FILES, digests=digests)
        if path.is_dir()
        else external_file("rows", path, digests=digests)
    )
    tokens = external_folder("tokenizer", checked.model.folder, patterns=TOKENIZER_FILES, digests=digests)
    params = {
        "rows": asked.rows or min(USUAL, len(checked.rows.rows)),
        "seq_len": asked.seq_len,
        "seed": asked.seed,
        "min_tokens": calibrate.TOKENS_PER_INPUT * checked.headers.largest_in_features,
    }
    return calibrate.alone(checked.scheme.slug, rows=rows, tokenizer=tokens, params=params)


def _tell(step: Step, event: dict[str, Any], display: Display) -> None:
    display.event(step.key, event)
    if event["kind"] == "note":
        display.line(f"{step.key}: {event['about']}: {event['text']}")
