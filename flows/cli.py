"""The `quench` command. Exit codes: 0 done, 1 something failed or the answer is no, 2 bad input, 130 interrupted."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from flows.run.credentials import take_out_password
from recipes.checks.python import FLAG, allow
from recipes.problem import Problem, RecipeError

if TYPE_CHECKING:  # `quench check` imports no runtime
    from tasks.runtime.process.errors import StepFailed

DONE, FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, run one command, turn errors into exit codes."""
    args = _parser().parse_args(argv)
    os.environ["DO_NOT_TRACK"] = "true"  # MLflow takes no other word for it
    take_out_password()
    allow(getattr(args, "allow_python", []))
    try:
        return args.body(args)
    except RecipeError as error:
        _refuse(error.problems, as_json=getattr(args, "json", False))
        return BAD_INPUT
    except OSError as error:
        return _no_space(error)
    except KeyboardInterrupt:
        print("stopped; what had finished is kept: the same command resumes", file=sys.stderr)
        return INTERRUPTED


def _refuse(problems: Sequence[Problem], *, as_json: bool) -> None:
    if as_json:
        print(json.dumps({"ok": False, "problems": [one.as_dict() for one in problems]}, indent=2))
        return
    for one in problems:
        print(f"error: {one}\n", file=sys.stderr)
    print(f"{len(problems)} problem{'s' if len(problems) > 1 else ''}; nothing was started", file=sys.stderr)


def _no_space(error: OSError) -> int:
    from tasks.runtime.process.disk import full, is_full
    from tasks.runtime.store.local import find_home

    if not is_full(error):
        raise error
    home = find_home()
    print(f"error: {full(home, error.filename or str(home))}", file=sys.stderr)
    return FAILED


def _warn(problems: Sequence[Problem]) -> None:
    for one in problems:
        print(f"warning: {one}\n", file=sys.stderr)


def _print(value: dict[str, Any] | list[Any], text: str, *, as_json: bool) -> None:
    print(json.dumps(value, indent=2, default=str) if as_json else text)


def _init(args: argparse.Namespace) -> int:
    from flows.commands.init import init

    made = init(args.model, args.data, out=args.out, chat_template=args.chat_template, force=args.force)
    _print(made.as_dict(), made.text, as_json=args.json)
    return DONE


def _check(args: argparse.Namespace) -> int:
    from flows.commands.schemes import not_here
    from recipes.checks.check import load_and_read
    from recipes.checks.serving import warnings

    loaded, rows = load_and_read(args.recipe, sets=args.set, data=args.data)
    warned = [*warnings(loaded), *not_here(loaded.recipe), *rows.warnings]
    lines = [f"{args.recipe}: no problem found"] + [f"  {name}: {value}" for name, value in rows.summary.items()]
    told = {"ok": True, "problems": [], "warnings": [one.as_dict() for one in warned], "rows": rows.summary}
    _print(told, "\n".join([*lines, *(f"\nwarning: {one}" for one in warned)]), as_json=args.json)
    return DONE


def _plan(args: argparse.Namespace) -> int:
    from flows.plan.validate import validate
    from tasks.runtime.store.local import find_home

    validated = validate(args.recipe, sets=args.set, home=find_home(), only=args.only)
    _warn(validated.warnings)
    planned, pins = validated.plan, validated.pins
    hits = sum(one.hit for one in planned)
    outside = (pins.base, *pins.data, *pins.externals.values())
    commits = [f"pin   {one.name:<34} {one.source}" for one in outside if "@" in one.source]
    lines = [*commits, *(str(one) for one in planned), f"{hits} of {len(planned)} steps are in the store"]
    _print([vars(one) for one in planned], "\n".join(lines), as_json=args.json)
    return DONE


def _run(args: argparse.Namespace) -> int:
    from flows.commands.run import command

    signal.signal(signal.SIGTERM, _terminated)
    return command(args, warn=_warn)


