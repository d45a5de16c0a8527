"""`make models`: a tiny random model of each architecture of today through every step; writes docs/models.md.

torch is imported once; each group of steps then runs in a forked process with a time limit, so that a step that ends
its process (os._exit, a segfault) ends nothing else. Results are kept by architecture in a work folder: the command
goes on where it was stopped. `--only NAME` takes one architecture, `--again` forgets its results, `--render` runs
nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from typing import Any

from tasks.runtime.process.environments import locked_versions
from tasks.runtime.process.launch import CHECKOUT, child_env
from tasks.runtime.step import hardware
from tests.bench.models_page import SEED, page

PAGE = CHECKOUT / "docs" / "models.md"
WORK = CHECKOUT / ".quench" / "models"
LIMIT_S = 600  # of one forked process; a whole architecture takes some 120 s on a free core
VERSIONS = ("torch", "transformers", "peft", "trl", "bitsandbytes", "gptqmodel")
# Steps that share a process: what GPTQModel changes in transformers when it is imported stays with the schemes.
GROUPS = (
    ("base", "check", "prepare", "train", "merge", "baseline"),
    ("gptq", "awq", "rtn", "ct"),
    ("export",),
)
Results = dict[str, Any]


def read(folder: Path) -> Results:
    """What is known of an architecture."""
    path = folder / "result.json"
    if not path.exists():
        return {"steps": {}, "running": None}
    # Messages name files: on the page without the folder of this machine.
    return json.loads(path.read_text(encoding="utf-8").replace(f"{path.resolve().parents[1]}/", ""))


def write(folder: Path, results: Results) -> None:
    """Keep it, whole or not at all."""
    draft = folder / "result.draft.json"
    draft.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    draft.replace(folder / "result.json")


def forked(body: Callable[[], None], *, log: Path, limit_s: float = LIMIT_S) -> str | None:
    """Run a body in a forked process.

    Returns:
        How it ended, where that was not by itself.
    """
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        os.setsid()
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, 1)
        os.dup2(file, 2)
        code = 70
        try:
            body()
            code = 0
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    return _awaited(child, time.monotonic() + limit_s, limit_s)


def _awaited(child: int, deadline: float, limit_s: float) -> str | None:
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            code = os.waitstatus_to_exitcode(status)
            name = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            return None if code == 0 else f"the process ended with {name}"
        if time.monotonic() > deadline:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return f"it took more than {limit_s:.0f} s"
        time.sleep(0.1)


def run_group(folder: Path, name: str, steps: Sequence[str]) -> None:
    """In the forked process: steps in turn, until one fails behind others, which is then done again alone."""
    from tests.bench.model_steps import Bench

    bench = Bench(folder, name)
    for place, step in enumerate(steps):
        results = read(folder)
        results["running"] = {"step": step, "first": place == 0}
        write(folder, results)
        clock = time.monotonic()
        outcome = one_step(bench, step, results)
        outcome["seconds"] = round(time.monotonic() - clock, 1)
        results["running"] = None
        failed = outcome["state"] == "failed"
        if not (failed and place):
            results["steps"][step] = outcome
        write(folder, results)
        print(f"---- {step}: {outcome}", flush=True)
        if failed:
            return


def one_step(bench: Any, step: str, results: Results) -> Results:
    """Its figures, or how it ended."""
    from recipes.problem import RecipeError
    from tasks.runtime.process.errors import StageError
    from tests.bench.model_steps import NEEDS, STEPS, Fault, refusal

    missing = [need for need in NEEDS.get(step, ()) if results["steps"].get(need, {}).get("state") != "works"]
    if missing:
        return {"state": "not reached", "because": f"no {missing[0]}"}
    try:
        return {"state": "works", **STEPS[step](bench)}
    except (StageError, RecipeError) as error:
        return {"state": "refused", "type": type(error).__name__, **refusal(error), **phase(error)}
    except Exception as error:  # the child's top: whatever a library raises is what the page is about
        traceback.print_exc()
        where = "" if isinstance(error, Fault) else place_of(error)
        kind = "wrong" if isinstance(error, Fault) else type(error).__name__
        return {"state": "failed", "type": kind, "what": first_line(error), "where": where, **phase(error)}


def first_line(error: BaseException) -> str:
    """Of its message, 300 characters."""
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else "(no message)"


def place_of(error: BaseException) -> str:
    """Where it was raised, and the last of our own lines that led there."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "/tasks/" in frame.filename or "/recipes/" in frame.filename]
    shown = [*ours[-1:], frames[-1]] if ours and ours[-1] is not frames[-1] else [frames[-1]]
    return ", ".join(f"{Path(frame.filename).name}:{frame.lineno} in {frame.name}" for frame in shown)


