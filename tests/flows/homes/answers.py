"""What a home says when it is asked: everything that must stay true, whichever version reads it; without a server."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from flows.commands.compare import compare_runs
from flows.commands.debug import find_attempt, repeated
from flows.commands.store_du import measure
from flows.plan.history import seconds
from flows.plan.machine import Memory
from flows.promotion.chain import chain_of
from flows.promotion.evidence import judged
from flows.promotion.journal import Journal
from flows.promotion.present import present
from flows.reach import unreached
from flows.report.build import render
from flows.results.read import read_run
from tasks.runtime.store.local import Store, read_json

MODEL = "small"
CARD = Memory(gpu_gib=24.0, host_gib=64.0, gpus=1)


def runs_of(home: Path) -> list[Path]:
    """Folders of runs, oldest first."""
    return sorted(path for path in (home / "runs").iterdir() if not path.is_symlink())


def answers(home: Path) -> dict[str, Any]:
    """By what was asked: figures without their intervals, whose methods may become better, and words that decide."""
    first, second, failed = runs_of(home)
    store = Store(home)
    damaged = {str(path): store.damage(path.parent, read_json(path), digests=True) for path in store.manifests()}
    return {
        "champion": _champion(home),
        "journal": _journal(home),
        "chain": _chain(home, second),
        "reports": {run.name: _report(run, home) for run in (second, failed)},
        "compared": _compared(home, first, second),
        "gc": [artifact.name for artifact in unreached(home)],
        "du": _du(home),
        "damaged": [path for path, damage in damaged.items() if damage],
        "seconds": seconds_on_a_card(home, second),
        "debug": repeated(home, find_attempt(home, None, failed.name)).job.stage,
    }


def _champion(home: Path) -> dict[str, Any] | None:
    now = present(home, MODEL)
    if now is None:
        return None
    told = now.as_dict()
    named = (
        "model",
        "version",
        "arm",
        "kind",
        "digest",
        "scheme",
        "artifact",
        "since",
        "event",
        "replaced",
        "withdrawn",
    )
    figures = {name: cell["value"] for name, cell in told["figures"].items()}
    decided = {name: told["decided"][name] for name in ("run", "at", "outcome", "look")}
    later = told["challenger"] and {name: told["challenger"][name] for name in ("version", "outcome")}
    return {
        **{name: told[name] for name in named},
        "figures": figures,
        "decided": decided,
        "checks": [(check["metric"], check["against"], check["outcome"]) for check in told["decided"]["checks"]],
        "later": later,
        "withdrawn": told["withdrawn"],
        "problem": told["problem"],
    }


def _journal(home: Path) -> dict[str, Any]:
    journal = Journal(home, MODEL)
    lines = journal.lines()
    looks = [(look.version, look.number, len(look.rows or ())) for look in judged(home, lines)]
    decided = [(line.version, line.event, line.outcome, line.champion, line.run) for line in lines]
    return {"lines": decided, "unread": journal.unread(), "highest": journal.highest(), "looks": looks}


def _chain(home: Path, run: Path) -> dict[str, Any]:
    """The chain that a new candidate of this run's rows would go on with."""
    step = read_run(run, home).step("evaluate/merged-original")
    assert step is not None and step.files is not None
    chain = chain_of(home, Journal(home, MODEL).lines(), digest="new", files=step.files, scoring=None)
    told = chain.as_dict(None)
    versions = {str(line["version"]): line["difference"] for line in told["versions"]}
    return {name: told[name] for name in ("metric", "best", "left_out", "elsewhere")} | {"versions": versions}


def _report(run: Path, home: Path) -> dict[str, Any]:
    report = render(run, home).json
    arms = {
        slug: {name: cell["value"] for name, cell in arm["metrics"].items() if cell["value"] is not None}
        | {"status": arm["status"]}
        for slug, arm in report["arms"].items()
    }
    failures = [(failure["status"], failure["why"]) for failure in report["failures"]]
    return {"arms": arms, "outcome": report["gate"]["outcome"], "failures": failures}


def _compared(home: Path, first: Path, second: Path) -> dict[str, Any]:
    told = compare_runs(first, second, home).as_dict()
    return {f"{change['arm']} {change['metric']}": change["difference"] for change in told["comparisons"]}


def _du(home: Path) -> dict[str, Any]:
    told = measure(home).json
    return {
        "stages": {stage: line["artifacts"] for stage, line in sorted(told["stages"].items())},
        "kept_by": {kept: line["artifacts"] for kept, line in sorted(told["kept_by"].items())},
        "promotions": {name: line["artifacts"] for name, line in sorted(told["promotions"].items())},
    }


def seconds_on_a_card(home: Path, run: Path) -> float | None:
    """What plan says of a training with twice the tokens, had this run trained on a card of 24 GiB."""
    steps = {step["key"]: step for step in read_json(run / "steps.json")["steps"]}
    manifest = home / steps["train/small"]["path"] / "manifest.json"
    preflight = run / "preflight.json"
    before = {path: path.read_text(encoding="utf-8") for path in (manifest, preflight)}
    try:
        told = json.loads(before[manifest])
        manifest.write_text(json.dumps({**told, "execution": {**told["execution"], "device": "cuda"}}))
        predicted = json.loads(before[preflight])
        preflight.write_text(json.dumps({**predicted, "gpu_total_gib": 24.0}))
        base, tokens = read_json(run / "steps.json")["base"]["path"], predicted["steps"]["train/small"]["tokens"]
        known = seconds(home, base=base, memory=CARD, tokens={"train/small": 2 * tokens})
    finally:
        for path, text in before.items():
            path.write_text(text, encoding="utf-8")
    return known["train/small"].seconds if known else None


def flat(value: Any, name: str = "") -> dict[str, Any]:
    """Dotted names of every leaf, so that figures can be compared one by one."""
    if isinstance(value, dict):
        pairs = [(f"{name}.{key}", entry) for key, entry in value.items()]
    elif isinstance(value, list | tuple):
        pairs = [(f"{name}.{index}", entry) for index, entry in enumerate(value)] or [(f"{name}.none", True)]
    else:
        return {name: value}
    return {key: leaf for pair in pairs for key, leaf in flat(pair[1], pair[0]).items()}


if __name__ == "__main__":
    import tempfile

    from tests.flows.homes.thin import opened

    parser = argparse.ArgumentParser(description="Writes what a home of the tree says: NAME -> NAME.json")
    parser.add_argument("home", type=Path)
    place = parser.parse_args().home
    with tempfile.TemporaryDirectory() as folder:
        told = flat(answers(opened(place, Path(folder) / "home")))
    place.with_suffix(".json").write_text(json.dumps(told, indent=0) + "\n", encoding="utf-8")
