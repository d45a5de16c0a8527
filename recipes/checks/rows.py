"""What only reading every row shows: malformed rows, equal rows in two groups, leaks, empty sides, too few rows."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from recipes.checks.documents import document_warnings
from recipes.checks.gate import SideSize, gate_warnings, general_warning
from recipes.checks.power import GUESS, Rate, Scored
from recipes.checks.reading import RowsRead, SourceRead, read_rows
from recipes.checks.split import SideRows, Sides
from recipes.data.files import FolderChoice
from recipes.data.rows import Side, first_lines
from recipes.data.texts import plain_texts, text_name
from recipes.doubles import NOT_LOOKED_FOR
from recipes.models.headers import read_headers
from recipes.problem import Problem, RecipeError, shown
from recipes.read.load import Loaded
from recipes.schema import FEWEST_ROWS, LEAST_ROWS, MOST_ROWS, TOKENS_PER_INPUT


class RowCheck(NamedTuple):
    """What reading every row showed.

    Attributes:
        problems: What is wrong with them.
        summary: JSON-able.
        answers: Warnings of answers that may be too long.
        gate: Warnings of rows that are too few for the gate, at the rate of changed answers that is guessed.
        others: Warnings of general texts, and of documents of lm-eval tasks, that are too few.
        sizes: What the figures of each split will rest on, but for rows that turn out too long; empty where the rows
            were not read.
    """

    problems: list[Problem]
    summary: dict[str, Any]
    answers: tuple[Problem, ...] = ()
    gate: tuple[Problem, ...] = ()
    others: tuple[Problem, ...] = ()
    sizes: Mapping[Side, SideSize] = {}

    @property
    def warnings(self) -> tuple[Problem, ...]:
        """All of them."""
        return (*self.answers, *self.gate, *self.others)


def check_data(loaded: Loaded) -> RowCheck:
    """Read every row: malformed ones, equal ones in two groups, leaks, empty sides, too little to calibrate on.

    A malformed first row and a missing or empty file are left out: `check` reports them.
    """
    remote = [source.path for source, path in zip(loaded.recipe.data.parts, loaded.data, strict=True) if path is None]
    not_read = {"data": f"{', '.join(remote)} is not local: its rows are read when it is pinned"} if remote else {}
    if not loaded.origins:
        return RowCheck([], not_read, others=_other_warnings(loaded))
    read = read_rows(loaded, list(loaded.origins.values()))
    problems = [problem for source in read.sources for problem in source.later_problems()]
    problems += [*_torn(loaded, read.sides), *_general_rows(loaded), *read.checks.problems()]
    if len(read.sources) == len(loaded.data) and all(source.is_good for source in read.sources):
        # the sides are known only then
        problems += [*_leaks(loaded, read), *_empty_sides(loaded, read.sides), *_calibration(loaded, read.sides)]
    summary = _summary(loaded, read) | {"format": _formats(read.sources)} | not_read
    sizes: dict[Side, SideSize] = {} if not_read else {side: _size(rows) for side, rows in read.sides.rows.items()}
    return RowCheck(
        [*map(loaded.placed, problems)],
        summary,
        answers=tuple(map(loaded.placed, read.checks.warnings())),
        gate=_gate_warnings(loaded, sizes, GUESS),
        others=_other_warnings(loaded),
        sizes=sizes,
    )


def warnings_at(loaded: Loaded, rows: RowCheck, rate: Rate) -> tuple[Problem, ...]:
    """The warnings of rows that were checked, now that an earlier run tells how many answers change."""
    return rows._replace(gate=_gate_warnings(loaded, rows.sizes, rate)).warnings


def _gate_warnings(loaded: Loaded, sizes: Mapping[Side, SideSize], rate: Rate) -> tuple[Problem, ...]:
    return tuple(map(loaded.placed, gate_warnings(loaded.recipe, sizes, rate=rate))) if sizes else ()


def _other_warnings(loaded: Loaded) -> tuple[Problem, ...]:
    return tuple(map(loaded.placed, [*_few_texts(loaded), *document_warnings(loaded)]))


def _size(rows: SideRows) -> SideSize:
    return SideSize(task=rows.by_task, tokens=rows.by_tokens, domains=rows.by_domain)


def _formats(sources: Sequence[SourceRead]) -> str:
    """`messages, detected from rows.jsonl:1`, one per source."""
    return "; ".join(
        f"{source.format}, "
        + (f"detected from {source.detected_from}" if source.origin.format == "auto" else "named in the recipe")
        for source in sources
    )


def _torn(loaded: Loaded, sides: Sides) -> Iterator[Problem]:
    torn = sides.torn
    if torn.count:
        yield Problem(
            what=f"{torn.count} rows equal an earlier row of another group: a test row could equal a train row.",
            where="data.group",
            why="Groups keep related rows on one side; these have two groups:"
            + first_lines(torn.lines, count=torn.count),
            next=f"Give equal rows one value of `{loaded.recipe.data.group_column}`, or remove one of each pair.",
        )


def _leaks(loaded: Loaded, read: RowsRead) -> Iterator[Problem]:
    """More of train in dev or test, almost or in part, than is allowed."""
    if read.doubles is None:
        return
    from recipes.doubles.search import leak_problem

    leaks, recipe = read.doubles.leaks, loaded.recipe
    problem = leak_problem(
        leaks.counts,
        most=recipe.calibrate.max_near_duplicates,
        examples=leaks.examples(read.places.__getitem__),
        group=recipe.data.group_column,
    )
    if problem:
        yield problem


def general_files(loaded: Loaded) -> dict[str, Path]:
    """Files of general text by field: what is evaluated, and what controls calibrate on."""
    recipe = loaded.recipe
    paths = {"data.general": recipe.data.general, "calibrate.general": recipe.calibrate.general}
    return {field: loaded.resolve(path) for field, path in paths.items() if path is not None}


def _general_rows(loaded: Loaded) -> Iterator[Problem]:
    """Bad rows of general text after the first, which `check` reads; texts in both calibration and evaluation."""
    files = general_files(loaded)
    problems = [
        problem
        for path in files.values()
        if path.exists() and not general_problems(path, max_rows=1)
        for problem in general_problems(path)
    ]
    yield from problems
    if len(files) == 2 and not problems and all(path.exists() for path in files.values()):
        evaluated, calibrated = map(_texts, files.values())
        if shared := evaluated & calibrated:
            yield Problem(
                what=f"{len(shared)} texts are in calibrate.general and in data.general.",
                where="calibrate.general",
                why="ppl_general would be measured on what a control was calibrated on.",
                next="Remove them from one of the two files.",
            )


def _few_texts(loaded: Loaded) -> Iterator[Problem]:
    """A general hold-out of so few texts that its check stays undecided."""
    path, most = general_files(loaded).get("data.general"), loaded.recipe.data.max_length
    if path is None or not path.exists() or general_problems(path, max_rows=1):
        return
    texts = {text_name(row.text): len(row.text.encode()) for row in plain_texts(path) if row.text is not None}
    problem = general_warning(Scored.of(min(size, most) for size in texts.values()))
    yield from filter(None, [problem])


def _texts(path: Path) -> set[str]:
    """Names of the texts of a file."""
    return {text_name(row.text) for row in plain_texts(path) if row.text is not None}


def general_problems(path: Path, *, max_rows: int | None = None) -> list[Problem]:
    """Rows of general text that have no `text`; the first 20 by place."""
    wrong: list[str] = []
    count = 0
    try:
        for where, _, why in islice(plain_texts(path), max_rows):
            count += 1
            wrong += [f"{where} {why}"] if why else []
    except FolderChoice as choice:
        return [choice.problem(shown(path), written="nowhere")]
    if count and not wrong:
        return []
    place = (path.parent if path.is_file() else path) / (wrong[0].split(" ", 1)[0] if wrong else "")
    return [
        Problem(
            what=f"{len(wrong)} malformed rows in the general text." if wrong else "The general text is empty.",
            where=shown(place if wrong else path),
            why=f"Each row is one text:{first_lines(wrong)}" if wrong else "Its text is measured or calibrated on.",
            next='Give it rows with a column `text`, such as lines {"text": "..."}, or leave the field out.',
        )
    ]


def _empty_sides(loaded: Loaded, sides: Sides) -> Iterator[Problem]:
    data = loaded.recipe.data
    few = sides.groups < len(sides.rows)
    kept = f"equal `{data.group_column}`" if data.group_column else "the same first question"
    for name in ("dev", "test"):
        if not sides.rows[name]:
            yield Problem(
                what=f"{name} would have no rows.",
                where=f"data.{name}",
                why=f"Rows with {kept} are one group, which falls on one side as a whole, and there are "
                f"{sides.groups} in all for three sides."
                if few
                else f"Groups fall on a side by their hash; shares are dev {data.dev:g} and test {data.test:g}.",
                next="Give rows of more groups" + (", or name a finer data.group." if data.group_column else ".")
                if few
                else f"Give more rows or finer groups, raise data.{name}, or draw again by another data.salt.",
            )


def _calibration(loaded: Loaded, sides: Sides) -> Iterator[Problem]:
    recipe, train = loaded.recipe, sides.rows["train"]
    if len(train) < FEWEST_ROWS:
        yield too_few(len(train), where=recipe.data.field(0), dev=recipe.data.dev, test=recipe.data.test)
        return
    if len(train) < recipe.calibrate.rows:
        yield Problem(
            what=f"train has {len(train)} rows; calibration asks for {recipe.calibrate.rows}.",
            where="calibrate.rows",
            why=f"Calibration rows come from train only; fewer than {LEAST_ROWS} have to be allowed, since they starve "
            "the Hessian.",
            next=f"Set calibrate.rows to {len(train)}."
            if len(train) >= LEAST_ROWS
            else f"Set calibrate.rows to {with_spare(len(train))} and calibrate.allow_unusual_size to "
            f"`{few_rows(len(train))}`, or give at least {least_rows(recipe.data.dev, recipe.data.test)} rows in all.",
        )
        return
    yield from _shares(loaded, train)
    needed = TOKENS_PER_INPUT * _widest(loaded)
    largest = sorted(train.bounds, reverse=True)[: recipe.calibrate.rows]
    if sum(largest) < needed:
        rows = math.ceil(needed * len(largest) / sum(largest))
        yield Problem(
            what=f"Calibration needs {needed} tokens; {recipe.calibrate.rows} rows have {sum(largest)} at most.",
            where="calibrate.rows",
            why=f"With fewer than {TOKENS_PER_INPUT} tokens per input, the widest layer's Hessian is badly estimated.",
            next=f"Raise calibrate.rows to {rows} or more."
            if rows <= min(MOST_ROWS, len(train))
            else "Give more rows, or longer ones.",
        )


def _shares(loaded: Loaded, train: SideRows) -> Iterator[Problem]:
    """Shares for domains that train does not have, or has too few rows of."""
    stratify, rows = loaded.recipe.calibrate.stratify, loaded.recipe.calibrate.rows
    if not isinstance(stratify, dict):
        return
    for name, share in stratify.items():
        if train.domains[name] < math.floor(share * rows):
            yield Problem(
                what=f"train has {train.domains[name]} rows of the domain `{name}`; its share is {share:g} of {rows}.",
                where="calibrate.stratify",
                why="Given shares are kept exactly.",
                next=f"Lower its share or calibrate.rows; domains are {', '.join(sorted(train.domains))}.",
            )


def too_few(train: int, *, where: str, dev: float, test: float) -> Problem:
    """What is wrong with fewer than 32 rows of train, in init, in the check and in prepare.

    Args:
        train: How many there are.
        where: Path or field of the data.
        dev: Share of dev.
        test: Share of test.
    """
    return Problem(
        what=f"train has {train} rows; at least {FEWEST_ROWS} are needed.",
        where=where,
        why="With fewer, nothing that is measured could tell one model from another, and calibration would follow "
        "single rows.",
        next=f"Give about {least_rows(dev, test, train=FEWEST_ROWS)} rows or more in all; from "
        f"{least_rows(dev, test)} on calibration is of the usual size.",
    )


def least_rows(dev: float, test: float, *, train: int = LEAST_ROWS) -> int:
    """Rows of which about so many fall on train."""
    return math.ceil(train / (1 - dev - test))


def with_spare(train: int) -> int:
    """Calibration rows that so many rows of train give for sure: prepare leaves long ones out, calibrate equal ones."""
    return train * 9 // 10


def few_rows(train: int) -> str:
    """A reason for calibrate.allow_unusual_size."""
    return f"train has {train} rows"


def _widest(loaded: Loaded) -> int:
    """Inputs of the base's widest quantized layer; 0 where the base cannot be read here."""
    base = loaded.base
    try:
        return read_headers(base).largest_in_features if base and base.is_dir() else 0
    except RecipeError:
        return 0


def _summary(loaded: Loaded, read: RowsRead) -> dict[str, Any]:
    data, sides = loaded.recipe.data, read.sides
    counts: dict[str, Any] = {"rows": sum(map(len, sides.rows.values())), "duplicates": sides.duplicates}
    if left_out := sum(source.left_out for source in read.sources):
        counts["left out by data.keep"] = left_out
    if sides.not_drawn:
        counts["left out by weight"] = sides.not_drawn
    for name, rows in sides.rows.items():
        counts[name] = {"rows": len(rows)}
        if data.domain_column or any(source.domain for source in data.parts):
            counts[name]["domains"] = dict(sorted(rows.domains.items()))
    return counts | _doubles(loaded, read)


def _doubles(loaded: Loaded, read: RowsRead) -> dict[str, str]:
    """What is said of near-duplicates and leaks."""
    data, doubles = loaded.recipe.data, read.doubles
    if data.near_duplicates == "ignore":
        return {"leaks": NOT_LOOKED_FOR}
    if doubles is None:
        return {}
    return {
        "near-duplicates": doubles.words(jaccard=data.near_duplicate_jaccard, mode=data.near_duplicates),
        "leaks": doubles.leaks.words(read.places.__getitem__),
    }
