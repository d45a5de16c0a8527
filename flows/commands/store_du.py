"""`quench store du`: what takes the room in a home, by stage, run and age; what gc would free, and what keeps the rest.

A file with several hard links counts once, with the store before MLflow's folder: MLflow's links take no room of their
own. Sizes are those of the files.
"""

from __future__ import annotations

import argparse
import datetime as dt
import os
import shlex
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flows.commands.terminal import Output
from flows.reach import measured, reached_by
from tasks.runtime.store.local import MANIFEST, Store, find_home, read_json

AGES = (("up to 7 days", 7), ("up to 30 days", 30), ("up to 90 days", 90), ("up to a year", 365), ("older", None))
SHOWN_RUNS = 20  # on a terminal; --json has all
KEPT = {"runs": "runs", "promotions": "promotions", "both": "runs and promotions", "nothing": "nothing: gc removes it"}
Links = set[tuple[int, int]]  # device and inode of every file that was counted


@dataclass(frozen=True, kw_only=True)
class Held:
    """An artifact of the store and who reaches it.

    Attributes:
        stage: Its stage.
        size: Bytes of its whole folder that no artifact before it has as hard links.
        linked: Bytes of its files that stay when it goes: MLflow or an export has a hard link.
        frees: Bytes that gc would free, if nothing reached it.
        days: Since it was finished.
        keepers: `runs/ID` and `promotions/NAME/VERSION`.
    """

    stage: str
    size: int
    linked: int
    frees: int
    days: float
    keepers: frozenset[str]

    @property
    def kept_by(self) -> str:
        """runs, promotions, both or nothing."""
        kinds = {keeper.partition("/")[0] for keeper in self.keepers}
        return "both" if len(kinds) > 1 else next(iter(kinds), "nothing")

    @property
    def free(self) -> int:
        """Bytes that gc would free now."""
        return 0 if self.keepers else self.frees

    @property
    def age(self) -> str:
        """The group of its age."""
        return next(label for label, limit in AGES if limit is None or self.days <= limit)


def command(args: argparse.Namespace) -> Output:
    """Measure the home; nothing is changed."""
    return measure(find_home())


def measure(home: Path, *, now: dt.datetime | None = None) -> Output:
    """What takes the room below a home.

    Args:
        home: QUENCH_HOME.
        now: Ages count to here; default: now.
    """
    counted: Links = set()
    held = _held(home, counted, now or dt.datetime.now(dt.UTC))
    elsewhere = {
        entry.name: _size(entry, counted)
        for entry in sorted(home.iterdir() if home.is_dir() else (), key=lambda entry: entry.name)
        if entry.name != "store"
    }
    told = {
        "home": str(home),
        "bytes": sum(artifact.size for artifact in held) + sum(elsewhere.values()),
        "artifacts": len(held),
        "stages": _groups(held, lambda artifact: artifact.stage),
        "ages": _groups(held, lambda artifact: artifact.age, [label for label, _ in AGES]),
        "runs": _by_keeper(held, "runs"),
        "promotions": _by_keeper(held, "promotions"),
        "kept_by": _groups(held, lambda artifact: artifact.kept_by),
        "elsewhere": elsewhere,
        "gc_frees": sum(artifact.free for artifact in held),
        "linked": sum(artifact.linked for artifact in held),
    }
    return Output(json=told, text="\n".join(_text(told, held)))


def _held(home: Path, counted: Links, now: dt.datetime) -> list[Held]:
    keepers: dict[Path, set[str]] = defaultdict(set)
    for keeper, folders in reached_by(home).items():
        for folder in folders:
            keepers[folder].add(keeper)
    held: list[Held] = []
    for path in Store(home).manifests():
        folder, manifest = path.parent, read_json(path)
        gone = measured(folder)
        held.append(
            Held(
                stage=folder.parent.name,
                size=_size(folder, counted),
                linked=gone.linked,
                frees=gone.free,
                days=_days(manifest.get("finished_at"), folder / MANIFEST, now),
                keepers=frozenset(keepers.get(folder, ())),
            )
        )
    return held


def _days(finished: str | None, path: Path, now: dt.datetime) -> float:
    """Since an artifact was finished, or since its manifest was written; 0 where clocks jumped."""
    then = dt.datetime.fromisoformat(finished) if finished else dt.datetime.fromtimestamp(path.stat().st_mtime, dt.UTC)
    return max(0.0, (now - then).total_seconds() / 86_400)


