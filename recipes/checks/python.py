"""Python that a recipe names: none of it is imported unless whoever starts the run allows it (docs/adr/0013).

A recipe is data, often somebody else's. What it names is allowed by `--allow-python FILE_FOLDER_OR_PACKAGE`, or by
the environment variable QUENCH_ALLOW_PYTHON, which is what a deployment's worker has.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from recipes.problem import Problem
from recipes.read.load import Loaded
from recipes.schema import is_hub_id
from recipes.scorers import LmEvalSpec, PythonCallableSpec, input_name

FLAG, VARIABLE = "--allow-python", "QUENCH_ALLOW_PYTHON"


class Code(NamedTuple):
    """Python that a recipe names.

    Attributes:
        field: Its field.
        written: As the recipe names it.
        input: Name of what is read, among a run's pins.
        entry: What has to be allowed.
        allowed: The entry of QUENCH_ALLOW_PYTHON that allows it; None where none does.
    """

    field: str
    written: str
    input: str
    entry: str
    allowed: str | None

    @property
    def is_model(self) -> bool:
        """Code that comes with an external model."""
        return self.field.startswith("evaluate.external.")


def named_python(loaded: Loaded) -> Iterator[Code]:
    """Every place of the recipe that names Python.

    A scorer's function; a folder of lm-eval tasks, whose YAML names functions and whose templates reach Python; a
    model with code of its own.
    """
    for number, scorer in enumerate(loaded.recipe.evaluate.scorers):
        path = loaded.content(scorer)
        if path is None or not isinstance(scorer, PythonCallableSpec | LmEvalSpec):
            continue
        path, module = path.resolve(), None
        if isinstance(scorer, PythonCallableSpec) and not scorer.parts.source.endswith(".py"):
            module = None if path.is_relative_to(loaded.folder) else scorer.parts.source
        field = f"evaluate.scorers.{number}.{scorer.content}"
        entry = module.split(".")[0] if module else str(path)
        yield Code(field, scorer.path or "", input_name(number), entry, _allowing(None if module else path, module))
    for name, model in loaded.recipe.evaluate.externals.items():
        if model.trust_remote_code:
            path, field = loaded.externals[name], f"evaluate.external.{name}.trust_remote_code"
            yield Code(field, model.path, name, str(path or model.path), _allowing(path, None if path else model.path))


def python_problems(loaded: Loaded) -> Iterator[Problem]:
    """What nobody has allowed."""
    for code in named_python(loaded):
        if code.allowed is None:
            yield Problem(
                what=f"The recipe names Python that nobody has allowed: {code.written}.",
                where=code.field,
                why="A recipe is data and may come from anywhere; code that it names runs as you, with your files.",
                next=f"Read it; then type {FLAG} {code.entry}, or set {VARIABLE}={code.entry} where `quench up` or a "
                "worker is started.",
            )


def entries() -> list[str]:
    """What is allowed, as it was written."""
    return [entry for entry in os.environ.get(VARIABLE, "").split(os.pathsep) if entry]


def allow(words: list[str]) -> None:
    """Let this process and its children import these; a path is kept as an absolute one."""
    if not words:
        return
    more = [str(Path(word).resolve()) if _is_path(word) else word for word in words]
    os.environ[VARIABLE] = os.pathsep.join([*entries(), *more])


def _is_path(entry: str) -> bool:
    """A package's name and a hub id are none, unless a file or folder has that name."""
    is_name = all(part.isidentifier() for part in entry.split(".")) or is_hub_id(entry, folder=Path.cwd())
    return Path(entry).exists() or not is_name


def _allowing(path: Path | None, name: str | None) -> str | None:
    """A path allows what lies below it; a package its modules, never a file of the recipe's folder with its name."""
    for entry in entries():
        if _is_path(entry):
            if path is not None and path.is_relative_to(Path(entry).resolve()):
                return entry
        elif name is not None and (name == entry or name.startswith(f"{entry}.")):
            return entry
    return None
