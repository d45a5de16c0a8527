"""The present champion of a model name, as other tools ask for it: what it is, its figures, and who decided it when.

All of it comes from promotions.jsonl, from what is kept beside it, and from the artifact's folder. The run may be gone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flows.promotion.champion import stale
from flows.promotion.evidence import scores_folder
from flows.promotion.journal import Journal, Promotion, challenger, champion, versions
from flows.results.cells import Cell, Draws, rows_cell
from flows.results.metrics import METRICS
from flows.results.rows import read_scores
from recipes.problem import Problem
from tasks.runtime.store.local import read_json
from tasks.runtime.store.open import open_store

NAMED = ("model", "version", "arm", "kind", "digest", "recipe", "dataset")
FIGURES = ("task", "ppl_test", "bits_per_byte")  # of what is kept of a version's scores; further scorers are not


@dataclass(frozen=True, kw_only=True)
class Present:
    """The champion of a model name.

    Attributes:
        line: The decision that made it champion: a promotion, or a way back to it.
        judged: The promotion in which it passed the gate.
        files: The folder that an engine loads.
        scheme: How its weights are quantized; None for bf16, and where its manifest is gone.
        problem: Why its files are not what was promoted; None where they are.
        bucket: URL of its files in the store's bucket; None where they are only here.
        figures: Metric -> value and interval on test, as it was judged.
        no_figures: Why there are none.
        withdrawn: Versions that were champion and that a way back took away, the latest last.
        challenger: What was judged after it and did not pass.
        unread: Lines about this model that this Quench cannot read: a later decision may be among them.
    """

    line: Promotion
    judged: Promotion
    files: Path
    scheme: str | None
    problem: Problem | None
    bucket: str | None
    figures: dict[str, Cell]
    no_figures: str | None
    withdrawn: tuple[int, ...]
    challenger: Promotion | None
    unread: int

    def as_dict(self) -> dict[str, Any]:
        """For --json."""
        line, judged = self.line, self.judged
        return {
            **{name: getattr(line, name) for name in NAMED},
            "scheme": self.scheme,
            "path": str(self.files),
            "artifact": line.path,
            "bucket": self.bucket,
            "since": line.at,
            "event": line.event,
            "replaced": line.champion,
            "decided": {name: getattr(judged, name) for name in ("run", "at", "outcome", "look", "served", "checks")},
            "figures": {name: cell.as_dict() for name, cell in self.figures.items()},
            "no_figures": self.no_figures,
            "withdrawn": list(self.withdrawn),
            "challenger": self.challenger
            and {name: getattr(self.challenger, name) for name in ("version", "at", "run", "arm", "outcome")},
            "unread": self.unread,
            "problem": self.problem and self.problem.as_dict(),
        }


def present(home: Path, model: str) -> Present | None:
    """The champion of a model name; None where it has none.

    Raises:
        RecipeError: promotions.jsonl is damaged.
    """
    journal = Journal(home, model)
    lines = journal.lines()
    line = champion(lines)
    if line is None:
        return None
    store, folder = open_store(home), home / line.path
    problem = stale(store, line, digests=False)
    figures = _figures(home, line)
    return Present(
        line=line,
        judged=versions(lines).get(line.version, line),
        files=folder / "files",
        scheme=_scheme(folder) if line.kind == "quantized" and problem is None else None,
        problem=problem,
        bucket=store.place_in_bucket(folder),
        figures=figures if isinstance(figures, dict) else {},
        no_figures=figures if isinstance(figures, str) else None,
        withdrawn=_withdrawn(lines, line.version),
        challenger=challenger(lines),
        unread=journal.unread(),
    )


def _withdrawn(lines: Sequence[Promotion], champion: int) -> tuple[int, ...]:
    """Versions that some way back took away and that are not champion now."""
    gone = dict.fromkeys(line.champion for line in lines if line.event == "rolled back" and line.champion is not None)
    return tuple(version for version in gone if version != champion)


def _scheme(folder: Path) -> str | None:
    """The scheme by the artifact's own serve.json; by its arm's name where it has none."""
    own = folder / "files" / "serve.json"
    scheme = read_json(own).get("scheme") if own.is_file() else None
    return scheme or read_json(folder / "manifest.json")["slug"].partition(".")[0]


def _figures(home: Path, line: Promotion) -> dict[str, Cell] | str:
    """Value and interval of what is kept of a version's scores, or why there are none."""
    folder = scores_folder(home, line)
    if folder is None:
        return "no record of its scores is left"
    try:
        scores = read_scores(folder)
    except (OSError, ValueError, KeyError) as error:  # parquet that something has cut short
        return f"its record cannot be read ({type(error).__name__}: {str(error).splitlines()[0][:80]})"
    draws = Draws()
    return {
        name: rows_cell(METRICS[name], scores[source], None, draws)
        for name in FIGURES
        if (source := METRICS[name].source) in scores
    }
