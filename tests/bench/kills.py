"""`python -m tests.bench.kills`: runs of a small recipe, each with a SIGKILL at a random moment; resumes.

A home starts empty and its recipe is run again and again, each run killed once (the parent, a heavy child, the process
that children are forked from, or the Prefect server of the run), until the last one is left alone. What is then in the
home is compared with a run that nobody disturbed. Writes docs/results/kills.json, one line per kill, and
docs/results/operations.md.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from flows.run.folder import run_files
from tasks.runtime.process.environments import locked_versions
from tasks.runtime.process.events import read_events
from tasks.runtime.process.launch import CHECKOUT
from tasks.runtime.step import hardware
from tasks.runtime.store.local import read_json
from tests.bench import operations
from tests.flows.test_resume import asked, processes_of, wait_gone
from tests.flows.test_run import fingerprints

RESULTS = CHECKOUT / "docs" / "results" / "kills.json"
ARM = "rtn-w4-g128"  # `quench evaluate --only` makes what it needs: eight steps, from prepare to evaluate
WORDS = {
    "parent": "flows.cli",
    "child": "tasks.runtime.process.child run",
    "warm parent": "tasks.runtime.process.child warm",
    "server": "prefect server start",
}
VICTIMS = tuple(WORDS)
KILLS_A_HOME = 3
# tests/jobs/test_train.py, test_a_killed_training_goes_on_exactly: the same curve, point by point.
TOLERANCE = 0.0
VERSIONS = ("torch", "transformers", "prefect", "mlflow")
HANGS_S = 900
RECIPE = """
name: kills
model: {base: base}
data: {path: rows.jsonl, max_length: 128}
train: {rank: 4, learning_rate: 5.0e-3, batch_size: 8, max_steps: 24, checkpoint_steps: 2, dropout: 0.1}
merge: {base: dequantized}
calibrate: {rows: 128, seq_len: 128}
quantize: {schemes: [rtn-w4-g128]}
evaluate: {max_new_tokens: 16, batch_size: 32}
measure: {enabled: false}
"""


@dataclass(frozen=True, kw_only=True)
class Kill:
    """One SIGKILL and what became of it."""

    number: int
    home: int
    victim: str
    moment_s: float
    during: str  # key of the step under way, or `no step`
    kept: int  # steps that were committed before
    exit: int  # of the killed run
    ended_s: float  # from the kill to the end of the run


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a home holds once it was run to its end, against the undisturbed run."""

    home: int
    runs: int
    faults: list[str]
    steps: int
    equal: int  # digests, of those whose inputs have equal digests
    compared: int
    curve_points: int
    curve_off: float  # the largest difference of a loss
    resumed_from_step: int

    @property
    def holds(self) -> bool:
        """Nothing committed was made twice or changed, and all that is compared is equal."""
        return not self.faults and self.equal == self.compared == self.steps and self.curve_off <= TOLERANCE


@dataclass(frozen=True, kw_only=True)
class Undisturbed:
    """The run that nobody killed: seconds, digests of each step and of its inputs, and the loss curve."""

    seconds: float
    steps: Mapping[str, Mapping[str, Any]]
    curve: Mapping[str, float]


@dataclass(kw_only=True)
class Home:
    """A QUENCH_HOME, its recipe, and what was committed at each kill."""

    folder: Path
    recipe: Path
    number: int = 0
    runs: int = 0
    before: list[dict[str, tuple[int, str]]] = field(default_factory=list)

    def start(self) -> subprocess.Popen[bytes]:
        """Start a run; its output goes to run-N.log."""
        self.runs += 1
        env = {name: text for name, text in os.environ.items() if not name.startswith(("PREFECT_", "MLFLOW_"))}
        env |= {"QUENCH_HOME": str(self.folder), "QUENCH_CPU_SLOTS": "1"}
        self.folder.mkdir(exist_ok=True)
        with (self.folder.parent / f"run-{self.runs}.log").open("wb") as log:
            words = [sys.executable, "-m", "flows.cli", "evaluate", str(self.recipe), "--only", ARM]
            return subprocess.Popen(words, cwd=CHECKOUT, env=env, stdout=log, stderr=log, start_new_session=True)

    def log(self) -> str:
        """What the last run said."""
        return (self.folder.parent / f"run-{self.runs}.log").read_text(errors="replace")

    def manifests(self) -> dict[str, dict[str, Any]]:
        """Manifest of each committed step, by key."""
        found = [read_json(path) for path in (self.folder / "store").glob("*/*/manifest.json")]
        return {f"{one['stage']}/{one['slug']}": one for one in found}

    def under_way(self) -> str:
        """Key of the step that a child works on."""
        for words in processes_of(self.folder).values():
            if WORDS["child"] in words:
                stage, name = words.rpartition("partial/")[2].split("/")[:2]
                return f"{stage}/{name.rpartition('-')[0]}"
        return "no step"


