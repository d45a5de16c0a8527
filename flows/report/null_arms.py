"""Where null arms stand in a report: in a section of their own, for they are no way to ship anything."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def ways(report: Mapping[str, Any]) -> dict[str, Any]:
    """The arms but the null arms."""
    return {slug: arm for slug, arm in report["arms"].items() if arm["role"] != "null"}


def null_arms(report: Mapping[str, Any]) -> list[str]:
    """Slugs of the null arms that were evaluated."""
    return [slug for slug, arm in report["arms"].items() if arm["role"] == "null" and arm["status"] == "ok"]


def not_ranked(report: Mapping[str, Any]) -> dict[str, str]:
    """Arms that are left out of the ranking, and why; of null arms their own section says it."""
    return {slug: why for slug, why in report["not_ranked"].items() if report["arms"][slug]["role"] != "null"}


def verdict_text(comparison: Mapping[str, Any]) -> str:
    """The verdict, and that the difference is no more than noise of arithmetic, where it is."""
    noise = comparison.get("noise")
    return f"{comparison['verdict']}; {noise}" if noise else comparison["verdict"]


def is_unmade_null(arm: Mapping[str, Any]) -> bool:
    """A null arm that was too dear, or cannot be: where arms are listed it would say nothing."""
    return arm["role"] == "null" and arm["status"] == "unavailable"
