"""What a run can tell, registered before it spends anything, so that nobody can choose it afterwards.

That is the smallest loss of task score that test can show, and the chance that a candidate that is truly equal is
within the gate's margin. runs/<id>/registered.json is written before the first step. What rehearse counts (documents of
lm-eval tasks) is added before training; the report only reads it. A run of the same recipe on the same data keeps the
first registration: its scores may be known by then.
"""

from __future__ import annotations

import datetime as dt
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

from recipes.checks.gate import HARDLY, SideSize, document_problem, more_rows, percent, points
from recipes.checks.power import (
    GUESS,
    POWER,
    Rate,
    Scored,
    chance_to_pass,
    enough_rows,
    later_level,
    smallest_loss,
)
from recipes.data.rows import Side
from recipes.problem import Problem
from recipes.schema import Recipe
from tasks.runtime.fingerprint import fingerprint
from tasks.runtime.store.local import read_json

REGISTERED = "registered.json"
FEWEST_ROWS = 100  # of an earlier run: below it a share of 5 % is known to 4 points, which is no better than the guess
MOST_READ = 20  # reports: a megabyte each, and what is older says little of the next run
NOT_READ = "the rows of test are not known yet"
NO_PROMPT = "no row of test has a prompt, so there is no task score; how far losses vary is known afterwards"


@dataclass(frozen=True, kw_only=True)
class Earlier:
    """How many answers changed in an earlier run of the same name with the same scorer.

    Attributes:
        run: Its id.
        arm: A scheme: the run's candidate, else the one in the middle.
        against: The merged model that it was made from.
        rows: Rows of test that both were scored on.
        changed: Share of these whose score differs; at least one row, since none of so few is not never.
        variance: Of one row's difference, with what rows of a group share.
    """

    run: str
    arm: str
    against: str
    rows: int
    changed: float
    variance: float

    @property
    def rate(self) -> Rate:
        """With its origin in words."""
        source = f"as in run {self.run}: {self.arm} and {self.against}, {self.rows:,} rows"
        return Rate(self.changed, self.variance, source)


def earlier(home: Path, recipe: Recipe) -> Earlier | None:
    """The last run of this model name in this home that tells; None where none does."""
    own = recipe.model_dump(mode="json")
    for report in islice(_reports(home, own), MOST_READ):
        if line := _line(_json(report)):
            least = 1 / line["rows"]
            return Earlier(
                run=report.parent.name,
                arm=line["arm"],
                against=line["against"],
                rows=line["rows"],
                changed=max(line["changed"], least),
                variance=max(line["variance"], least),
            )
    return None


def _reports(home: Path, own: Mapping[str, Any]) -> Iterator[Path]:
    """Reports about the same model name with the same scorer, the last run first."""
    for report in sorted((home / "runs").glob("*/report.json"), reverse=True):
        then = _json(report.parent / "recipe.resolved.json")
        if not report.parent.is_symlink() and (_name(then), _scorer(then)) == (_name(own), _scorer(own)):
            yield report


