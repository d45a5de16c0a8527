"""What the orchestration costs: start-up, a step, and a whole run against the same work in one script.

`python -m tests.bench.overheads` on a machine with nothing else on it; writes docs/results/overheads.json and its
section of docs/results/operations.md. `--minutes` is the least that the script of one pair may take.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from tasks.runtime.process.job import Input, Job
from tasks.runtime.process.launch import CHECKOUT, Launcher
from tasks.runtime.process.leases import Leases
from tasks.runtime.step import Context, Limits, Step, hardware, run_step
from tasks.runtime.store.local import Store
from tests.bench import operations

RESULTS = CHECKOUT / "docs" / "results"
RECIPE = CHECKOUT / "recipes" / "quickstart" / "recipe.yaml"
STEPS_A_MINUTE = 120  # of the quickstart's training, on one thread of the machine that it was tuned on
LEAST_STEPS = 4
SHARE = 0.6  # of the wanted minutes that training takes: the rest is prepare to evaluate
ONE_BY_ONE = (  # both sides do one step after the other on one thread; two schemes, no speed
    "run.threads=1",
    "quantize.schemes=[gptq-w4-g128, rtn-w4-g128]",
    "evaluate.on_base=[]",
    "evaluate.kv_cache=[]",
    "measure.enabled=false",
)
READY_S = 180
BODIES = ("prepare", "train", "merge", "evaluate", "quantize")


# ---- start-up


def quench(home: Path, *words: str) -> list[str]:
    """`quench WORDS` as a command line; its environment is `environment(home)`."""
    return [sys.executable, "-m", "flows.cli", *words]


def environment(home: Path) -> dict[str, str]:
    """Of every process here: one CPU slot, so that nothing runs beside anything."""
    plain = {name: text for name, text in os.environ.items() if not name.startswith(("PREFECT_", "QUENCH_"))}
    return {**plain, "QUENCH_HOME": str(home), "QUENCH_CPU_SLOTS": "1", "XDG_STATE_HOME": str(home / "state")}


def run(home: Path, words: Sequence[str]) -> float:
    """Seconds of a command that has to succeed."""
    clock = time.monotonic()
    done = subprocess.run(words, env=environment(home), cwd=CHECKOUT, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(words)} ended with {done.returncode}\n{done.stdout}\n{done.stderr}")
    return time.monotonic() - clock


def up(home: Path) -> float:
    """Seconds from `quench up` to its ready line; it is stopped then."""
    log = home / "up.out"
    clock = time.monotonic()
    with log.open("wb") as out:
        process = subprocess.Popen(quench(home, "up"), env=environment(home), cwd=home, stdout=out, stderr=out)
    try:
        while not re.search(r"^ready ", log.read_text(), flags=re.MULTILINE):
            if process.poll() is not None or time.monotonic() - clock > READY_S:
                raise SystemExit(f"`quench up` did not get ready\n{log.read_text()}")
            time.sleep(0.02)
        return time.monotonic() - clock
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


def start_up(home: Path, sets: Sequence[str], times: int) -> dict[str, list[float]]:
    """Every command `times` times, in turns, in a home where the recipe has run once."""
    recipe = [str(RECIPE), *(word for one in sets for word in ("--set", one))]
    run(home, quench(home, "run", *recipe))
    commands: dict[str, Callable[[], float]] = {
        "quench --help": lambda: run(home, quench(home, "--help")),
        "quench check": lambda: run(home, quench(home, "check", *recipe)),
        "quench plan, all hits": lambda: run(home, quench(home, "plan", *recipe)),
        "quench run, all hits": lambda: run(home, quench(home, "run", *recipe)),
        "quench up, until ready": lambda: up(home),
    }
    found: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(times):
        for name, timed in commands.items():
            found[name].append(timed())
    return found


# ---- a step


def nothing(job: Job) -> dict[str, Any]:
    """A job's body with next to no work."""
    (job.out / "one.txt").write_text("1\n", encoding="utf-8")
    return {}


