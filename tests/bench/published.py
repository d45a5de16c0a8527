"""The section of docs/results/folklore.md on published figures: `python -m tests.bench.folklore --claims` writes it.

tests/bench/claims-with-n.csv holds claims of the field that come with their number of questions, each with its source;
`quench audit` says what they can bear. It needs no run.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path

from flows.commands.audit import sentences, summary
from flows.commands.audit_table import read_table
from flows.results.audit import Audited, audited
from flows.results.metrics import interval_text

CLAIMS = Path(__file__).with_name("claims-with-n.csv")
HEADING = "## Published figures, audited"


def section(path: Path = CLAIMS) -> str:
    """The section, from its heading on."""
    found = audited(read_table(path).claims)
    with path.open(encoding="utf-8", newline="") as opened:
        lines = list(csv.DictReader(opened))
    rows = "\n".join(_rows(found, lines))
    together = sum(one.together.outcome == "shown" for one in found)
    return f"""{HEADING}

`quench audit tests/bench/claims-with-n.csv`; nothing was run. The figures are those of the sources, n is the size of
the test set that they name, and averages over its subjects are taken for averages over its questions. (For the first
line n is ours: of GPQA's three sets only with diamond's 198 questions does a whole number of them round to 1.0 points.)
Nobody published which questions each model got right, and the interval of a difference depends on that. The narrowest
holds if the worse one is right nowhere that the better one is wrong, the widest if they share as few right answers as
the scores allow. [How](../report.md#published-scores).

{rows}

{summary(found).split(";")[0]}.
At a level that holds for all of them together (Bonferroni), {together} are shown whatever the pairing. A claim that
cannot be shown is not refuted: this many questions say neither.
"""


def _rows(found: list[Audited], lines: list[dict[str, str]]) -> Iterator[str]:
    head = [
        "what the figures say",
        "of what",
        "n",
        "score, base score",
        "difference: narrowest; widest",
        "what they can bear",
    ]
    yield f"| {' | '.join(head)} |"
    yield f"| {' | '.join('---' for _ in head)} |"
    for one, line in zip(found, lines, strict=True):
        scores = [line[name] for name in ("score", "base score") if line[name]]
        scores += [f"{line['lost score']} before"] if line["lost score"] else []
        narrowest, widest = (interval_text("task", one.difference, list(ends)) for ends in (one.narrowest, one.widest))
        cells = [
            f"{line['claim']} ([source]({line['source']}))",
            f"{line['name']}, {line['metric']}",
            line["n"],
            ", ".join(scores) or "not given",
            f"{narrowest}; {widest} points",
            " ".join(sentences(one)),
        ]
        yield f"| {' | '.join(cells)} |"