def write_recipe(folder: Path) -> Path:
    """The smallest recipe that trains, merges and quantizes: 0.5 M parameters, 24 steps, round-to-nearest."""
    from tests.tiny import write_base

    write_base(folder / "base")
    turns = [
        [
            {"role": "user", "content": f"what colour is book {number} ?"},
            {"role": "assistant", "content": f"the answer is {('blue', 'red', 'green')[number % 3]}"},
        ]
        for number in range(200)
    ]
    lines = "".join(json.dumps({"messages": one}) + "\n" for one in turns)
    (folder / "rows.jsonl").write_text(lines, encoding="utf-8")
    path = folder / "recipe.yaml"
    path.write_text(RECIPE, encoding="utf-8")
    return path


def undisturbed(home: Home) -> Undisturbed:
    """Run the recipe and let it be."""
    clock = time.monotonic()
    code = home.start().wait(HANGS_S)
    if code != 0:
        raise SystemExit(f"the undisturbed run ended with {code}\n{home.log()}")
    there = sorted(home.manifests().items(), key=lambda item: item[1]["finished_at"])
    steps = {key: _digests(one) | {"seconds": one["seconds"]} for key, one in there}
    return Undisturbed(seconds=round(time.monotonic() - clock, 1), steps=steps, curve=_curve(home))


def _digests(manifest: Mapping[str, Any]) -> dict[str, Any]:
    return {"digest": manifest["digest"], "inputs": {name: one["digest"] for name, one in manifest["inputs"].items()}}


def _curve(home: Home) -> dict[str, float]:
    (path,) = (home.folder / "store" / "train").glob("*/files/events.jsonl")
    events = [event for event, _ in read_events(path) if event["kind"] == "metric" and event["name"] == "train/loss"]
    if [event["step"] for event in events] != list(range(1, len(events) + 1)):
        raise SystemExit(f"{path}: a step is missing or told twice")
    return {str(event["step"]): event["value"] for event in events}


def snapshot(home: Home, share: float, plain: Undisturbed) -> tuple[str, float]:
    """Where a share of what a run has left lies, by the undisturbed one: a step, and seconds after its start.

    By steps and not by the clock alone, since the machine is not as fast each time.
    """
    around = (plain.seconds - sum(one["seconds"] for one in plain.steps.values())) / 2
    there = home.manifests()
    ahead = [("start", around), *((key, one["seconds"]) for key, one in plain.steps.items() if key not in there)]
    after = share * sum(seconds for _, seconds in (*ahead, ("end", around)))
    for key, seconds in ahead:
        if after < seconds:
            return key, after
        after -= seconds
    return "end", after


def kill(home: Home, number: int, victim: str, *, share: float, plain: Undisturbed) -> Kill | None:
    """Start a run and kill the victim after a share of what is left to do; returns None where the run ended before."""
    key, after = snapshot(home, share, plain)
    clock, run = time.monotonic(), home.start()
    while run.poll() is None and key not in ("start", home.under_way()):
        there = home.manifests()
        if key in there or (key == "end" and len(there) == len(plain.steps)):
            break
        time.sleep(0.1)
    with contextlib.suppress(subprocess.TimeoutExpired):
        run.wait(after)
    during = _kill(home, run, victim)
    if during is None:
        return None
    killed, kept = time.monotonic(), fingerprints(home.folder)
    code = run.wait(HANGS_S)
    ended = time.monotonic()
    wait_gone(home.folder)
    home.before += [kept, fingerprints(home.folder)]
    return Kill(
        number=number,
        home=home.number,
        victim=victim,
        moment_s=round(killed - clock, 1),
        during=during,
        kept=sum(name.endswith("/manifest.json") for name in kept),
        exit=code,
        ended_s=round(ended - killed, 1),
    )


def _kill(home: Home, run: subprocess.Popen[bytes], victim: str) -> str | None:
    """Kill the victim; returns what was under way, None where the run ended before."""
    while (pid := _victim(home, run, victim)) is not None:
        during = home.under_way()
        with contextlib.suppress(ProcessLookupError):  # it ended by itself: the next one
            os.kill(pid, signal.SIGKILL)
            return during
    return None


def _victim(home: Home, run: subprocess.Popen[bytes], victim: str) -> int | None:
    """Pid of the victim, waiting for one to be there; None where the run has ended."""
    while run.poll() is None:
        if victim == "parent":
            return run.pid
        for pid, words in processes_of(home.folder).items():
            if WORDS[victim] in words:
                return pid
        time.sleep(0.02)
    return None


