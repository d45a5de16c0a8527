"""What reading from a hub and sending to it share: the files of a repository, and errors told as problems."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager

from huggingface_hub import HfApi, RepoFile

from recipes.problem import Problem

SHOWN = 8  # names that an error lists


def list_files(name: str, *, repo_type: str = "model", revision: str | None = None) -> list[RepoFile]:
    """Every file of a repository, in all its folders."""
    tree = HfApi().list_repo_tree(name, repo_type=repo_type, revision=revision, recursive=True)
    return [entry for entry in tree if isinstance(entry, RepoFile)]


@contextmanager
def explained(problem_of: Callable[[Exception], Problem], *kinds: type[Exception]) -> Generator[None]:
    """Turn an error of one of these kinds into the RecipeError of its problem."""
    try:
        yield
    except kinds as error:
        raise problem_of(error).error() from error


def first_line(error: BaseException | None) -> str:
    """The first line of an error's text that says something, else the name of its class."""
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


def shortened(names: Sequence[str]) -> str:
    """The first names, and how many there are more."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
