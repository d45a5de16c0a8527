"""The last number of the answer is the last number of the reference."""

from __future__ import annotations

import re
from collections.abc import Mapping
from decimal import Decimal, InvalidOperation
from typing import Any

from tasks.jobs.scorers import Verdict


class NumberScorer:
    """Scores by a regular expression with one group; thousands separators are dropped."""

    def __init__(self, pattern: str, *, absolute: float, relative: float) -> None:
        self._pattern = re.compile(pattern)
        self._absolute, self._relative = Decimal(str(absolute)), Decimal(str(relative))

    def __call__(self, answer: str, reference: str, columns: Mapping[str, Any]) -> Verdict:
        """1 where both numbers are within the tolerance. A reference without one scores 0 and is refused."""
        expected, number = self.find(reference), self.find(answer)
        if expected is None:
            return Verdict(0.0, "no number in the reference")
        if number is None:
            return Verdict(0.0, "no number in the answer")
        within = max(self._absolute, self._relative * abs(expected))
        return Verdict(float(abs(number - expected) <= within))

    def find(self, text: str) -> Decimal | None:
        """The last match as a number; None where nothing matches, or the last match is not a number."""
        matches = self._pattern.findall(text)
        if not matches:
            return None
        try:
            number = Decimal(matches[-1].replace(",", "").replace("−", "-"))
        except InvalidOperation:
            return None
        return number if number.is_finite() else None
