"""The `quench` command. Exit codes: 0 done, 1 something failed or the answer is no, 2 bad input, 130 interrupted.

Each command names the module that is its body, most of them in flows/commands/, and only that one is imported:
`quench check` must not wait for Prefect.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from flows.commands.terminal import BAD_INPUT, FAILED, INTERRUPTED, Output, refusal, say
from flows.run.credentials import take_out_password
from recipes.checks.python import FLAG, allow
from recipes.problem import Problem, RecipeError
from tasks.runtime.process.disk import full, is_full
from tasks.runtime.process.errors import StepFailed
from tasks.runtime.process.user import settle_user
from tasks.runtime.store.home import home_folder
from tasks.runtime.store.local import find_home


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, run one command, print its output, turn errors into exit codes."""
    args = _parser().parse_args(argv)
    os.environ["DO_NOT_TRACK"] = "true"  # MLflow takes no other word for it
    take_out_password()
    allow(getattr(args, "allow_python", []))
    if args.runs_steps:
        signal.signal(signal.SIGTERM, _interrupt)
    try:
        for line in settle_user(home_folder()):
            say(f"note: {line}")
        output = getattr(importlib.import_module(args.module), args.function)(args)
        _print(output, as_json=args.json)
        return output.code
    except RecipeError as error:
        _refuse(error.problems, as_json=args.json)
        return BAD_INPUT
    except StepFailed as error:
        _failed(error, as_json=args.json)
        return FAILED
    except OSError as error:
        return _no_space(error)
    except KeyboardInterrupt:
        say("stopped; what had finished is kept: the same command resumes")
        return INTERRUPTED


def _print(output: Output, *, as_json: bool) -> None:
    """Print; whoever reads it may stop before its end, as `head` does. The command was done by then."""
    try:
        output.print(as_json=as_json)
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more when it ends


def _interrupt(number: int, frame: object) -> NoReturn:
    """SIGTERM ends a command as Ctrl-C does."""
    raise KeyboardInterrupt


def _refuse(problems: Sequence[Problem], *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(refusal(problems), indent=2))
        return
    for problem in problems:
        say(f"error: {problem}\n")
    say(f"{len(problems)} problem{'s' if len(problems) > 1 else ''}; nothing was started")


def _failed(error: StepFailed, *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(refusal([error.problem], log=error.log), indent=2))
    else:
        say(f"error: {error}")


def _no_space(error: OSError) -> int:
    if not is_full(error):
        raise error
    home = find_home()
    say(f"error: {full(home, error.filename or str(home))}")
    return FAILED


# ---- the parser: one function per group of commands


def _parser() -> argparse.ArgumentParser:
    root = argparse.ArgumentParser(prog="quench", description="One recipe in, a 4-bit model with the proof out.")
    commands = root.add_subparsers(required=True, metavar="COMMAND")
    _add_recipe_commands(commands)
    _add_model_commands(commands)
    _add_run_commands(commands)
    _add_services(commands)
    _add_store_commands(commands)
    return root


def _add(
    commands: Any, name: str, module: str, text: str, *, function: str = "command", runs_steps: bool = False
) -> Any:
    """Add one command; its body is a function of a module below flows."""
    parser = commands.add_parser(name, help=text, description=text)
    parser.set_defaults(module=f"flows.{module}", function=function, runs_steps=runs_steps)
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def _add_recipe_commands(commands: Any) -> None:
    init = _add(commands, "init", "commands.init", "Write a commented recipe for a model and a data file.")
    init.add_argument("--model", required=True, help="local folder or hub id")
    init.add_argument("--data", required=True, help="file or folder: JSONL, JSON, CSV, parquet")
    init.add_argument("--out", type=Path, default=Path("recipe.yaml"), help="recipe to write; default: recipe.yaml")
    init.add_argument("--chat-template", help="chatml or a Jinja file, for a base that has none")
    init.add_argument("--force", action="store_true", help="overwrite the recipe")
    text = "what the rows mean, for example data.columns='{prompt: ask, completion: say}'; may be repeated"
    init.add_argument("--set", action="append", default=[], metavar="DATA.A=B", help=text)
    _add_machine(init, "fit the recipe to")
    check = _add(commands, "check", "commands.check", "Check a recipe against the base's config and headers.")
    check.add_argument("--data", action="store_true", help="read all rows, too")
    show = _add(
        commands, "show", "commands.show", "Show rows as they are trained: the whole text, the trained part marked."
    )
    which = show.add_mutually_exclusive_group()
    text = "a row's name or its beginning, or its place: rows.jsonl:17; also one that is left out, with the reason"
    which.add_argument("--row", metavar="ID", help=text)
    which.add_argument("--split", choices=("train", "dev", "test"), default="train", help="default: train")
    show.add_argument("-n", type=_count, default=3, dest="count", metavar="N", help="rows at most; default: 3")
    plan = _add(commands, "plan", "commands.plan", "Show for each step whether it is a hit or is made, and why.")
    _add_machine(plan, "predict every step on")
    run = _add(commands, "run", "commands.run", "Run a recipe; run it again to resume.", runs_steps=True)
    run.set_defaults(only=[])
    text = "Evaluate some arms of a recipe; only what they need is made."
    evaluate = _add(commands, "evaluate", "commands.run", text, runs_steps=True)
    for parser in (check, show, plan, run, evaluate):
        parser.add_argument("recipe", type=Path, help="recipe file")
        text = "override one field; may be repeated"
        parser.add_argument("--set", action="append", default=[], metavar="A.B=C", help=text)
    for parser in (check, plan, run, evaluate):
        _add_allow_python(parser)
    for parser in (plan, evaluate):
        text = "arms of the recipe, or `external` for every external model and the base; default: all"
        parser.add_argument("--only", nargs="+", action="extend", default=[], metavar="ARM", help=text)
    for parser in (run, evaluate):
        text = "run the steps on this machine, or on the nodes of a Ray cluster; default: local"
        parser.add_argument("--runner", choices=("local", "ray"), default="local", help=text)
        text = "address of the Ray cluster that this machine has joined; default: auto"
        parser.add_argument("--address", default="auto", metavar="HOST:PORT", help=text)


