"""`quench quantize MODEL OUT --scheme SLUG --calibration ROWS`: calibrate and quantize without a recipe or a server."""

from __future__ import annotations

import argparse
import glob
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

from flows.commands.folders import check_disk, check_output, find_input
from flows.commands.terminal import Output
from flows.run.progress import Display
from recipes.data.files import data_files
from recipes.data.rows import Rows, read_rows
from recipes.models.headers import Headers, read_headers
from recipes.problem import Problem, RecipeError
from recipes.schema import LEAST_ROWS, MOST_ROWS, Calibrate
from recipes.schemes.limits import limit_problems, quantized_linears, size_bytes
from recipes.schemes.scheme import Scheme
from recipes.schemes.slugs import by_backend, parse_scheme
from tasks import calibrate, quantize
from tasks.runtime.hub.ids import MODEL_FILES, Snapshot
from tasks.runtime.outside import make_folder, work_folder
from tasks.runtime.pin import Digests, external_file, external_folder
from tasks.runtime.process.environments import environment_problem
from tasks.runtime.process.errors import StepFailed
from tasks.runtime.process.launch import Launcher
from tasks.runtime.process.leases import Leases, cpu_slots
from tasks.runtime.step import Context, External, Limits, Step, resolve_device, run_step
from tasks.runtime.store.local import Store, find_home
from tasks.runtime.tokenizer_files import TOKENIZER_FILES

DEFAULT_ROWS = Calibrate().rows
OPTIONS = {"calibrate.rows": "--rows", "calibrate.seq_len": "--seq-len"}  # a job names the recipe's fields


@dataclass(frozen=True, kw_only=True)
class QuantizeOptions:
    """The command line.

    Attributes:
        model: Folder or hub id.
        out: Folder to write.
        scheme: Slug.
        backend: Another one than the scheme's own.
        calibration: File or folder of rows; None where the scheme needs none.
        rows: Rows to draw; None takes 256, or all where there are fewer.
        seq_len: Tokens per packed sequence.
        seed: Seed of the drawn rows, and of the quantizer.
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


class QuantizeInputs(NamedTuple):
    """Everything that is needed, read and without a problem; `rows` is None where the scheme needs none."""

    model: Snapshot
    headers: Headers
    scheme: Scheme
    rows: Rows | None


def command(args: argparse.Namespace) -> Output:
    """Quantize; answer with the manifest.

    Raises:
        RecipeError: As of quantize_into.
        StepFailed: As of quantize_into, in the words of the command line.
    """
    options = QuantizeOptions(**{option.name: getattr(args, option.name) for option in fields(QuantizeOptions)})
    try:
        manifest = quantize_into(options, Display())
    except StepFailed as error:
        raise _in_options(error) from error
    result, stored = manifest["result"], manifest["result"]["on_disk"]
    return Output(
        json={"ok": True, "quantized": {"folder": str(args.out), **manifest}},
        text=f"{args.out}: {result['layers']} layers, {result['weight_bytes'] / 1e6:.1f} MB of weights "
        f"({stored['packed_share']:.0%} of the linear weights packed, {stored['bits_a_weight']:.2f} bits each) by "
        f"{result['backend']}, {manifest['seconds']:.0f} s, peak {manifest['peak_rss_gib']:.2f} GiB",
    )


def quantize_into(options: QuantizeOptions, display: Display) -> dict[str, Any]:
    """Make OUT.

    Returns:
        The manifest.

    Raises:
        RecipeError: Everything that is wrong with model, scheme, rows and OUT, before anything is started.
        StepFailed: A stage failed.
    """
    out = options.out.absolute()
    device = resolve_device(options.device, where="--device")
    checked = _check(options, out)
    home, work = find_home(), work_folder(out)
    digests = Digests(home if home.exists() else work)
    source = checked.model
    patterns = (*MODEL_FILES, *TOKENIZER_FILES)
    model = external_folder("model", source.folder, patterns=patterns, digests=digests, source=source.source)
    if home.exists():
        digests.save()
    with Launcher() as launcher, display:
        context = Context(
            store=Store(work),
            launcher=launcher,
            leases=Leases(home if home.exists() else work),
            limits=Limits(device=device, threads=cpu_slots()),
            on_event=lambda step, event: _show(step, event, display),
        )
        inputs: dict[str, External | Step] = {"model": model}
        artifacts = {"model": model.artifact}
        if checked.rows is not None:
            inputs["calibset"] = step = _calibset(options, checked, digests)
            display.started(step.key)
            sources = {name: origin.artifact for name, origin in step.inputs.items() if isinstance(origin, External)}
            artifacts["calibset"] = run_step(step, sources, context).artifact
            display.ended(step.key, f"  made  {step.key}")
        step = quantize.alone(checked.scheme.slug, checked.scheme, inputs=inputs, seed=options.seed)
        display.started(step.key)
        manifest = make_folder(step, artifacts, context, out=out)
        display.ended(step.key, f"  made  {step.key}")
    return manifest


def _in_options(error: StepFailed) -> StepFailed:
    """The same failure with the options of this command: a job names the recipe's fields."""
    parts = error.problem.as_dict()
    for field, option in OPTIONS.items():
        for name, text in parts.items():
            parts[name] = text.replace(f"set {field} to", f"give {option}").replace(field, option)
    return StepFailed(error.step, Problem(**parts), log=error.log, returncode=error.returncode)