def outcome(home: Home, plain: Undisturbed) -> Outcome:
    """Let the home's last run end and compare."""
    code = home.start().wait(HANGS_S)
    wait_gone(home.folder)
    found = home.manifests()
    like = {key for key, one in found.items() if _digests(one)["inputs"] == plain.steps[key]["inputs"]}
    curve = _curve(home)
    said = () if code == 0 else (f"the last run ended with {code}: {home.log()[-400:]}",)
    return Outcome(
        home=home.number,
        runs=home.runs,
        faults=[*said, *_faults(home, plain)],
        steps=len(plain.steps),
        equal=sum(found[key]["digest"] == plain.steps[key]["digest"] for key in like),
        compared=len(like),
        curve_points=len(curve),
        curve_off=max(abs(curve[step] - value) for step, value in plain.curve.items()),
        resumed_from_step=found["train/kills"]["result"]["resumed_from_step"],
    )


def _faults(home: Home, plain: Undisturbed) -> Iterator[str]:
    """What may not be, in words."""
    commits = Counter(asked(path) for path in (home.folder / "store").glob("*/*/manifest.json"))
    if len(commits) != len(plain.steps) or set(commits.values()) != {1}:
        yield f"{sum(commits.values())} commits of {len(plain.steps)} steps"
    now = fingerprints(home.folder)
    for number, before in enumerate(home.before):
        if changed := [name for name, one in before.items() if now.get(name) != one]:
            yield f"changed after snapshot {number}: {', '.join(changed)}"
    made = Counter(
        step["key"]
        for path in run_files(home.folder, "steps.json")
        for step in read_json(path)["steps"]
        if step["status"] == "made"
    )
    if twice := [key for key, times in made.items() if times > 1]:
        yield f"made twice: {', '.join(twice)}"
    if rest := [str(path.relative_to(home.folder)) for path in (home.folder / "partial").glob("*/*")]:
        yield f"left in partial/: {', '.join(rest)}"


def one_home(
    folder: Path, number: int, draws: Sequence[tuple[int, str, float]], *, plain: Undisturbed, recipe: Path
) -> tuple[list[Kill], Outcome]:
    """Run an empty home once a draw (number, victim, share of the time), killing; then let it end and compare."""
    home = Home(folder=folder / "home", recipe=recipe, number=number)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    kills: list[Kill] = []
    for draw, victim, share in draws:
        done = kill(home, draw, victim, share=share, plain=plain)
        if done is None:  # it ended before: the home is done
            break
        kills.append(done)
    return kills, outcome(home, plain)


def draw(seed: int, number: int, tried: int = 0) -> tuple[int, str, float]:
    """Victim and moment of a kill: victims in shuffled rounds, so that each comes as often."""
    block = list(VICTIMS)
    random.Random(f"victims {seed} {number // len(VICTIMS)}").shuffle(block)
    return number, block[number % len(VICTIMS)], random.Random(f"moment {seed} {number} {tried}").random()


def series(
    work: Path, *, runs: int, seed: int, told: dict[str, Any], save: Callable[[], None], kills_a_home: int
) -> None:
    """Kill until there are `runs` kills; `told` is what kills.json holds, and is saved after each home."""
    recipe = write_recipe(work / "recipe")
    plain = undisturbed(Home(folder=work / "undisturbed", recipe=recipe))  # each time: the machine may be busier now
    before = told.get("undisturbed", asdict(plain))["steps"]
    if {key: one["digest"] for key, one in before.items()} != {key: one["digest"] for key, one in plain.steps.items()}:
        raise SystemExit("an undisturbed run has other digests than the one in docs/results/kills.json")
    told["undisturbed"] = asdict(plain)
    save()
    while (done := len(told["kills"])) < runs:
        tried = sum(home["kills"] == 0 for home in told["homes"])  # a draw that came too late is not drawn again
        draws = [draw(seed, number, tried) for number in range(done, min(done + kills_a_home, runs))]
        kills, found = one_home(work / "killed", len(told["homes"]), draws, plain=plain, recipe=recipe)
        told["kills"] += map(asdict, kills)
        told["homes"].append({**asdict(found), "holds": found.holds, "kills": len(kills)})
        save()
        print(json.dumps([*map(asdict, kills), asdict(found)]), flush=True)


def main() -> None:
    """Kill, write what became of it."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--runs", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    asked_for = parser.parse_args()
    versions = {name: locked_versions()[name] for name in VERSIONS}
    head = {"seed": asked_for.seed, "hardware": hardware(), "versions": versions, "tolerance": TOLERANCE}
    before = read_json(RESULTS) if RESULTS.exists() else {}
    same = all(before.get(name) == value for name, value in head.items())
    told = before if same else {**head, "kills": [], "homes": []}

    def save() -> None:
        RESULTS.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
        operations.write()

    with tempfile.TemporaryDirectory(prefix="quench-kills-") as work:
        series(Path(work), runs=asked_for.runs, seed=asked_for.seed, told=told, save=save, kills_a_home=KILLS_A_HOME)
    if not all(home["holds"] for home in told["homes"]):
        raise SystemExit("not every home holds: docs/results/kills.json")


if __name__ == "__main__":
    main()