def _add_machine(parser: Any, purpose: str) -> None:
    """A machine with a GPU that need not be here."""
    text = f"{purpose} a GPU with so much free memory, here or not; nothing is started"
    parser.add_argument("--gpu-gib", type=_gib, metavar="GIB", help=text)
    parser.add_argument("--gpus", type=_count, metavar="N", help="GPUs of that machine; default: 1")
    parser.add_argument("--host-gib", type=_gib, metavar="GIB", help="its free host memory; default: enough")


def _gib(text: str) -> float:
    """A size above 0."""
    try:
        size = float(text)
    except ValueError:
        size = 0.0
    if not 0 < size < 1e6:
        raise argparse.ArgumentTypeError(f"{text} is no size in GiB")
    return size


def _count(text: str) -> int:
    """A number from 1 on."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is no number from 1 on")
    return int(text)


def _port(text: str) -> int:
    """A TCP port."""
    if not text.isdecimal() or not 0 < int(text) < 65_536:
        raise argparse.ArgumentTypeError(f"{text} is no port: 1 to 65535")
    return int(text)


def _add_allow_python(parser: Any) -> None:
    text = "file, folder or package with Python that the recipe names and that may run; may be repeated"
    parser.add_argument(FLAG, action="append", default=[], metavar="WHAT", help=text)


def _add_model_commands(commands: Any) -> None:
    merge = _add(commands, "merge", "commands.merge", "Merge an adapter into its base.", runs_steps=True)
    merge.add_argument("base", metavar="BASE", help="model folder or hub id")
    merge.add_argument("adapter", metavar="ADAPTER", help="PEFT adapter: folder or hub id")
    merge.add_argument("out", type=Path, metavar="OUT", help="folder to write; new or empty")
    text = "weights to add to: as NF4 training saw them, or as they are; default: as in training, both if unknown"
    merge.add_argument("--onto", choices=("dequantized", "original"), help=text)
    text = "merge even if the adapter was trained on another base"
    merge.add_argument("--accept-other-base", action="store_true", help=text)
    quantize = _add(commands, "quantize", "commands.quantize", "Quantize a bf16 model by one scheme.", runs_steps=True)
    quantize.add_argument("model", metavar="MODEL", help="model folder or hub id")
    quantize.add_argument("out", type=Path, metavar="OUT", help="folder to write; new or empty")
    quantize.add_argument("--scheme", required=True, metavar="SLUG", help="`quench schemes` lists them")
    quantize.add_argument("--backend", help="use another backend than the scheme's own")
    quantize.add_argument("--calibration", type=Path, metavar="ROWS", help="file or folder of calibration rows")
    quantize.add_argument("--rows", type=int, help="rows to draw, 128 to 512; default: 256, or all if there are fewer")
    quantize.add_argument("--seq-len", type=int, default=512, help="tokens per packed sequence; default: 512")
    quantize.add_argument("--seed", type=int, default=0, help="seed of the drawn rows and the quantizer; default: 0")
    quantize.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: auto")


def _add_run_commands(commands: Any) -> None:
    report = _add(commands, "report", "commands.report", "Print the report of a run.")
    text = "Put a run's candidate through the gate and make it champion."
    promote = _add(commands, "promote", "commands.promote", text, runs_steps=True)
    promote.add_argument("--to", type=int, metavar="VERSION", help="make this earlier champion the champion again")
    text = "Say what runs in production; exit code 1 where there is no champion."
    champion = _add(commands, "champion", "commands.champion", text)
    text = "model name, or a recipe that has one; default: list every name"
    champion.add_argument("name", nargs="?", metavar="NAME", help=text)
    choose = _add(commands, "choose", "commands.choose", "Name the best arm that fits a card, with the Pareto front.")
    for parser in (report, promote, choose):
        parser.add_argument("run", nargs="?", help="run id or its beginning; default: the latest")
    choose.add_argument("--vram", type=float, required=True, metavar="GIB", help="memory of the card, or of each")
    choose.add_argument("--context", type=int, required=True, metavar="TOKENS", help="prompt and answer together")
    choose.add_argument("--batch", type=int, default=1, help="sequences at once; default: 1")
    choose.add_argument("--engine", choices=("vllm", "transformers", "exllamav2"), help="default: the recipe's")
    split = "cards that vLLM splits each layer over; default: the recipe's serve.tensor_parallel"
    choose.add_argument("--tensor-parallel", type=int, metavar="CARDS", help=split)
    text = "Print the one line that repeats a step's job with its environment, or run it in this terminal."
    debug = _add(commands, "debug", "commands.debug", text)
    text = "stage/slug, a part of it, or the folder of an attempt; default: the step that failed"
    debug.add_argument("step", nargs="?", metavar="STEP", help=text)
    debug.add_argument("--run", metavar="RUN", help="run id or its beginning; default: the latest")
    how = debug.add_mutually_exclusive_group()
    how.add_argument("--go", action="store_true", help="run it here: breakpoint() works")
    how.add_argument("--pdb", action="store_true", help="run it here, and open pdb where it raises")
    compare = _add(commands, "compare", "commands.compare", "Compare two runs on the rows that both scored.")
    compare.add_argument("before", help="run id or its beginning, or latest")
    compare.add_argument("after", help="run id or its beginning, or latest")
    text = "test is what is published and gates; dev is for tuning; default: test"
    compare.add_argument("--split", choices=("test", "dev"), default="test", help=text)
    text = "Say which differences between published scores their n can bear. (Packages: `make audit`.)"
    audit = _add(commands, "audit", "commands.audit", text)
    text = "CSV with the columns name, metric, n, score, base score; also lost score, recovery, difference, sd"
    audit.add_argument("table", type=Path, metavar="TABLE.csv", help=text)
    text = "Copy an arm out of the store, with everything that is needed to serve it."
    export = _add(commands, "export", "commands.export", text, runs_steps=True)
    export.add_argument("words", nargs="+", metavar="[RUN] ARM DEST", help="run (default: the latest), arm, folder")
    export.add_argument("--push", metavar="ORG/NAME", help="then push it to a hub; a new repository is private")
    text = "Start an engine's server on an arm, and print its URL when it answers; Ctrl-C ends it."
    serve = _add(commands, "serve", "commands.serve", text, runs_steps=True)
    text = "run (default: the latest) and arm; or the champion of a registered model: NAME@champion"
    serve.add_argument("words", nargs="+", metavar="[RUN] ARM", help=text)
    text = "transformers reads more schemes on a CPU, and is slow; default: vllm"
    serve.add_argument("--engine", choices=("vllm", "transformers"), default="vllm", help=text)
    serve.add_argument("--port", type=_port, default=8000, metavar="N", help="default: 8000")
    text = "address to listen at; any other than loopback prints what that exposes; default: 127.0.0.1"
    serve.add_argument("--host", default="127.0.0.1", help=text)
    text = "tokens of prompt and answer; default: serve.max_model_len of the recipe, or the model's context"
    serve.add_argument("--max-model-len", type=_count, metavar="N", help=text)


def _add_services(commands: Any) -> None:
    text = "Start Prefect, MLflow and the worker that executes deployments; Ctrl-C ends them."
    up = _add(commands, "up", "service.up", text, runs_steps=True)
    up.add_argument("--prefect-port", type=int, metavar="N", help="default: 4200, or the next free port")
    up.add_argument("--mlflow-port", type=int, metavar="N", help="default: 5000, or the next free port")
    text = "address to listen at; any other than loopback prints what that exposes; default: 127.0.0.1"
    up.add_argument("--host", default="127.0.0.1", help=text)
    text = "use this database instead of SQLite: postgresql://USER:PASSWORD@HOST/DATABASE"
    up.add_argument("--postgres", metavar="URL", help=text)
    _add_allow_python(up)
    track = commands.add_parser("track", help="MLflow's view").add_subparsers(required=True, metavar="COMMAND")
    _add(track, "sync", "commands.track", "Write every run to MLflow that it lacks or has in part.")


def _add_store_commands(commands: Any) -> None:
    _add(commands, "schemes", "commands.schemes", "List the quantization schemes.")
    store = commands.add_parser("store", help="look into the store").add_subparsers(required=True, metavar="COMMAND")
    _add(store, "ls", "commands.store", "List the artifacts.", function="ls")
    _add(store, "verify", "commands.store", "Verify every file's sha256.", function="verify")
    text = "Say what takes the room, by stage, run and age; what gc would free, and what keeps the rest."
    _add(store, "du", "commands.store_du", text)
    text = "List what no run and no promotion reaches; with --yes, remove it."
    gc = _add(store, "gc", "commands.store", text, function="gc")
    gc.add_argument("--yes", action="store_true", help="remove it")


if __name__ == "__main__":
    sys.exit(main())
