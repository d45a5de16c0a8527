"""Pinning: from what a recipe names to bytes with a digest. The one place that talks to a hub."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from recipes.problem import Problem, RecipeError
from tasks.runtime.fingerprint import file_digest, fingerprint
from tasks.runtime.step import External
from tasks.runtime.store import read_json, write_json

# What a model folder can hold besides weights that shapes any result.
MODEL_FILES = ("*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json")
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_templates/*",
)

# What an adapter folder can hold that shapes a merge.
ADAPTER_FILES = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "nf4.json",
    "config.json",
    "generation_config.json",
    "tokenizer/*",
    *TOKENIZER_FILES,
)


class Digests:
    """sha256 of external files, remembered by path, size and time of change: a 16 GB base is read once."""

    def __init__(self, home: Path) -> None:
        self.path = home / "digests.json"
        self._known: dict[str, dict[str, str]] = read_json(self.path) if self.path.exists() else {}

    def of(self, path: Path) -> str:
        """Digest of one file."""
        stat = path.stat()
        mark = f"{stat.st_size} {stat.st_mtime_ns} {stat.st_ino}"
        known = self._known.get(str(path))
        if known is None or known["mark"] != mark:
            known = {"mark": mark, "sha256": file_digest(path)}
            self._known[str(path)] = known
        return known["sha256"]

    def save(self) -> None:
        """Keep what was read for the next run."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.path, self._known)


def external_file(name: str, path: Path, *, digests: Digests, source: str = "") -> External:
    """One file as an input."""
    return External(name=name, path=path.resolve(), digest=digests.of(path.resolve()), source=source or path.name)


def external_folder(name: str, path: Path, *, patterns: Iterable[str], digests: Digests, source: str = "") -> External:
    """The files of a folder that match `patterns`, as one input: names and bytes, wherever the folder lies."""
    root = path.resolve()
    files = sorted({file for pattern in patterns for file in root.glob(pattern) if file.is_file()})
    content = {str(file.relative_to(root)): digests.of(file.resolve()) for file in files}
    return External(name=name, path=root, digest=fingerprint({"files": content}), source=source or path.name)


class Snapshot(NamedTuple):
    """A model or data set on this machine: its folder, and `org/name@commit` or the path as written."""

    folder: Path
    source: str


def snapshot(repository: str, *, revision: str | None, kind: str, where: str) -> Snapshot:
    """Download `org/name` at a revision, pinned to the commit that it names now.

    Args:
        repository: Hub id.
        revision: Branch, tag or commit; None is the default branch.
        kind: `model`, `adapter` or `dataset`.
        where: Recipe field, for the error.

    Raises:
        RecipeError: Gated, missing, wrong revision, or no network and not in the cache.
    """
    from huggingface_hub import snapshot_download  # pyright: ignore[reportUnknownVariableType]
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    patterns: dict[str, list[str]] = {"model": [*MODEL_FILES, *TOKENIZER_FILES], "adapter": [*ADAPTER_FILES]}
    try:
        folder = Path(
            snapshot_download(
                repository,
                revision=revision,
                repo_type="dataset" if kind == "dataset" else "model",
                allow_patterns=patterns.get(kind),
            )
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        host = os.environ.get("HF_ENDPOINT", "the hub")
        raise RecipeError(
            [
                Problem(
                    what=f"{kind} {repository}{'@' + revision if revision else ''} cannot be fetched",
                    where=where,
                    why=f"{type(error).__name__} from {host}: {str(error).splitlines()[0]}",
                    next="check the id and the revision; for a gated repository accept its terms on its page and set "
                    "HF_TOKEN; offline, name a local folder instead",
                )
            ]
        ) from error
    return Snapshot(folder=folder, source=f"{repository}@{folder.name}")