def empty_step(name: str) -> Step:
    """A step of its own name, so that it is never a hit."""
    return Step(
        stage="nothing", slug=name, entry="tests.bench.overheads:nothing", version=1, params={"name": name}, inputs={}
    )


def steps(home: Path, times: int) -> dict[str, list[float]]:
    """Seconds a step, in turns: the body alone, in a bare child, by run_step, and by Prefect's task around run_step."""
    os.environ.update(environment(home))
    from flows.run.server import OwnServer, prefect_settings

    os.environ.update(prefect_settings(home))
    os.environ["PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL"] = "CRITICAL"
    found: dict[str, list[float]] = {"bare child": [], "run_step": [], "Prefect's task and run_step": []}
    with Launcher() as launcher:
        server = OwnServer(home, launcher)
        server.start()
        server.wait()
        os.environ["PREFECT_API_URL"] = server.api
        context = Context(store=Store(home), launcher=launcher, leases=Leases(home), limits=Limits())
        in_task = _task(context)
        in_task("warm")
        run_step(empty_step("warm-2"), {}, context)
        for number in range(times):
            found["bare child"].append(run(home, [sys.executable, "-P", "-c", "pass"]))
            clock = time.monotonic()
            run_step(empty_step(f"plain-{number}"), {}, context)
            found["run_step"].append(time.monotonic() - clock)
            found["Prefect's task and run_step"].append(in_task(f"task-{number}"))
    return found


def _task(context: Context) -> Callable[[str], float]:
    """A flow with one task around run_step, set as the pipeline's; returns the seconds from submit to result."""
    from prefect import flow, task
    from prefect.cache_policies import NO_CACHE
    from prefect.task_runners import ThreadPoolTaskRunner

    from flows.pipeline import WAITING_TASKS

    @task(cache_policy=NO_CACHE, persist_result=False)
    def make(name: str) -> str:
        return str(run_step(empty_step(name), {}, context).artifact.folder)

    @flow(task_runner=ThreadPoolTaskRunner(max_workers=WAITING_TASKS), persist_result=False)  # pyright: ignore
    def timed(name: str) -> float:
        clock = time.monotonic()
        make.submit(name).result()
        return time.monotonic() - clock

    return timed


def imports(home: Path, times: int) -> dict[str, list[float]]:
    """Seconds of a Python that imports a job's body and ends: a run pays them a step, a script once."""
    return {
        name: [run(home, [sys.executable, "-P", "-c", f"import tasks.jobs.{name}"]) for _ in range(times)]
        for name in BODIES
    }


# ---- a whole run against one script


def script(recipe: Path, sets: Sequence[str], out: Path) -> None:
    """The same job bodies, one after another in this process: no Prefect, no MLflow, no store, no child, no report."""
    from flows.compose import compose, limits
    from flows.pins import pin
    from recipes.read.load import load

    loaded = load(recipe, sets=sets)
    pins = pin(loaded, out)
    made: dict[str, Path] = {}
    execution = limits(loaded.recipe)

    def do(step: Step) -> None:
        folder = out / step.key
        (folder / "files").mkdir(parents=True)
        inputs = {
            name: Input(path=made[one.key] if isinstance(one, Step) else one.path, digest=name, fingerprint=name)
            for name, one in step.inputs.items()
        }
        job = Job(
            stage=step.stage,
            slug=step.slug,
            fingerprint="0" * 64,
            entry=step.entry,
            params=json.loads(json.dumps(dict(step.params))),
            inputs=inputs,
            out=folder / "files",
            checkpoint=folder / "checkpoint",
        )
        module, _, body = step.entry.partition(":")
        result = getattr(import_module(module), body)(job)
        chosen = step.stage == "choose"
        made[step.key] = inputs[result["candidate"]].path if chosen else job.out

    compose(loaded.recipe, pins, do)
    print(f"{len(made)} steps, {execution.threads} thread")