def phase(error: BaseException) -> dict[str, str]:
    """`evaluate` where a scheme or merge was made and its evaluation failed."""
    names = {frame.name for frame in traceback.extract_tb(error.__traceback__)}
    return {"phase": "evaluate"} if "_evaluated" in names else {}


def take(folder: Path, name: str, *, title: str, place: int) -> Results:
    """All steps of an architecture that have no result yet; `place` is its row on the page."""
    folder.mkdir(parents=True, exist_ok=True)
    started = {"date": date.today().isoformat(), "code": _code()}
    write(folder, {**started, **read(folder), "name": name, "title": title, "place": place, "running": None})
    for group in GROUPS:
        while pending := [step for step in group if step not in read(folder)["steps"]]:
            ended = forked(lambda steps=pending: run_group(folder, name, steps), log=folder / "log.txt")
            if ended:
                died(folder, ended)
    results = read(folder)
    for made in folder.iterdir():  # weights; rows, recipe, log and result stay
        if made.is_dir():
            shutil.rmtree(made)
    return results


def _code() -> str:
    """The commit of this checkout; with a + where it has changes."""
    git = ["git", "-C", str(CHECKOUT), "describe", "--always", "--abbrev=10", "--dirty=+", "--exclude=*"]
    return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()


def died(folder: Path, how: str) -> None:
    """A process ended in the middle of a step: the step failed, or is done again alone."""
    results = read(folder)
    running = results["running"]
    if running is None:
        raise SystemExit(f"{folder.name}: {how}, outside of any step; see {folder / 'log.txt'}")
    if running["first"]:
        lines = (folder / "log.txt").read_text(encoding="utf-8", errors="replace").splitlines()
        told = [line.strip() for line in lines[-60:] if "Error" in line or "error" in line]
        results["steps"][running["step"]] = {
            **{"state": "failed", "type": "the process ended", "what": how},
            "where": told[-1][:300] if told else "",
        }
    results["running"] = None
    write(folder, results)


def render(work: Path, out: Path) -> None:
    """Write the page from what is known."""
    results = sorted((read(path.parent) for path in work.glob("*/result.json")), key=lambda result: result["place"])
    machine, locked = hardware(), locked_versions()
    dates = [result["date"] for result in results if "date" in result]
    conditions = {
        "seed": str(SEED),
        "date": " to ".join(sorted({min(dates), max(dates)})) if dates else "no results",
        "code": ", ".join(sorted({result["code"] for result in results if "code" in result})),
        "machine": f"{machine['cpu']}, {machine['cores']} cores, no GPU",
        "versions": ", ".join(f"{name} {locked[name]}" for name in VERSIONS),
    }
    out.write_text(page(results, conditions), encoding="utf-8")


def main() -> None:
    """Measure what has no result, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", action="append", metavar="NAME", help="one architecture; may be given again")
    parser.add_argument("--again", action="store_true", help="forget the results of what is taken")
    parser.add_argument("--render", action="store_true", help="run nothing")
    parser.add_argument("--work", type=Path, default=WORK)
    parser.add_argument("--out", type=Path, default=PAGE)
    args = parser.parse_args()
    os.environ.update(child_env(threads=1))
    if not args.render:
        from tests.bench.architectures import ARCHITECTURES

        names = list(args.only or ARCHITECTURES)
        if unknown := sorted(set(names) - set(ARCHITECTURES)):
            parser.error(f"no architecture is called {', '.join(unknown)}; there are {', '.join(ARCHITECTURES)}")
        _import_jobs()
        for name in names:
            folder = args.work / name
            if args.again:
                shutil.rmtree(folder, ignore_errors=True)
            results = take(folder, name, title=ARCHITECTURES[name].title, place=list(ARCHITECTURES).index(name))
            states = {step: outcome["state"] for step, outcome in results["steps"].items()}
            print(name, states, flush=True)
    render(args.work, args.out)
    print(f"wrote {args.out}")


def _import_jobs() -> None:
    """What most children need, before the first is forked. GPTQModel starts threads when it is imported: not here."""
    import tests.bench.model_steps  # noqa: F401


if __name__ == "__main__":
    main()
