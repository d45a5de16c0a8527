"""Secrets in a recipe: it is copied into every run's folder, into exports and into MLflow."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from recipes.problem import Problem
from recipes.secrets import Secret, secrets_in


def secret_problems(text: str, *, file: str, keys: Mapping[int, str]) -> Iterator[Problem]:
    """One problem per secret, with its line and key; comments count, since they are copied too.

    Args:
        text: Of the recipe.
        file: Its name, as it is shown.
        keys: Line -> name of the last field that begins there; empty where the file is no YAML.
    """
    lines = text.split("\n")
    for secret in secrets_in(text):
        number = text.count("\n", 0, secret.start) + 1
        comment = lines[number - 1].lstrip().startswith("#")
        above = max((line for line in keys if line <= number), default=None)
        key = "in a comment" if comment else "" if above is None else keys[above]
        yield _problem(secret, where=f"{file}:{number} {key}".rstrip())


def override_problems(item: str) -> Iterator[Problem]:
    """The same for a `--set`."""
    for secret in secrets_in(item):
        yield _problem(secret, where=f"--set {item.partition('=')[0]}")


def _problem(secret: Secret, *, where: str) -> Problem:
    return Problem(
        what=f"The recipe holds {secret.what} ({secret.shown}).",
        where=where,
        why="A recipe is copied into every run's folder, into exports and into MLflow, where others read it.",
        next="Remove it, revoke it where it was shared or started from Prefect's pages, and put a new one into the "
        "environment (HF_TOKEN) or into a Secret block of Prefect (docs/operations.md). A name that only looks like "
        "one needs another name.",
    )
