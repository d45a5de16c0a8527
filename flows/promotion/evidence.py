"""What is kept of every decision beside promotions.jsonl: which rows of test it was made on, and the version's scores.

Runs and evaluations are removed some day. The number of candidates that the same rows have judged, and which version
was the best, have to be known without them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import pyarrow.parquet as pq

from flows.gate.looks import Judged
from flows.promotion.journal import Promotion
from tasks.runtime.fingerprint import fingerprint
from tasks.runtime.store.local import read_json

SCORES = "scores.parquet"  # in a version's folder: dev and test, row by row, as it was evaluated when it was judged
_TASK, _LOSSES = "task", ("nll", "bits")


def record_folder(home: Path, version: Promotion) -> Path:
    """What is kept of a version beside promotions.jsonl: its train rows, its scores and its card."""
    return _model_folder(home, version.model) / str(version.version)


def _model_folder(home: Path, model: str) -> Path:
    return home / "promotions" / model


# ---- rows of test


def test_rows(files: Path) -> list[str]:
    """Names of the rows of test in an evaluation, sorted."""
    table = pq.read_table(files / "scores.parquet", columns=["row"], filters=[("split", "==", "test")])
    return sorted({str(name) for name in table["row"].to_pylist()})


def keep_rows(home: Path, model: str, rows: Sequence[str]) -> str:
    """Write the names of some rows once, however many decisions were made on them; returns their digest."""
    digest = fingerprint({"rows": list(rows)})
    path = _rows_file(home, model, digest)
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"rows": list(rows)}) + "\n", encoding="utf-8")
    return digest


def _rows_file(home: Path, model: str, digest: str) -> Path:
    return _model_folder(home, model) / "tests" / f"{digest[:16]}.json"


def judged(home: Path, lines: Iterable[Promotion]) -> list[Judged]:
    """Every verdict on record, with the rows that it was made on."""
    known: dict[str, frozenset[str] | None] = {}

    def rows_of(line: Promotion) -> frozenset[str] | None:
        key = line.test or f"{line.run}/{line.arm}"
        if key not in known:
            known[key] = rows_judged_on(home, line)
        return known[key]

    return [
        Judged(version=line.version, digest=line.digest, rows=rows_of(line), number=line.look)
        for line in lines
        if line.event != "rolled back"
    ]


def rows_judged_on(home: Path, line: Promotion) -> frozenset[str] | None:
    """Rows of test behind a verdict: as they were kept, else from its run; None where neither is left."""
    if line.test and (path := _rows_file(home, line.model, line.test)).is_file():
        return frozenset(read_json(path)["rows"])
    files = _evaluation(home, line)
    return frozenset(test_rows(files)) if files else None


# ---- scores


def keep_scores(home: Path, line: Promotion, files: Path) -> None:
    """Write what says how good a version is, without what only the report of its run needs."""
    which = [("split", "in", ["dev", "test"]), ("metric", "in", [_TASK, *_LOSSES])]
    pq.write_table(pq.read_table(files / "scores.parquet", filters=which), record_folder(home, line) / SCORES)


def scores_folder(home: Path, line: Promotion) -> Path | None:
    """Folder with a version's scores.parquet: as it was kept, else from its run; None where neither is left."""
    folder = record_folder(home, line)
    return folder if (folder / SCORES).is_file() else _evaluation(home, line)


def _evaluation(home: Path, line: Promotion) -> Path | None:
    """Files of a version's evaluation in the run that it was judged in."""
    path = home / "runs" / line.run / "steps.json"
    if not path.is_file():
        return None
    raw = read_json(path)
    key = next((arm.get("evaluate") for arm in raw.get("arms", []) if arm.get("slug") == line.arm), None)
    step = next((step for step in raw.get("steps", []) if step.get("key") == key), {})
    files = home / step["path"] / "files" if step.get("path") else None
    return files if files and (files / "scores.parquet").is_file() else None
