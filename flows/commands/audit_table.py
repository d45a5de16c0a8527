"""Tables of published claims as `quench audit` reads them: what people write, and what is refused, by line.

Numbers are taken as they are written: 1,319 or 1319 questions; 0.669, 66.9 or 66.9 % right, decided by the whole
column, since 0.9 alone may be either. A column that mixes both is refused: a guess could be off by a factor of 100.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import NamedTuple

from flows.commands.audit_file import SHARES, Line, lines_of, problem_at, text_of
from flows.results.audit import Claim
from flows.results.unpaired import Figure
from recipes.problem import Problem, RecipeError

NOT_SHARES = re.compile(
    r"\b(loss|nll|cross entropy|kl|bits|bpb|perplexity|ppl|mt ?bench|elo|bleu|chrf|wer|cer|mse|mae|rmse|tokens)\b"
)
PERPLEXITY = re.compile(r"\b(perplexity|ppl)\b")
SPACES = str.maketrans({mark: " " for mark in "\u00a0\u2007\u2009\u202f"})
NUMBER = re.compile(r"[+-]?(\d{1,9}(\.\d{0,20})?|\.\d{1,20})", re.ASCII)  # 1e-999999999 would fill the memory
LONGEST_N = 12  # digits: a trillion questions
THOUSANDS = re.compile(r"\d{1,3}([,' _]\d{3})+")


class Table(NamedTuple):
    """The claims of a file, and its columns that nothing reads."""

    claims: list[Claim]
    not_read: list[str]


class Number(NamedTuple):
    """A cell: its number, one unit of its last digit, and whether it says per cent (or points)."""

    value: Decimal
    step: Decimal
    percent: bool


def read_table(path: Path) -> Table:
    """The claims of a file.

    Raises:
        RecipeError: It cannot be read, lacks columns, or rows say what no score can be; every row at once.
    """
    lines, header, columns = lines_of(path, text_of(path))
    wrong: list[Problem] = []
    shares = [line for line in lines if "sd" not in line.cells and not _is_mean(line)]
    units = _units(path, shares, wrong)
    claims = [claim for line in lines if (claim := _claim(path, line, units, wrong))]
    if wrong:
        raise RecipeError(sorted(wrong, key=lambda problem: _line_of(problem.where)))
    return Table(claims, [name for name, column in zip(header, columns, strict=True) if not column and name.strip()])


def _line_of(where: str) -> int:
    number = re.search(r":(\d+)", where)
    return int(number[1]) if number else 0


# ---- units


def _units(path: Path, lines: Sequence[Line], wrong: list[Problem]) -> dict[str, bool]:
    """Column -> whether it is in per cent. What a column mixes goes to `wrong`."""
    units: dict[str, bool] = {}
    signs: set[str] = set()
    for column in SHARES:
        numbers = {line.number: number for line in lines if (number := _number(line.cells.get(column, "")))}
        signed = {number for number, cell in numbers.items() if cell.percent}
        units[column] = bool(signed) or any(cell.value > 1 for cell in numbers.values())
        if signed and len(signed) < len(numbers):
            for line in _fewer(numbers, signed):
                has, others = ("a % sign", "have none") if line in signed else ("no % sign", "have one")
                wrong.append(_mixed(path, line, column, has, others))
        elif not signed and units[column]:
            small = {number for number, cell in numbers.items() if 0 < cell.value <= 1}
            for line in _fewer(numbers, small) if small else []:
                others = "are above 1, as per cent are" if line in small else "are from 0 to 1"
                wrong.append(_mixed(path, line, column, str(numbers[line].value), others))
        if any(cell.value for cell in numbers.values()):  # zeros alone are of any unit
            signs.add("sign" if signed else "percent" if units[column] else "share")
    if signs >= {"percent", "share"} and not wrong:
        said = {column: "per cent" if units[column] else "shares from 0 to 1" for column in SHARES}
        wrong.append(
            problem_at(
                path,
                "Score and base score are in different units.",
                f"By their sizes, `score` is {said['score']} and `base score` {said['base score']}.",
                "Write both as shares (0.669) or both in per cent (66.9 %).",
            )
        )
    return units


def _fewer(numbers: Mapping[int, Number], some: set[int]) -> list[int]:
    """Lines of those that are in the minority."""
    rest = set(numbers) - some
    return sorted(some if len(some) <= len(rest) else rest)


def _mixed(path: Path, line: int, column: str, has: str, others: str) -> Problem:
    return problem_at(
        path,
        "A column mixes shares and per cent.",
        f"This row has {has}; others {others}.",
        "Write all of the column as shares from 0 to 1, or all with a % sign.",
        line=line,
        column=column,
    )


def _number(text: str) -> Number | None:
    """A number with its unit; None where the cell is no number. What stands behind ± is left out."""
    text = text.translate(SPACES).split("±")[0].split("+/-")[0].strip().replace("−", "-")
    plain = re.sub(r"\s*(%|points?|pp|percent|per cent)$", "", text)
    percent = plain != text
    if re.fullmatch(r"[+-]?\d+,\d+", plain):
        plain = plain.replace(",", ".")  # a decimal comma: no score has thousands
    if not NUMBER.fullmatch(plain):
        return None
    value = Decimal(plain)
    return Number(value, Decimal(1).scaleb(int(value.as_tuple().exponent)), percent)


# ---- a row


def _claim(path: Path, line: Line, units: Mapping[str, bool], wrong: list[Problem]) -> Claim | None:
    """The claim of a row; None where something is wrong with it, which goes to `wrong`."""
    before = len(wrong)
    n = _questions(path, line, wrong)
    mean = "sd" in line.cells or _is_mean(line)
    if mean and (refused := _refused_mean(path, line)):
        wrong.append(refused)
    figures = {column: _figure(path, line, column, units, wrong, mean=mean) for column in SHARES}
    gain = _signed(path, line, "difference", wrong)
    if not mean:  # a spreadsheet drops zeros at the end: 60 beside 66.9 is 60.0
        finest = min((figure.step for figure in figures.values() if figure), default=None)
        figures = {column: figure and figure._replace(step=finest) for column, figure in figures.items()}
    both = figures["score"] and figures["base score"]
    if not both and (gain is None or mean) and len(wrong) == before:
        lacking = [column for column in ("score", "base score") if figures[column] is None]
        advice = "Write the score that is claimed and the score it is compared with, or leave the row out."
        what = f"A row has no {' and no '.join(lacking)}."
        wrong.append(problem_at(path, what, "A difference needs both.", advice, line=line.number))
    recovery = _signed(path, line, "recovery", wrong)
    deviations = [_deviation(path, line, column, wrong) for column in ("sd", "base sd")]
    if n is None or len(wrong) > before:
        return None
    return Claim(
        line=line.number,
        name=line.cells.get("name", f"line {line.number}"),
        metric=line.cells.get("metric", "score"),
        n=n,
        score=figures["score"],
        base=figures["base score"],
        lost=figures["lost score"] if both else None,
        gain=None if both else gain,
        recovery=float(recovery.value) if recovery else None,
        sd=deviations[0],
        base_sd=deviations[1],
    )


def _questions(path: Path, line: Line, wrong: list[Problem]) -> int | None:
    """Column n: 1319, 1,319 or 1 319."""
    text = line.cells.get("n", "").translate(SPACES)
    plain = re.sub(r"[,' _]", "", text) if THOUSANDS.fullmatch(text) else text
    if plain.isascii() and plain.isdecimal() and len(plain) <= LONGEST_N and int(plain) > 0:
        return int(plain)
    why = f"It says {text}." if text else "It says nothing."
    advice = "Write how many questions were asked, as a whole number: 1319 or 1,319."
    wrong.append(problem_at(path, "n is no number of questions.", why, advice, line=line.number, column="n"))
    return None


def _figure(
    path: Path, line: Line, column: str, units: Mapping[str, bool], wrong: list[Problem], *, mean: bool
) -> Figure | None:
    """A score as a share; of a mean the number itself."""
    text = line.cells.get(column)
    if text is None:
        return None
    number = _number(text)
    if number is None:
        why, advice = f"It says {text}.", "Write 0.669, 66.9 or 66.9 %."
        wrong.append(problem_at(path, "A score is no number.", why, advice, line=line.number, column=column))
        return None
    if mean:
        return Figure(number.value, number.step, text)
    scale = 100 if units[column] else 1
    value = number.value / scale
    if not 0 <= value <= 1:
        why = f"It says {text}; a share is from 0 to 1, or from 0 to 100 %."
        advice = "Correct it. If it is a mean of another kind, give its standard deviation by question as `sd`."
        wrong.append(
            problem_at(path, "A score is no share of questions.", why, advice, line=line.number, column=column)
        )
        return None
    return Figure(value, number.step / scale, text)


def _signed(path: Path, line: Line, column: str, wrong: list[Problem]) -> Figure | None:
    """A difference or a recovery, which may be negative: in per cent (or points) by its sign, else a share."""
    text = line.cells.get(column)
    if text is None:
        return None
    number = _number(text)
    if number is None or (not number.percent and abs(number.value) >= 1 and number.value != 1):
        why = f"It says {text}: without a % sign that is no share."
        what, advice = f"The {column} cannot be read.", f"Write it with a sign: {text.strip('%')} %."
        wrong.append(problem_at(path, what, why, advice, line=line.number, column=column))
        return None
    scale = 100 if number.percent else 1
    value = number.value / scale
    if column == "difference" and abs(value) > 1:
        why, advice = f"It says {text}; scores differ by 100 points at most.", "Correct it."
        wrong.append(problem_at(path, "No scores differ so much.", why, advice, line=line.number, column=column))
        return None
    return Figure(value, number.step / scale, text)


def _deviation(path: Path, line: Line, column: str, wrong: list[Problem]) -> float | None:
    text = line.cells.get(column)
    if text is None:
        return None
    number = _number(text)
    if number and not number.percent and number.value > 0:
        return float(number.value)
    why, advice = f"It says {text}.", "Write the standard deviation of the score over questions, in its own unit."
    wrong.append(problem_at(path, "It is no standard deviation.", why, advice, line=line.number, column=column))
    return None


def _is_mean(line: Line) -> bool:
    """Whether the metric's name says that it is no share of questions."""
    return bool(NOT_SHARES.search(_metric(line)))


def _metric(line: Line) -> str:
    return re.sub(r"[_\-./]+", " ", line.cells.get("metric", "").lower())


def _refused_mean(path: Path, line: Line) -> Problem | None:
    """Why a mean says nothing by itself."""
    metric = line.cells.get("metric", "")
    if PERPLEXITY.search(_metric(line)):
        return problem_at(
            path,
            f"{metric} is no mean that has an interval of its own.",
            "It is the exponential of a mean loss.",
            "Write the losses (their logarithms) with `loss` as the metric, n documents, and the standard deviation "
            "of a document's loss as `sd`.",
            line=line.number,
            column="metric",
        )
    if "sd" in line.cells:
        return None
    return problem_at(
        path,
        f"{metric} is no share of questions, and how much it varies is not given.",
        "Of a share n alone says how far chance goes; of any other mean the spread of its rows has to be known.",
        "Add a column `sd`: the standard deviation of the score over rows (and `base sd`, where it is another one).",
        line=line.number,
        column="metric",
    )
