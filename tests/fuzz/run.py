"""`python -m tests.fuzz.run`: all cases of all kinds; prints a table and writes docs/results/fuzz.md.

A failing case prints its kind and number, and leaves the smallest input that shows the same fault below --out.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tasks.runtime.process.environments import locked_versions
from tasks.runtime.process.launch import CHECKOUT
from tasks.runtime.step import hardware
from tests.fuzz.door import (
    ADDRESS_SPACE,
    GROWTH_MIB,
    HANGS_S,
    SECONDS,
    by_process,
    limit_memory,
    peak_mib,
    through,
)
from tests.fuzz.kinds import KINDS, Kind

PAGE = CHECKOUT / "docs" / "results" / "fuzz.md"
MEASURED = PAGE.with_suffix(".json")  # of each kind, the last time that all its cases ran
TRIES = 400  # inputs that are tried to make a failing one small
PACKAGES = ("pydantic", "pyyaml", "pyarrow", "safetensors", "transformers")
# Faults that were mended after their kind was measured -> the test of that kind.
MENDED = {"IndexError in recipes/plain_yaml.py:104 _measure": "tests/recipes/read/test_strange_yaml.py"}
ONE_IN = 200  # cases are repeated by a process of their own


@dataclass(kw_only=True)
class Tally:
    """What the cases of one kind came to."""

    cases: int = 0
    passed: int = 0
    refused: int = 0
    processes: int = 0
    asked: int = 0
    slowest_s: float = 0.0
    wall_s: float = 0.0
    before_mib: float = 0.0
    peak_mib: float = 0.0
    faults: dict[str, list[int]] = field(default_factory=dict)
    said: int = 0


def environment(folder: Path) -> dict[str, str]:
    """No home, cache or terminal of whoever runs it."""
    return {
        **os.environ,
        "QUENCH_HOME": str(folder / "home"),
        "HOME": str(folder),
        "XDG_CACHE_HOME": str(folder / "cache"),
        "HF_HUB_OFFLINE": "1",
    }


def cases(
    kind: Kind, numbers: Sequence[int], *, out: Path | None = None, loud: bool = False, minutes: float | None = None
) -> Tally:
    """Run these cases of a kind in this process.

    Args:
        kind: Of input.
        numbers: Of the cases.
        out: Where the smallest inputs of faults go; None makes none small.
        loud: Print how far it is.
        minutes: No case begins after so many.
    """
    tally = Tally(before_mib=peak_mib())
    said: set[str] = set()
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="quench-fuzz-") as temporary:
        folder = Path(temporary)
        env = environment(folder)
        os.environ.update(env)
        kind.place(folder)
        for done, number in enumerate(numbers, start=1):
            if minutes is not None and time.perf_counter() - began > 60 * minutes:
                break
            content = kind.make(number)
            kind.write(folder, number, content)
            outcome = through(kind.argv(folder, number), _then(kind, folder, number))
            tally.cases += 1
            tally.asked += outcome.asked
            tally.slowest_s = max(tally.slowest_s, outcome.seconds)
            fault, detail = outcome.fault, outcome.detail
            if not fault:
                tally.passed += outcome.code == 0
                tally.refused += outcome.code == 2
                said.update(outcome.problems)
                if number % ONE_IN == 0:
                    tally.processes += 1
                    fault = detail = by_process(kind.argv(folder, number), env=env)
            if fault:
                first = fault not in tally.faults
                tally.faults.setdefault(fault, []).append(number)
                if first and loud:
                    print(f"FAULT {kind.name} --case {number}: {fault}\n{detail[-3000:]}", flush=True)
                if first and out:
                    _keep(kind, folder, number, fault, out)
            if loud and done % 500 == 0:
                print(f"{kind.name}: {done:,} of {len(numbers):,}, {tally.passed:,} passed", flush=True)
    tally.said, tally.wall_s, tally.peak_mib = len(said), time.perf_counter() - began, peak_mib()
    return tally


def _then(kind: Kind, folder: Path, number: int) -> Any:
    return None if kind.then is None else lambda: kind.then and kind.then(folder, number)


def _keep(kind: Kind, folder: Path, number: int, fault: str, out: Path) -> None:
    """Write the smallest input with the same fault."""
    content, tries = kind.make(number), 0
    again = True
    while again and tries < TRIES and not fault.startswith(("too slow", "peak")):
        again = False
        for smaller in kind.smaller(content):
            tries += 1
            if tries >= TRIES:
                break
            kind.write(folder, number, smaller)
            if (
                len(smaller) < len(content)
                and through(kind.argv(folder, number), _then(kind, folder, number)).fault == fault
            ):
                content, again = smaller, True
                break
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{kind.name}-{number}"
    path.write_bytes(content)
    print(f"  smallest ({len(content)} bytes): {path}", flush=True)


def main() -> int:
    """Run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=tuple(KINDS), action="append", help="kind of input; default: all")
    parser.add_argument("--case", type=int, help="one case alone, its file printed")
    parser.add_argument("--cases", type=int, help="so many of each kind in place of all")
    parser.add_argument("--minutes", type=float, help="begin no case of a kind after so many; the page counts them")
    parser.add_argument("--start", type=int, default=0, help="number of the first case; default: 0")
    parser.add_argument("--out", type=Path, default=Path(tempfile.gettempdir()) / "quench-fuzz", help="of faults")
    parser.add_argument("--json", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case is not None:
        for name in args.only or ():
            sys.stdout.buffer.write(KINDS[name].make(args.case) + b"\n")
            sys.stdout.flush()
            print(asdict(cases(KINDS[name], [args.case], out=args.out, loud=True)))
        return 0
    if args.json:
        limit_memory()
        kind = KINDS[args.only[0]]
        numbers = range(args.start, args.start + (args.cases or kind.cases))
        tally = cases(kind, numbers, out=args.out, loud=True, minutes=args.minutes)
        args.json.write_text(json.dumps(asdict(tally)), encoding="utf-8")
        return 1 if tally.faults else 0
    tallies = {name: _of_process(name, args) for name in args.only or KINDS}
    print("\n".join(table(tallies)))
    for name, tally in tallies.items():
        for fault, numbers in tally.faults.items():
            print(f"{name}: {fault}: {len(numbers)} cases, the first is --only {name} --case {numbers[0]}")
    if args.cases is None and args.start == 0:
        publish(tallies)
    return 1 if any(tally.faults for tally in tallies.values()) else 0


def _of_process(name: str, args: argparse.Namespace) -> Tally:
    """One kind in a process of its own: its peak memory is its own, and a crash ends it alone."""
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "tally.json"
        words = ["--only", name, "--json", str(answer), "--out", str(args.out), "--start", str(args.start)]
        words += ["--cases", str(args.cases)] if args.cases else []
        words += ["--minutes", str(args.minutes)] if args.minutes else []
        done = subprocess.run([sys.executable, "-m", "tests.fuzz.run", *words], cwd=CHECKOUT, check=False)
        if not answer.exists():
            return Tally(faults={f"the process ended with {done.returncode}": [args.start]})
        return Tally(**json.loads(answer.read_text(encoding="utf-8")))


def publish(tallies: dict[str, Tally]) -> None:
    """Keep what was measured, and write the page of all that has been."""
    kept = json.loads(MEASURED.read_text(encoding="utf-8")) if MEASURED.exists() else {}
    kept |= {name: {**asdict(one), "hardware": hardware()} for name, one in tallies.items()}
    MEASURED.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    PAGE.write_text("\n".join(page(kept)) + "\n", encoding="utf-8")
    print(f"wrote {PAGE.relative_to(CHECKOUT)}")


HEAD = """# Mutated input

<!-- Written by `make fuzz`; edit tests/fuzz/run.py instead. -->

What `quench check` and the memory prediction of `quench plan` do with files that nobody meant to write: no traceback,
exit code 0 or 2, each refusal with what, where, why and next. A case takes at most {seconds} s of CPU time,
and {hangs} s by the clock where it asks transformers in a child process (for defaults of a model type, or names of
modules). It adds at most {growth} MiB to the peak memory of its process, which can ask for {space} GiB of addresses.

A case is a function of its kind and its number, which is the seed: `python -m tests.fuzz.run --only KIND --case N`
makes it again. All of a kind run in one process by the command's own function; one in {one_in} is repeated
as a process.
"""


def table(tallies: dict[str, Tally]) -> Iterator[str]:
    """Markdown."""
    heads = ("input", "cases", "passed", "refused", "faults", "slowest, CPU s", "with a child")
    yield f"| {' | '.join((*heads, 'peak memory, MiB', 'all, s'))} |"
    yield f"| --- |{' ---: |' * (len(heads) + 1)}"
    for name, one in tallies.items():
        faults = sum(map(len, one.faults.values()))
        yield (
            f"| {name} | {one.cases:,} | {one.passed:,} | {one.refused:,} | {faults:,} | {one.slowest_s:.2f} | "
            f"{one.asked:,} | {one.peak_mib:.0f} | {one.wall_s:.0f} |"
        )


def page(kept: dict[str, Any]) -> Iterator[str]:
    """docs/results/fuzz.md."""
    space = ADDRESS_SPACE >> 30
    yield HEAD.format(seconds=SECONDS, hangs=HANGS_S, growth=GROWTH_MIB, space=space, one_in=ONE_IN)
    measured = [name for name in KINDS if name in kept]
    machines = {"{cpu}, {cores} cores, {memory_gib} GiB".format(**kept[name].pop("hardware")) for name in measured}
    tallies = {name: Tally(**kept[name]) for name in measured}
    yield from table(tallies)
    repeated = sum(one.processes for one in tallies.values())
    said = ", ".join(f"{name} {one.said:,}" for name, one in tallies.items())
    yield (
        f"\nPeak memory is the process's, with Python and what the command imports. {repeated} cases were repeated as\n"
        f"processes. Different first sentences of refusals: {said}."
    )
    for name, kind in KINDS.items():
        ran = tallies[name].cases if name in tallies else 0
        if ran < kind.cases:
            yield f"\nOf {name}, {ran:,} of {kind.cases:,} cases were run."
    for name, one in tallies.items():
        for fault, numbers in one.faults.items():
            yield f"\nFault in {name}, case {numbers[0]}: {fault}."
            if test := MENDED.get(fault):
                yield f"Mended since; that case and its kind are tests ({test})."
    versions = locked_versions()
    packages = ", ".join(f"{name} {versions.get(name)}" for name in PACKAGES)
    yield f"\nMachine: {'; '.join(sorted(machines))}.\nPython {sys.version.split()[0]}, {packages}."


if __name__ == "__main__":
    sys.exit(main())
