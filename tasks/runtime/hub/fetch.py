"""Reads from a hub, through huggingface_hub and nothing else. Imported by `tasks.runtime.pin` where a hub id is named.

Measured with huggingface_hub 2.4: a dropped connection is resumed inside one call with a Range request, in steps of
10 MiB, until six attempts in a row bring nothing; between calls only whole files are kept. A reset is not resumed.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from functools import partial
from glob import escape
from pathlib import Path

from httpx2 import TransportError
from huggingface_hub import (
    HfApi,
    get_cached_repo_tree,
    hf_hub_download,  # pyright: ignore[reportUnknownVariableType]
    snapshot_download,  # pyright: ignore[reportUnknownVariableType]
)
from huggingface_hub.constants import HF_HUB_CACHE
from huggingface_hub.errors import (
    CachedRepoTreeNotFoundError,
    HFValidationError,
    OfflineModeIsEnabled,
    RevisionResolutionError,
)
from huggingface_hub.utils import disable_progress_bars

from recipes.problem import Problem, RecipeError
from tasks.runtime.hub.fetch_problems import Pinned, fetch_problem, is_cached, page, why_unreached
from tasks.runtime.hub.ids import (
    ADAPTER_FILES,
    ADAPTER_NEEDED,
    CODE_FILES,
    DATA_CARD,
    DATA_FILES,
    MODEL_FILES,
    HubId,
    Kind,
    Snapshot,
)
from tasks.runtime.hub.repository import SHOWN, explained, list_files, shortened
from tasks.runtime.tokenizer_files import TOKENIZER_FILES

# What is fetched of a hub's repository, and what has to be there (a space: one of these).
PATTERNS: dict[Kind, tuple[str, ...]] = {
    "model": (*MODEL_FILES, *TOKENIZER_FILES),
    "tokenizer": ("config.json", *TOKENIZER_FILES),
    "adapter": ADAPTER_FILES,
    "dataset": (*DATA_FILES, DATA_CARD),
}
NEEDED: dict[Kind, tuple[str, ...]] = {
    "model": ("config.json", "*.safetensors"),
    "tokenizer": ("config.json",),
    "adapter": ADAPTER_NEEDED,
    "dataset": (" ".join(DATA_FILES),),
}
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
GIB = 1 << 30
# What huggingface_hub raises.
ERRORS = (OSError, TransportError, RevisionResolutionError, HFValidationError)


def snapshots(hub_ids: Sequence[HubId]) -> list[Snapshot]:
    """See `tasks.runtime.pin.snapshots`."""
    if not sys.stderr.isatty():
        disable_progress_bars()
    problems: list[Problem] = []
    pinned: list[Pinned] = []
    fetched: list[Snapshot] = []
    for hub in hub_ids:
        with _collected(problems):
            pinned.append(_pin(hub))
    if not problems:
        for hub, repository in zip(hub_ids, pinned, strict=True):
            with _collected(problems):
                fetched.append(whole(hub, repository))
    if problems:
        raise RecipeError(problems)
    return fetched


@contextmanager
def _collected(problems: list[Problem]) -> Generator[None]:
    try:
        yield
    except RecipeError as error:
        problems += error.problems


# ---- looking


def _pin(hub: HubId) -> Pinned:
    """Pin the revision, list the files, refuse what cannot be used, and try the gate on the smallest file."""
    with explained(partial(fetch_problem, hub, None), *ERRORS):
        commit = HfApi().resolve_revision(hub.name, repo_type=hub.repo_type, revision=hub.revision).resolved
        try:
            sizes = _sizes(hub, commit)
        except (TransportError, OfflineModeIsEnabled) as error:  # a cache of an older huggingface_hub has no listing
            return Pinned(commit=commit, files=None, why_unlisted=why_unreached(error))
        wanted = {name: size for name, size in sizes.items() if _is_wanted(hub, name)}
        if problem := _unusable(hub, commit, list(wanted), sizes) or _no_room(hub, commit, wanted):
            raise problem.error()
        gated = (name for name in wanted if name != DATA_CARD)  # a card can be read where the rest cannot
        hf_hub_download(hub.name, min(gated, key=wanted.__getitem__), repo_type=hub.repo_type, revision=commit)
        return Pinned(commit=commit, files=list(wanted))


def _sizes(hub: HubId, commit: str) -> dict[str, int]:
    """Bytes of every file of the repository by name, from the cache or from the hub."""
    try:
        files = list(get_cached_repo_tree(hub.name, repo_type=hub.repo_type, revision=commit))
    except CachedRepoTreeNotFoundError:
        files = list_files(hub.name, repo_type=hub.repo_type, revision=commit)
    return {file.path: file.size for file in files}


def wanted(hub: HubId, commit: str) -> list[str]:
    """The files that would be fetched.

    Raises:
        RecipeError: They cannot be used.
    """
    sizes = _sizes(hub, commit)
    files = [name for name in sizes if _is_wanted(hub, name)]
    if problem := _unusable(hub, commit, files, sizes):
        raise problem.error()
    return files


def _patterns(hub: HubId) -> tuple[str, ...]:
    return (*PATTERNS[hub.kind], *CODE_FILES) if hub.code else PATTERNS[hub.kind]


def _is_wanted(hub: HubId, name: str) -> bool:
    """Whether a file is fetched. A model's lie at the top (not in onnx/ or original/), a data set's anywhere."""
    if name.startswith("consolidated"):  # Mistral's repositories hold the same weights again under this name
        return False
    return any(
        fnmatch(name, pattern) and (hub.kind == "dataset" or name.count("/") == pattern.count("/"))
        for pattern in _patterns(hub)
    )


def _unusable(hub: HubId, commit: str, files: Sequence[str], sizes: Mapping[str, int]) -> Problem | None:
    """What the list of its files shows to be missing from the repository, before anything is downloaded."""
    why = f"at commit {commit[:12]} it holds {shortened(sorted(sizes)) or 'nothing'}"
    missing = [
        pattern
        for pattern in NEEDED[hub.kind]
        if not any(fnmatch(name, part) for part in pattern.split() for name in files)
    ]
    if not missing:
        return None
    if hub.kind in ("model", "tokenizer") and "adapter_config.json" in sizes:
        return hub.problem("is an adapter, not a base model", why=why, next="name the base that it was trained on")
    pickles = sorted(name for name in sizes if name.endswith(PICKLES))
    if pickles and any(pattern.endswith(".safetensors") for pattern in missing):
        return hub.problem(
            f"has its weights as pickles only: {', '.join(pickles[:SHOWN])}",
            why="a pickle can run code when it is opened, so none is ever opened, nor downloaded, here",
            next="name a repository with safetensors (some have them at another revision); or, if you trust it, "
            "convert it with transformers' or peft's save_pretrained and name that folder",
        )
    return hub.problem(
        f"has no {' and no '.join(pattern.replace(' ', ' or ') for pattern in missing)}",
        why=why,
        next=f"check the id and the revision on {page(hub)}",
    )


def _no_room(hub: HubId, commit: str, sizes: Mapping[str, int]) -> Problem | None:
    """The files that are not in the cache yet against its disk's free bytes."""
    needed = sum(size for name, size in sizes.items() if not is_cached(hub, commit, name))
    cache = Path(HF_HUB_CACHE)
    free = shutil.disk_usage(next(folder for folder in (cache, *cache.parents) if folder.exists())).free
    if needed <= free:
        return None
    return hub.problem(
        "does not fit the disk of the cache",
        why=f"{needed / GIB:.1f} GiB are to be downloaded, {free / GIB:.1f} GiB are free at {cache}",
        next="make room, or set HF_HOME to a folder on a larger disk",
    )


# ---- fetching


def whole(hub: HubId, pinned: Pinned) -> Snapshot:
    """Every file that is wanted, from the cache where it has them."""
    with explained(partial(fetch_problem, hub, pinned), *ERRORS):
        folder = snapshot_download(
            hub.name,
            revision=pinned.commit,
            repo_type=hub.repo_type,
            allow_patterns=list(_patterns(hub)) if pinned.files is None else [escape(name) for name in pinned.files],
            local_files_only=pinned.files is None,
        )
    return Snapshot(folder=Path(folder), source=f"{hub.name}@{pinned.commit}")
