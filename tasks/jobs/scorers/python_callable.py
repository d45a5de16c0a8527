"""A function of the user's own: `def score(answer, reference, columns)` -> a number from 0 to 1, or a bool."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tasks.jobs.scorers import Scorer, ScorerFailed, Verdict, is_share
from tasks.runtime.process.errors import StageError


def load_function(path: Path, name: str) -> Scorer:
    """Run the file once, alone: modules beside it are not found, since they would not be part of the identity.

    Raises:
        StageError: The file raises, or does not have the callable.
    """
    spec = importlib.util.spec_from_file_location(f"scorer_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise _unusable(path, name, "Python does not know how to load it")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # the user's code: it may raise anything, and all of it is reported
        raise _unusable(path, name, _in_words(error)) from error
    function = getattr(module, name, None)
    if not callable(function):
        raise _unusable(path, name, f"it has no callable named {name}")
    return _scorer(function, name)


def _scorer(function: Callable[..., Any], name: str) -> Scorer:
    def score(answer: str, reference: str, columns: Mapping[str, Any]) -> Verdict:
        try:
            value = function(answer, reference, dict(columns))
        except Exception as error:  # the user's code, as above
            raise ScorerFailed(f"{name} raised {_in_words(error)}") from error
        if not is_share(value):
            raise ScorerFailed(f"{name} returned {value!r}, which is no number from 0 to 1")
        return Verdict(float(value))

    return score


def _in_words(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _unusable(path: Path, name: str, why: str) -> StageError:
    return StageError.of(
        what=f"the scorer {path.name}:{name} cannot be loaded",
        where=str(path),
        why=why,
        next="correct the file; it is loaded alone, so it may import installed packages and nothing beside itself",
    )
