"""Secrets in a recipe: it is copied into every run's folder, into exports and into MLflow."""

from __future__ import annotations

from collections.abc import Iterator

from recipes.problem import Problem
from recipes.secrets import secrets_in


def secret_problems(text: str, *, file: str) -> Iterator[Problem]:
    """One problem per secret, with its line; comments count, since they are copied too."""
    for number, line in enumerate(text.splitlines(), start=1):
        yield from _problems(line, where=f"{file}:{number}")


def override_problems(item: str) -> Iterator[Problem]:
    """The same for a `--set`."""
    yield from _problems(item, where=f"--set {item.partition('=')[0]}")


def _problems(text: str, *, where: str) -> Iterator[Problem]:
    for what in secrets_in(text):
        yield Problem(
            what=f"The recipe holds {what}.",
            where=where,
            why="A recipe is copied into every run's folder, into exports and into MLflow, where others read it.",
            next="Remove it, revoke it where it was shared or started from Prefect's pages, and put a new one into the "
            "environment (HF_TOKEN) or into a Secret block of Prefect (docs/operations.md).",
        )