def _line(report: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The entry of `power` in report.json for the candidate, else for the scheme in the middle.

    A merged model that is never right says nothing of how answers change once it is.
    """
    arms = report.get("arms", {})
    known = [
        line
        for line in report.get("power", ())
        if line.get("variance") is not None
        and line["rows"] >= FEWEST_ROWS
        and arms.get(line["against"], {}).get("metrics", {}).get("task", {}).get("value")
    ]
    if not known:
        return None
    named = (report.get("gate") or {}).get("candidate")
    middle = median(line["variance"] for line in known)
    return min(known, key=lambda line: (line["arm"] != named, abs(line["variance"] - middle)))


def _name(recipe: Mapping[str, Any]) -> str | None:
    return (recipe.get("promote") or {}).get("model_name") or recipe.get("name")


def _scorer(recipe: Mapping[str, Any]) -> Any:
    scorers = (recipe.get("evaluate") or {}).get("scorers") or [None]
    return scorers[0]


def foreseen(recipe: Recipe, sizes: Mapping[Side, SideSize], *, before: Earlier | None) -> dict[str, Any]:
    """What test can tell, as registered.json has it.

    Args:
        recipe: The recipe.
        sizes: Of the splits; empty where the rows were not read.
        before: Where the share of changed answers is from; None: a guess.
    """
    rate = before.rate if before else GUESS
    scored, margin = (sizes["test"].task if sizes else Scored(0, 0, 0.0)), recipe.gate.task
    reason = (NO_PROMPT if not scored.rows else scored.too_few_groups) if sizes else NOT_READ
    known, later = reason is None, later_level(recipe.gate.looks)
    told: dict[str, Any] = {
        "metric": "task",
        "rows": scored.rows,
        "groups": scored.groups,
        "effective": scored.effective,
        "changed": rate.changed,
        "variance": rate.variance,
        "guess": before is None,
        "earlier": asdict(before) if before else None,
        "power": POWER,
        "smallest_loss": smallest_loss(scored, rate.variance) if known else None,
        "margin": margin,
        "chance_to_pass": chance_to_pass(scored, rate.variance, margin) if known else None,
        "chance_to_pass_later": chance_to_pass(scored, rate.variance, margin, later) if known else None,
        "rows_that_do": enough_rows(margin, rate.variance, each=scored.rows / scored.effective) if known else None,
        "reason": reason,
    }
    return {**told, "text": list(_sentences(recipe, scored, rate, told))}


def _sentences(recipe: Recipe, scored: Scored, rate: Rate, told: Mapping[str, Any]) -> Iterator[str]:
    if told["reason"]:
        yield f"Of the task score nothing can be told beforehand: {told['reason']}."
        return
    chance, later = told["chance_to_pass"], told["chance_to_pass_later"]
    yield (
        f"Test has {scored.text}: it shows a loss of {points(told['smallest_loss'])} of task score or more 4 times in "
        f"5, {rate.text}. A candidate that is truly equal to its merged model then passes gate.task "
        f"({100 * recipe.gate.task:g} points) {percent(chance)} of the time as the first "
        f"candidate that these rows judge, and {percent(later)} as a later one."
    )
    if HARDLY <= chance < POWER:  # below, a warning says it
        yield f"{more_rows(recipe, scored, recipe.gate.task, rate, split='test')}: then it passes 4 times in 5."


def register(
    recipe: Recipe,
    sizes: Mapping[Side, SideSize],
    *,
    home: Path,
    inputs: Sequence[str],
    scored: Sequence[str],
    before: Earlier | None,
) -> dict[str, Any]:
    """The registration of a run, or the one that the first run of this recipe on this data made.

    Args:
        recipe: The recipe.
        sizes: Of the splits.
        home: QUENCH_HOME.
        inputs: Digests of base and data.
        scored: Slugs of arms whose scores are in the store already.
        before: As of `foreseen`.
    """
    identity = fingerprint({"recipe": recipe.model_dump(mode="json", exclude={"run"}), "inputs": list(inputs)})
    for path in sorted((home / "runs").glob(f"*/{REGISTERED}")):
        first = _json(path)
        if first.get("identity") == identity and not path.parent.is_symlink():
            return {**first, "kept_from": first["kept_from"] or path.parent.name}
    return {
        "schema": 1,
        "at": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        "identity": identity,
        "kept_from": None,
        "scored_before": list(scored),
        **foreseen(recipe, sizes, before=before),
        "documents": {},
    }


def counted(told: Mapping[str, Any], documents: Mapping[str, Mapping[str, int]]) -> dict[str, Any]:
    """The registration with what rehearse counted: documents by metric and task."""
    return {**told, "documents": {metric: sum(by_task.values()) for metric, by_task in documents.items()}}


def document_problems(recipe: Recipe, told: Mapping[str, Any]) -> Iterator[Problem]:
    """Entries of lm-eval tasks whose documents, now that they are counted, are too few for the gate."""
    numbers = {f"task.{scorer.called}": number for number, scorer in enumerate(recipe.evaluate.scorers)}
    for metric, count in told["documents"].items():
        where = f"evaluate.scorers.{numbers[metric]}.tasks" if metric in numbers else "evaluate.scorers"
        yield from filter(None, [document_problem(metric, count, recipe.gate.task, where=where)])


def read_registered(run: Path) -> dict[str, Any] | None:
    """Of a run's folder; None where it is older than registrations."""
    return _json(run / REGISTERED) or None


def registered_tag(told: Mapping[str, Any] | None) -> dict[str, str]:
    """MLflow's tag of the run."""
    return {"quench.registered": " ".join(told["text"])} if told else {}


def _json(path: Path) -> dict[str, Any]:
    """What a file holds; nothing of one that is not there, or half written."""
    try:
        return read_json(path)
    except (FileNotFoundError, json.JSONDecodeError):
        return {}
