"""Prints the names that a base's files have for modules of an adapter: asked by `recipes.checks.module_names`.

python -P -m tasks.jobs.merging.module_names FOLDER < NAMES.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from recipes.models.weights import read_tensors
from tasks.jobs.merging.skeleton import read_skeleton


def main() -> None:
    """Names as a JSON list on stdin; on the last line of stdout an object with those that the base has."""
    folder = Path(sys.argv[1])
    skeleton = read_skeleton(folder, read_tensors(folder))
    known = {}
    for name in json.load(sys.stdin):
        stored = skeleton.stored.get(f"{skeleton.names.here(name)}.weight")
        if stored is not None:
            known[name] = stored.removesuffix(".weight")
    print("\n" + json.dumps(known))


if __name__ == "__main__":
    main()
