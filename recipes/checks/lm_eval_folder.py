"""What a folder of lm-eval tasks reaches beyond itself: other YAML files, Python elsewhere, links.

Whoever allows the folder has read what lies in it, and its digest is part of the steps' identity. lm-eval follows an
`include:` and a `!function` to wherever they lead, `..` and absolute paths included.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, cast

import yaml

from recipes.checks.lm_eval_tasks import built_in
from recipes.plain_yaml import inside


class Way(NamedTuple):
    """A way out of the folder.

    Attributes:
        file: The file that it stands in.
        line: Its line; 0 for a link.
        written: As it is written.
        target: Where it leads.
    """

    file: Path
    line: int
    written: str
    target: Path


def ways_out(folder: Path) -> Iterator[Way]:
    """Every include, function and link of a folder that leads out of it; lm-eval's own tasks may be included."""
    root = folder.resolve()
    waiting: list[Path] = []
    for path in sorted(folder.rglob("*")):
        if path.is_symlink() and not path.resolve().is_relative_to(root):
            yield Way(path, 0, path.name, path.resolve())
        elif path.suffix in (".yaml", ".yml") and path.is_file():
            waiting.append(path)
    read: set[Path] = set()
    while waiting:
        path = waiting.pop(0)
        if path.resolve() in read:
            continue
        read.add(path.resolve())
        for line, written, target in _named(path):
            if target.is_relative_to(root):
                waiting += [target] if target.is_file() and target.suffix != ".py" else []  # of any name
            elif not target.is_relative_to(built_in().resolve()):
                yield Way(path, line, written, target)


class _Named(NamedTuple):
    line: int
    written: str
    target: Path


def _named(path: Path) -> Iterator[_Named]:
    """Files that a YAML file names by `include:` and `!function`; none where it cannot be read, as lm-eval cannot."""
    try:
        top = cast("yaml.Node | None", yaml.compose(path.read_bytes(), yaml.SafeLoader))  # pyright: ignore[reportUnknownMemberType]
    except (yaml.YAMLError, RecursionError):
        return
    for node in _nodes(top):
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                if key.value == "include":
                    yield from (_included(path, entry) for entry in _entries(value))
        elif node.tag == "!function" and (target := _function_file(path, str(node.value))):
            yield _Named(node.start_mark.line + 1, f"!function {node.value}", target)


def _nodes(top: yaml.Node | None) -> Iterator[yaml.Node]:
    """Every node once, also where aliases name it many times."""
    left, seen = [top] if top else [], set[int]()
    while left:
        node = left.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        yield node
        left += inside(node)


def _entries(node: yaml.Node) -> list[yaml.Node]:
    """One entry, or each of a list; what lm-eval reads is a name or names."""
    entries = node.value if isinstance(node, yaml.SequenceNode) else [node]
    return [entry for entry in entries if isinstance(entry, yaml.ScalarNode)]


def _included(path: Path, entry: yaml.Node) -> _Named:
    target = (path.resolve().parent / str(entry.value)).resolve()  # lm-eval, too, counts from where a link leads
    return _Named(entry.start_mark.line + 1, f"include: {entry.value}", target)


def _function_file(path: Path, name: str) -> Path | None:
    """The file that lm-eval would import for a function; None for one of an installed package."""
    module = name.rpartition(".")[0].replace(".", "/")
    target = (path.resolve().parent / f"{module}.py").resolve()  # a leading dot makes it an absolute path
    return target if target.exists() else None
