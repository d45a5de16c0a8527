"""Reads infra/docker/Dockerfile as far as it goes: stages, their parents, instructions with continued lines joined."""

from __future__ import annotations

import re
from typing import NamedTuple

from tasks.runtime.process.launch import CHECKOUT

DOCKERFILE = CHECKOUT / "infra" / "docker" / "Dockerfile"


class Instruction(NamedTuple):
    """`RUN`, and what stands behind it."""

    word: str
    rest: str


class Stage(NamedTuple):
    """`FROM parent AS name` and what follows."""

    parent: str
    steps: list[Instruction]


def stages() -> dict[str, Stage]:
    """Every stage by name, in their order."""
    text = re.sub(r"^\s*#.*\n", "", DOCKERFILE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    found: dict[str, Stage] = {}
    name = ""
    for line in filter(None, map(str.strip, re.sub(r"\s*\\\n\s*", " ", text).splitlines())):
        word, _, rest = line.partition(" ")
        if word == "FROM":
            parent, _, name = rest.partition(" AS ")
            found[name] = Stage(parent, [])
        else:
            found[name].steps.append(Instruction(word, rest))
    return found


def context_files(copy: Instruction) -> tuple[list[str], str] | None:
    """Sources and target of a COPY from the checkout; None for one from another stage."""
    words = copy.rest.split()
    if any(word.startswith("--from=") for word in words):
        return None
    *sources, target = [word for word in words if not word.startswith("--")]
    return sources, target
