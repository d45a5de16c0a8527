"""The last number of the answer is the last number of the reference."""

from __future__ import annotations

import re
from collections.abc import Mapping
from decimal import Decimal, InvalidOperation
from typing import Any

from tasks.jobs.scorers import Verdict


class Number:
    """Scores by a regular expression with one group; thousands separators are dropped."""

    def __init__(self, pattern: str, *, absolute: float, relative: float) -> None:
        self._pattern = re.compile(pattern)
        self._absolute, self._relative = Decimal(str(absolute)), Decimal(str(relative))

    def __call__(self, answer: str, reference: str, columns: Mapping[str, Any]) -> Verdict:
        """1 where both numbers are within the tolerance. A reference without one is scored 0, and so is refused."""
        wanted, got = self.find(reference), self.find(answer)
        if wanted is None:
            return Verdict(0.0, "no number in the reference")
        if got is None:
            return Verdict(0.0, "no number in the answer")
        within = max(self._absolute, self._relative * abs(wanted))
        return Verdict(float(abs(got - wanted) <= within))

    def find(self, text: str) -> Decimal | None:
        """The last match as a number; None where nothing matches, or what matches last is no number."""
        found = self._pattern.findall(text)
        if not found:
            return None
        try:
            number = Decimal(found[-1].replace(",", "").replace("−", "-"))
        except InvalidOperation:
            return None
        return number if number.is_finite() else None
