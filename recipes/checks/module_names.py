"""Modules of a base that its files name otherwise than transformers does, beyond what wrappers around layers explain.

transformers knows its own renamings. A child process asks it (10 to 20 s: it imports torch), only for names that the
files do not explain, which is before a refusal.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from recipes.plain import is_mapping

CHILD = "tasks.jobs.merging.module_names"
SECONDS = 300  # for a busy machine with its packages on a network disk; then the names count as unknown


def names_in_files(folder: Path, modules: Sequence[str]) -> Mapping[str, str]:
    """What transformers says of these modules: name in the base's files by the adapter's, for those that it knows.

    Args:
        folder: The base's.
        modules: Names in the adapter.
    """
    if not modules:
        return {}
    command = [sys.executable, "-P", "-m", CHILD, str(folder)]
    try:
        done = subprocess.run(
            command, input=json.dumps(list(modules)), capture_output=True, text=True, timeout=SECONDS, check=True
        )
        answer: object = json.loads(done.stdout.splitlines()[-1])
    except (subprocess.SubprocessError, OSError, json.JSONDecodeError, IndexError):
        return {}
    return {str(name): str(stored) for name, stored in answer.items()} if is_mapping(answer) else {}