def _check(options: QuantizeOptions, out: Path) -> QuantizeInputs:
    model = find_input("model", options.model, kind="model")
    problems = list(check_output(out, word="OUT", inputs=[model.folder]))
    scheme = headers = rows = None
    try:
        scheme = parse_scheme(options.scheme)
        scheme = by_backend(scheme, options.backend) if options.backend else scheme
    except RecipeError as error:
        problems += error.problems
    try:
        headers = read_headers(model.folder)
    except RecipeError as error:
        problems += error.problems
    if scheme is not None and headers is not None:
        problems += _scheme_problems(scheme, headers, out)
    if scheme is not None and scheme.needs_calibration:
        rows = read_rows(options.calibration) if options.calibration and options.calibration.exists() else None
        problems += _row_problems(options, headers, rows)
    if problems or scheme is None or headers is None:
        raise RecipeError(problems)
    return QuantizeInputs(model, headers, scheme, rows)


def _scheme_problems(scheme: Scheme, headers: Headers, out: Path) -> Iterator[Problem]:
    """What keeps this scheme from being made of this model, here."""
    yield from scheme.check(quantized_linears(scheme, headers))
    yield from limit_problems(scheme, headers)
    if not_installed := environment_problem(quantize.ENVIRONMENTS.get(scheme.backend)):
        yield not_installed
    yield from check_disk(out, size_bytes(scheme, headers), word="OUT", content="the quantized model")


def _row_problems(options: QuantizeOptions, headers: Headers | None, rows: Rows | None) -> Iterator[Problem]:
    """What is wrong with the rows, and with options on a model like this."""
    if rows is None:
        yield Problem(
            what="No calibration rows are named." if options.calibration is None else "The rows are not there.",
            where=str(options.calibration or "--calibration"),
            why=f"{options.scheme} looks at activations: the rows decide what it keeps.",
            next="Give --calibration FILE (JSONL, JSON, CSV, parquet, or a folder of them), or take an rtn- scheme.",
        )
        return
    yield from rows.problems
    count = len(rows.rows)
    if rows.rows and not LEAST_ROWS <= (options.rows or min(DEFAULT_ROWS, count)) <= min(MOST_ROWS, count):
        yield Problem(
            what=f"{options.rows or DEFAULT_ROWS} rows are wanted, {count} are there.",
            where=f"--rows, {options.calibration}",
            why=f"Calibration takes {LEAST_ROWS} to {MOST_ROWS}: fewer starve the Hessian, more only cost time.",
            next=f"Give --rows {min(count, MOST_ROWS)}." if count >= LEAST_ROWS else "Give more rows.",
        )
    limit = headers.max_positions if headers else None
    if limit is not None and options.seq_len > limit:
        yield Problem(
            what=f"--seq-len is {options.seq_len} tokens; the model ends at {limit}.",
            where="--seq-len",
            why="Positions beyond the longest context were never trained.",
            next=f"Give --seq-len {limit} or less.",
        )
    if rows.rows and rows.format != "text" and headers is not None and not headers.has_chat_template:
        yield Problem(
            what="The model has no chat template, and the rows have turns.",
            where=str(options.calibration),
            why="Turns are rendered as the model will see them when it serves.",
            next='Give rows {"text": ...}, or put the model\'s chat_template.jinja into its folder.',
        )


def _calibset(options: QuantizeOptions, checked: QuantizeInputs, digests: Digests) -> Step:
    assert checked.rows is not None and options.calibration is not None
    path = options.calibration
    if path.is_dir():
        names = [glob.escape(str(file.relative_to(path))) for file in data_files(path)]
        rows = external_folder("rows", path, patterns=names, digests=digests)
    else:
        rows = external_file("rows", path, digests=digests)
    tokens = external_folder("tokenizer", checked.model.folder, patterns=TOKENIZER_FILES, digests=digests)
    params = {
        "rows": options.rows or min(DEFAULT_ROWS, len(checked.rows.rows)),
        "seq_len": options.seq_len,
        "seed": options.seed,
        "min_tokens": calibrate.TOKENS_PER_INPUT * checked.headers.largest_in_features,
    }
    return calibrate.alone(checked.scheme.slug, rows=rows, tokenizer=tokens, params=params)


def _show(step: Step, event: dict[str, Any], display: Display) -> None:
    display.event(step.key, event)
    if event["kind"] == "note":
        display.line(f"{step.key}: {event['about']}: {event['text']}")