def pair(number: int, sets: Sequence[str], *, first: str) -> dict[str, Any]:
    """Seconds of both, each in an empty folder of its own, one after the other."""
    found: dict[str, Any] = {"pair": number, "first": first}
    for side in (first, "script" if first == "run" else "run"):
        with tempfile.TemporaryDirectory() as folder:
            home = Path(folder)
            words = [str(RECIPE), *(word for one in sets for word in ("--set", one))]
            if side == "run":
                found["run_s"] = run(home, quench(home, "run", *words))
                record = json.loads((home / "runs" / "latest" / "steps.json").read_text())
                assert {one["status"] for one in record["steps"]} == {"made"}
                found["steps"] = len(record["steps"])
            else:
                inner = [sys.executable, "-m", "tests.bench.overheads", "script", *words, "--out", folder]
                found["script_s"] = run(home, inner)
    return {**found, "ratio": found["run_s"] / found["script_s"]}


# ---- all of it


def measure(args: argparse.Namespace, save: Callable[[Mapping[str, Any]], None]) -> Mapping[str, Any]:
    """All figures; saved after each pair."""
    from flows.run.folder import SHOWN_VERSIONS
    from tasks.runtime.process.environments import locked_versions

    train_steps = max(LEAST_STEPS, round(args.minutes * SHARE * STEPS_A_MINUTE))
    sets = [*ONE_BY_ONE, *args.set]
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder) / "home"
        home.mkdir()
        short = [*sets, f"train.max_steps={LEAST_STEPS}"]
        started = start_up(home, short, args.times)
    with tempfile.TemporaryDirectory() as folder:
        step_s = steps(Path(folder), args.times)
        import_s = imports(Path(folder), args.times)
    long = [*sets, f"train.max_steps={train_steps}"]
    words = f"--minutes {args.minutes:g} --times {args.times} --pairs {args.pairs}"
    told: dict[str, Any] = {
        "command": f"python -m tests.bench.overheads {words}",
        "hardware": hardware(),
        "versions": {name: locked_versions()[name] for name in SHOWN_VERSIONS},
        "train_steps": train_steps,
        "start_up_s": started,
        "step_s": step_s,
        "import_s": import_s,
        "pairs": [],
    }
    for number in range(args.pairs):
        told["pairs"].append(pair(number, long, first=("run", "script")[number % 2]))
        save(told)  # a pair takes half an hour
    return told


def _parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    if (argv or sys.argv[1:])[:1] == ["script"]:
        inner = argparse.ArgumentParser()
        inner.add_argument("word", choices=["script"])
        inner.add_argument("recipe", type=Path)
        inner.add_argument("--set", action="append", default=[])
        inner.add_argument("--out", type=Path, required=True)
        return inner.parse_args(argv)
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=15.0, help="of work in one script")
    parser.add_argument("--times", type=int, default=9, help="times that each command and each step is timed")
    parser.add_argument("--pairs", type=int, default=6, help="of run and script")
    parser.add_argument("--set", action="append", default=[], help="more of the recipe, both sides")
    parser.add_argument("--only-imports", action="store_true", help="time these anew, in the overheads.json there is")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of overheads.json and operations.md")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and write; or be the script."""
    args = _parsed(argv)
    if hasattr(args, "recipe"):
        script(args.recipe, args.set, args.out)
        sys.stdout.flush()
        os._exit(0)  # as children end
    args.out.mkdir(parents=True, exist_ok=True)

    def save(told: Mapping[str, Any]) -> None:
        (args.out / "overheads.json").write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
        operations.write(args.out)

    if args.only_imports:
        told = json.loads((args.out / "overheads.json").read_text())
        with tempfile.TemporaryDirectory() as folder:
            save(told | {"import_s": imports(Path(folder), args.times)})
    else:
        measure(args, save)
    print(f"wrote {args.out / 'overheads.json'}")


if __name__ == "__main__":
    main()