def _merge(args: argparse.Namespace) -> int:
    from flows.commands.merge import merge_into
    from tasks.runtime.process.errors import StepFailed

    signal.signal(signal.SIGTERM, _terminated)
    try:
        merged = merge_into(
            args.base,
            args.adapter,
            args.out,
            onto=args.onto,
            device=args.device,
            accept_other_base=args.accept_other_base,
            say=lambda text: print(text, file=sys.stderr),
        )
    except StepFailed as error:
        return _failed(error, as_json=args.json)
    rows = [{"folder": str(one.folder), **one.manifest} for one in merged]
    lines = [
        f"{one['folder']}: {one['result']['parameters'] / 1e6:.1f} M parameters onto {one['result']['onto']}, "
        f"{one['seconds']:.0f} s, peak {one['peak_rss_gib']:.2f} GiB"
        for one in rows
    ]
    _print({"ok": True, "merged": rows}, "\n".join(lines), as_json=args.json)
    return DONE


def _export(args: argparse.Namespace) -> int:
    from flows.commands.export import command

    return _attempt(command, args)


def _quantize(args: argparse.Namespace) -> int:
    from flows.commands.quantize import Asked, quantize_into, retold
    from flows.run.progress import Display
    from tasks.runtime.process.errors import StepFailed

    signal.signal(signal.SIGTERM, _terminated)
    names = ("model", "out", "scheme", "backend", "calibration", "rows", "seq_len", "seed", "device")
    try:
        manifest = quantize_into(Asked(**{name: getattr(args, name) for name in names}), Display())
    except StepFailed as error:
        return _failed(retold(error), as_json=args.json)
    result = manifest["result"]
    text = (
        f"{args.out}: {result['layers']} layers, {result['weight_bytes'] / 1e6:.1f} MB of weights by "
        f"{result['backend']}, {manifest['seconds']:.0f} s, peak {manifest['peak_rss_gib']:.2f} GiB"
    )
    _print({"ok": True, "quantized": {"folder": str(args.out), **manifest}}, text, as_json=args.json)
    return DONE


def _attempt(command: Callable[[argparse.Namespace], int], args: argparse.Namespace) -> int:
    """A command that makes steps: ended as by Ctrl-C on SIGTERM, and told where a step fails."""
    from tasks.runtime.process.errors import StepFailed

    signal.signal(signal.SIGTERM, _terminated)
    try:
        return command(args)
    except StepFailed as error:
        return _failed(error, as_json=args.json)


def _failed(error: StepFailed, *, as_json: bool) -> int:
    if as_json:
        print(json.dumps({"ok": False, "problems": [error.problem.as_dict()], "log": error.log}, indent=2))
    else:
        print(f"error: {error}", file=sys.stderr)
    return FAILED


def _terminated(number: int, frame: object) -> NoReturn:
    raise KeyboardInterrupt


def _promote(args: argparse.Namespace) -> int:
    from flows.promotion.promote import command

    return _attempt(command, args)  # a champion that does not load here stays champion


def _choose(args: argparse.Namespace) -> int:
    from flows.commands.choose import command

    return command(args)


def _report(args: argparse.Namespace) -> int:
    from flows.commands.run import show
    from flows.report.build import render
    from flows.run.folder import find_run
    from tasks.runtime.store.local import find_home

    home = find_home()
    folder = find_run(home, args.run)
    render(folder, home)
    show(folder, as_json=args.json)
    if not args.json:
        print(f"  {folder / 'report.html'}")
    return DONE


def _compare(args: argparse.Namespace) -> int:
    from rich.console import Console

    from flows.commands.compare import compare_runs, print_compared
    from flows.run.folder import find_run
    from tasks.runtime.store.local import find_home

    home = find_home()
    found = compare_runs(find_run(home, args.before), find_run(home, args.after), home)
    if args.json:
        print(json.dumps(found.as_dict(), indent=2))
    else:
        print_compared(found, Console())
    return DONE


def _store_ls(args: argparse.Namespace) -> int:
    from flows.commands.store import listed
    from tasks.runtime.store.local import find_home

    rows, text = listed(find_home())
    _print(rows, text, as_json=args.json)
    return DONE


def _store_verify(args: argparse.Namespace) -> int:
    from flows.commands.store import verified
    from tasks.runtime.store.local import find_home

    told, text = verified(find_home())
    _print(told, text, as_json=args.json)
    return FAILED if told["damaged"] else DONE


