"""The last number of the answer is the last number of the reference."""

from __future__ import annotations

import re
from collections.abc import Mapping
from decimal import Decimal, DecimalException
from typing import Any

from tasks.jobs.scorers import Verdict
from tasks.runtime.bounds import OverBounds, bounds

SECONDS, MIB = 10.0, 512  # of one answer: a pattern can take for ever, the default one takes 1 ms of 4,000 tokens


class NumberScorer:
    """Scores by a regular expression with one group; thousands separators are dropped."""

    def __init__(self, pattern: str, *, absolute: float, relative: float) -> None:
        self._pattern = re.compile(pattern)
        self._absolute, self._relative = Decimal(str(absolute)), Decimal(str(relative))

    def __call__(self, answer: str, reference: str, columns: Mapping[str, Any]) -> Verdict:
        """1 where both numbers are within the tolerance. A reference without one scores 0 and is refused."""
        try:
            with bounds(seconds=SECONDS, mib=MIB):
                expected, number = self.find(reference), self.find(answer)
        except OverBounds as error:
            return Verdict(0.0, f"to find a number with this pattern takes {error}")
        if expected is None:
            return Verdict(0.0, "no number in the reference")
        if number is None:
            return Verdict(0.0, "no number in the answer")
        try:
            within = max(self._absolute, self._relative * abs(expected))
            return Verdict(float(abs(number - expected) <= within))
        except DecimalException:
            return Verdict(float(number == expected), "" if number == expected else "a number too large to compare")

    def find(self, text: str) -> Decimal | None:
        """The last match as a number; None where nothing matches, or the last match is not a number."""
        matches = self._pattern.findall(text)
        if not matches:
            return None
        try:
            number = Decimal(matches[-1].replace(",", "").replace("−", "-"))
        except DecimalException:
            return None
        return number if number.is_finite() else None
