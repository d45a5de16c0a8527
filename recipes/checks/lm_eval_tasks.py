"""Names of lm-evaluation-harness's tasks, read from its YAML files without importing it.

Its own index parses 14,000 files in 14 s; looking for a name in their bytes first takes 1 s.
"""

from __future__ import annotations

import functools
import importlib.util
import re
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from recipes.plain import is_list, is_mapping
from recipes.plain_yaml import Loader

NAMED = re.compile(rb"^(?:task|group)\s*:\s*[\"']?([\w.\-+/]+)", re.MULTILINE)


class TaskFiles(NamedTuple):
    """Where tasks are defined.

    Attributes:
        files: YAML files by the task, group or tag that they define.
        near: The nearest known name of each task that no file defines; empty where none is near.
    """

    files: dict[str, list[Path]]
    near: dict[str, str]


class _Loader(Loader):
    """Reads `!function module.name` as text."""


_Loader.add_constructor("!function", lambda loader, node: str(getattr(node, "value", "")))


def built_in() -> Path:
    """Folder of the tasks that come with lm_eval; nothing of it is imported."""
    spec = importlib.util.find_spec("lm_eval")
    places = spec.submodule_search_locations if spec else None
    return Path(next(iter(places or ()), "lm_eval")) / "tasks"


def find_tasks(names: Sequence[str], include: Path | None) -> TaskFiles:
    """Look for tasks, groups and tags below `include`, then among those that come with lm_eval.

    Args:
        names: As a recipe names them.
        include: Folder of the recipe's own tasks; a name that is there hides the same one of lm_eval.
    """
    files: dict[str, list[Path]] = {}
    known: set[str] = set()
    for root in (include, built_in()):
        missing = [name for name in names if name not in files]
        if root is None or not missing:
            continue
        for path in sorted(root.rglob("*.yaml")):
            text = path.read_bytes()
            known.update(match.decode() for match in NAMED.findall(text))
            for name in missing:
                if name.encode() in text and _mentions(name).search(text) and name in _defined(path):
                    files.setdefault(name, []).append(path)
    near = {name: get_close_matches(name, known, n=1, cutoff=0.6) for name in names if name not in files}
    return TaskFiles(files, {name: close[0] if close else "" for name, close in near.items()})


@functools.cache
def _mentions(name: str) -> re.Pattern[bytes]:
    """A line that could define a name: `task: NAME`, `tag: [.., NAME]`, `- NAME`. Only then is the YAML parsed."""
    whole = rb"(?<![\w.-])" + re.escape(name.encode()) + rb"(?![\w.-])"
    return re.compile(rb"^(?:(?:task|group|tag)\s*:.*|\s*-\s*[\"']?)" + whole, re.MULTILINE)


def task_of(path: Path) -> dict[str, Any]:
    """What a task's YAML file says, with what its `include:` adds; empty where it is no mapping."""
    task = _mapping(path)
    base = task.get("include")
    if not isinstance(base, str) or not (path.parent / base).is_file() or (path.parent / base) == path:
        return task
    return {**_mapping(path.parent / base), **task}


def _mapping(path: Path) -> dict[str, Any]:
    try:
        task: Any = yaml.load(path.read_bytes(), Loader=_Loader)
    except yaml.YAMLError:
        return {}
    return dict(task) if is_mapping(task) else {}


def _defined(path: Path) -> set[str]:
    """Names of the task, the group and the tags of one file; empty where it is no mapping."""
    task = _mapping(path)
    tags = task.get("tag")
    names = [task.get("task"), task.get("group"), *(tags if is_list(tags) else [tags])]
    return {name for name in names if isinstance(name, str)}