def _store_gc(args: argparse.Namespace) -> int:
    from flows.commands.store import collect
    from tasks.runtime.store.local import find_home

    told, text = collect(find_home(), remove=args.yes)
    _print(told, text, as_json=args.json)
    return DONE


def _track_sync(args: argparse.Namespace) -> int:
    from flows.tracking.sync import sync
    from tasks.runtime.store.home import open_home
    from tasks.runtime.store.local import find_home

    home = find_home()
    open_home(home)
    written = sync(home, lambda text: print(text, file=sys.stderr))
    _print({"written": written}, f"{len(written)} runs written", as_json=args.json)
    return DONE


def _schemes(args: argparse.Namespace) -> int:
    from flows.commands.schemes import listed_schemes, text

    schemes = listed_schemes()
    _print([one.as_dict() for one in schemes], text(schemes), as_json=args.json)
    return DONE


def _up(args: argparse.Namespace) -> int:
    from flows.service.up import Asked, up
    from tasks.runtime.store.local import find_home

    for number in (signal.SIGTERM, signal.SIGINT):  # a shell's background job starts with SIGINT ignored
        signal.signal(number, _terminated)
    names = ("host", "prefect_port", "mlflow_port", "postgres")
    up(find_home(), Asked(**{name: getattr(args, name) for name in names}), lambda text: print(text, flush=True))
    os._exit(DONE)  # everything has ended; tearing down the modules would take 2 of the 10 s that a stop may