def _size(place: Path, counted: Links) -> int:
    """Bytes of a file, or of all files below a folder, that were not counted yet; symbolic links are not followed."""
    total = 0
    for entry in _files(place):
        stat = entry.stat(follow_symlinks=False)
        if (mark := (stat.st_dev, stat.st_ino)) not in counted:
            counted.add(mark)
            total += stat.st_size
    return total


def _files(place: Path) -> Iterator[Path]:
    if place.is_symlink() or not place.is_dir():
        yield place
        return
    for folder, _, names in os.walk(place):
        yield from (Path(folder, name) for name in names)


def _groups(held: Sequence[Held], group: Callable[[Held], str], order: Sequence[str] = ()) -> dict[str, dict[str, int]]:
    """Artifacts, bytes and what gc would free by group; in an order, where there is one, else by bytes."""
    groups: dict[str, dict[str, int]] = {}
    for artifact in held:
        line = groups.setdefault(group(artifact), {"artifacts": 0, "bytes": 0, "gc_frees": 0})
        line["artifacts"] += 1
        line["bytes"] += artifact.size
        line["gc_frees"] += artifact.free
    if order:
        return dict(sorted(groups.items(), key=lambda item: order.index(item[0])))
    return dict(sorted(groups.items(), key=lambda item: -item[1]["bytes"]))


def _by_keeper(held: Sequence[Held], kind: str) -> dict[str, dict[str, int]]:
    """Of each run, or each promoted version: what it reaches, what it alone does, and what gc frees without it."""
    lines: dict[str, dict[str, int]] = {}
    for artifact in held:
        for keeper in artifact.keepers:
            if keeper.startswith(f"{kind}/"):
                name, new = keeper.partition("/")[2], {"artifacts": 0, "bytes": 0, "alone": 0, "gc_frees": 0}
                line = lines.setdefault(name, new)
                line["artifacts"] += 1
                line["bytes"] += artifact.size
                if len(artifact.keepers) == 1:
                    line["alone"] += artifact.size
                    line["gc_frees"] += artifact.frees
    return dict(sorted(lines.items(), key=lambda item: (-item[1]["gc_frees"], -item[1]["alone"], item[0])))


# ---- for the terminal


def _text(told: Mapping[str, Any], held: Sequence[Held]) -> Iterator[str]:
    yield f"{told['home']}: {_mb(told['bytes']).strip()}, hard links counted once"
    if not held:
        yield "the store is empty"
    yield from _table("stage", "gc frees", told["stages"])
    yield from _table("finished", "gc frees", told["ages"])
    yield from _table("kept by", "gc frees", {KEPT[name]: line for name, line in told["kept_by"].items()})
    runs = told["runs"]
    yield from _table("run", "it alone", dict(list(runs.items())[:SHOWN_RUNS]))
    yield from [f"  and {len(runs) - SHOWN_RUNS} runs more: --json"] if len(runs) > SHOWN_RUNS else []
    if told["elsewhere"]:
        yield f"\n{'beside the store':<60} {'bytes':>24}"
        yield from (f"  {name:<58} {_mb(size):>24}" for name, size in told["elsewhere"].items() if size)
    yield ""
    if told["linked"]:
        linked = _mb(told["linked"]).strip()
        yield f"{linked} of the store have hard links elsewhere (MLflow, exports): gc frees none of these"
    if told["gc_frees"]:
        yield f"quench store gc --yes frees {_mb(told['gc_frees']).strip()}: no run and no promotion reaches them"
    elif held:
        yield "quench store gc would free nothing: a run or a promotion reaches every artifact"
    if freeing := [name for name, line in runs.items() if line["gc_frees"]]:
        folder = shlex.quote(str(Path(told["home"]) / "runs" / freeing[0]))
        frees = _mb(runs[freeing[0]]["gc_frees"]).strip()
        yield f"After rm -r {folder} it would free {frees} more: that run and its report are gone then"


def _table(first: str, last: str, lines: Mapping[str, Mapping[str, int]]) -> Iterator[str]:
    """The last column is what one run alone keeps, with what gc frees without it, or what gc frees now."""
    both = any("alone" in line for line in lines.values())
    if lines:
        yield f"\n{first:<60} {'artifacts':>9} {'bytes':>14} {last:>14}" + (f" {'gc frees then':>14}" if both else "")
    for name, line in lines.items():
        figures = [line["bytes"], *([line["alone"]] if both else []), line["gc_frees"]]
        yield " ".join([f"  {name:<58} {line['artifacts']:>9}", *map(_mb, figures)])


def _mb(size: int) -> str:
    return f"{size / 1e6:11,.1f} MB"
