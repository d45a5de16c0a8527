"""Answer and reference are the same text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tasks.jobs.scorers import Verdict


def exact_match(answer: str, reference: str, columns: Mapping[str, Any]) -> Verdict:
    """1 where both are equal after stripping white space around them."""
    return Verdict(float(answer.strip() == reference.strip()))