def _parser() -> argparse.ArgumentParser:
    root = argparse.ArgumentParser(prog="quench", description="One recipe in, a 4-bit model with the proof out.")
    commands = root.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, body: Any, text: str, *, recipe: bool = False, under: Any = commands) -> Any:
        parser = under.add_parser(name, help=text, description=text)
        parser.set_defaults(body=body)
        parser.add_argument("--json", action="store_true", help="print JSON")
        if recipe:
            parser.add_argument("recipe", type=Path, help="recipe file")
            parser.add_argument(
                "--set", action="append", default=[], metavar="A.B=C", help="override one field; may be repeated"
            )
            allows(parser)
        return parser

    def allows(parser: Any) -> None:
        text = "file, folder or package with Python that the recipe names and that may run; may be repeated"
        parser.add_argument(FLAG, action="append", default=[], metavar="WHAT", help=text)

    start = command("init", _init, "Write a commented recipe for a model and a data file.")
    start.add_argument("--model", required=True, help="local folder or hub id")
    start.add_argument("--data", required=True, help="file or folder: JSONL, JSON, CSV, parquet")
    start.add_argument("--out", type=Path, default=Path("recipe.yaml"), help="recipe to write")
    start.add_argument("--chat-template", help="chatml or a Jinja file, for a base that has none")
    start.add_argument("--force", action="store_true", help="overwrite")
    checked = command("check", _check, "Check a recipe from config and headers alone.", recipe=True)
    checked.add_argument("--data", action="store_true", help="read all rows too")
    planned = command("plan", _plan, "Show each step as hit or make, and which field differs.", recipe=True)
    ran = command("run", _run, "Run a recipe; running it again resumes.", recipe=True)
    ran.set_defaults(only=[])
    scored = command("evaluate", _run, "Evaluate some arms; nothing is made that they do not need.", recipe=True)
    for parser in (planned, scored):
        text = "arms of the recipe, or `external` for every external model and the base; default: all"
        parser.add_argument("--only", nargs="+", action="extend", default=[], metavar="ARM", help=text)
    for parser in (ran, scored):
        text = "where steps run: on this machine, or on the nodes of a Ray cluster; default: local"
        parser.add_argument("--runner", choices=("local", "ray"), default="local", help=text)
        text = "of the Ray cluster that this machine is in; default: auto"
        parser.add_argument("--address", default="auto", metavar="HOST:PORT", help=text)
    merged = command("merge", _merge, "Merge an adapter into its base; both are folders or hub ids.")
    merged.add_argument("base", metavar="BASE", help="model folder or hub id")
    merged.add_argument("adapter", metavar="ADAPTER", help="PEFT adapter: folder or hub id")
    merged.add_argument("out", type=Path, metavar="OUT", help="folder to write; new or empty")
    merged.add_argument(
        "--onto",
        choices=("dequantized", "original"),
        help="the base's weights as NF4 training had them, or as they are; default: as in training, both if unknown",
    )
    merged.add_argument("--device", choices=("auto", "cpu", "cuda"), default="cpu", help="default: cpu")
    merged.add_argument(
        "--accept-other-base", action="store_true", help="merge although the base is not the one of the record"
    )
    made = command("quantize", _quantize, "Quantize a bf16 model by one scheme; a folder or hub id.")
    made.add_argument("model", metavar="MODEL", help="model folder or hub id")
    made.add_argument("out", type=Path, metavar="OUT", help="folder to write; new or empty")
    made.add_argument("--scheme", required=True, metavar="SLUG", help="`quench schemes` lists them")
    made.add_argument("--backend", help="another backend than the scheme's own")
    made.add_argument("--calibration", type=Path, metavar="ROWS", help="file or folder of rows of any accepted form")
    made.add_argument("--rows", type=int, help="rows to draw, 128 to 512; default: 256, or all of fewer")
    made.add_argument("--seq-len", type=int, default=512, help="tokens a packed sequence; default: 512")
    made.add_argument("--seed", type=int, default=0, help="draws the rows; default: 0")
    made.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: auto")
    shown = command("report", _report, "Print the report of a run.")
    shown.add_argument("run", nargs="?", help="run id or its beginning; default: the latest")
    promoted = command("promote", _promote, "Put a run's candidate through the gate and make it champion.")
    promoted.add_argument("run", nargs="?", help="run id or its beginning; default: the latest")
    promoted.add_argument("--to", type=int, metavar="VERSION", help="make this earlier champion the champion again")
    chosen = command("choose", _choose, "The best arm that fits a card, with the Pareto front.")
    chosen.add_argument("run", nargs="?", help="run id or its beginning; default: the latest")
    chosen.add_argument("--vram", type=float, required=True, metavar="GIB", help="memory of the card")
    chosen.add_argument("--context", type=int, required=True, metavar="TOKENS", help="prompt and answer")
    chosen.add_argument("--batch", type=int, default=1, help="sequences at once; default: 1")
    chosen.add_argument("--engine", choices=("vllm", "transformers", "exllamav2"), help="default: the recipe's")
    compared = command("compare", _compare, "Compare two runs, arm by arm, on the test rows that both have.")
    compared.add_argument("before", help="run id or its beginning, or latest")
    compared.add_argument("after", help="run id or its beginning, or latest")
    exported = command("export", _export, "Copy an arm out of the store, with everything that serves it.")
    exported.add_argument("words", nargs="+", metavar="[RUN] ARM DEST", help="run (default: the latest), arm, folder")
    exported.add_argument("--push", metavar="ORG/NAME", help="then send it to a hub; a new repository is private")
    served = command("up", _up, "Prefect, MLflow and what executes deployments, until Ctrl-C.")
    served.add_argument("--prefect-port", type=int, metavar="N", help="default: 4200, or the next that is free")
    served.add_argument("--mlflow-port", type=int, metavar="N", help="default: 5000, or the next that is free")
    served.add_argument("--host", default="127.0.0.1", help="listen elsewhere than on loopback; says what that exposes")
    served.add_argument(
        "--postgres", metavar="URL", help="in place of SQLite: postgresql://USER:PASSWORD@HOST/DATABASE"
    )
    allows(served)
    command("schemes", _schemes, "List the quantization schemes.")
    store = commands.add_parser("store", help="look into the store").add_subparsers(required=True, metavar="COMMAND")
    command("ls", _store_ls, "List artifacts.", under=store)
    command("verify", _store_verify, "Verify every file's sha256.", under=store)
    freed = command("gc", _store_gc, "Say what no run and no promotion reaches; with --yes, remove it.", under=store)
    freed.add_argument("--yes", action="store_true", help="remove it")
    track = commands.add_parser("track", help="MLflow's view").add_subparsers(required=True, metavar="COMMAND")
    command("sync", _track_sync, "Write to MLflow what it does not have whole, from the runs' records.", under=track)
    return root


if __name__ == "__main__":
    sys.exit(main())
