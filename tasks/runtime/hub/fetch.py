"""Reads from a hub, through huggingface_hub and nothing else. Imported by `tasks.runtime.pin` where a hub id is named.

Measured with huggingface_hub 2.4: a dropped connection is resumed inside one call with a Range request, in steps of
10 MiB, until six attempts in a row bring nothing; between calls only whole files are kept. A reset is not resumed.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatch
from glob import escape
from pathlib import Path

from httpx2 import TransportError
from huggingface_hub import (
    HfApi,
    RepoFile,
    get_cached_repo_tree,
    get_token,
    hf_hub_download,  # pyright: ignore[reportUnknownVariableType]
    snapshot_download,  # pyright: ignore[reportUnknownVariableType]
    try_to_load_from_cache,
)
from huggingface_hub.constants import ENDPOINT, HF_HUB_CACHE
from huggingface_hub.errors import (
    CachedRepoTreeNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    RevisionResolutionError,
)
from huggingface_hub.utils import disable_progress_bars

from recipes.problem import Problem, RecipeError
from tasks.runtime.hub.ids import (
    ADAPTER_FILES,
    ADAPTER_NEEDED,
    CODE_FILES,
    DATA_FILES,
    MODEL_FILES,
    HubId,
    Kind,
    Snapshot,
)
from tasks.runtime.tokenizer_files import TOKENIZER_FILES

# What is fetched of a hub's repository, and what has to be there (a space: one of these).
PATTERNS: dict[Kind, tuple[str, ...]] = {
    "model": (*MODEL_FILES, *TOKENIZER_FILES),
    "adapter": ADAPTER_FILES,
    "dataset": DATA_FILES,
}
NEEDED: dict[Kind, tuple[str, ...]] = {
    "model": ("config.json", "*.safetensors"),
    "adapter": ADAPTER_NEEDED,
    "dataset": (" ".join(DATA_FILES),),
}
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
GIB = 1 << 30
SHOWN = 8  # files or revisions that an error lists


@dataclass(frozen=True, kw_only=True)
class _Seen:
    """A repository at the commit that is used; where the hub did not list its `files`, why not."""

    commit: str
    files: list[str] | None
    unlisted: str = ""


def snapshots(asked: Sequence[HubId]) -> list[Snapshot]:
    """See `tasks.runtime.pin.snapshots`."""
    if not sys.stderr.isatty():
        disable_progress_bars()
    problems: list[Problem] = []
    seen: list[_Seen] = []
    done: list[Snapshot] = []
    for hub in asked:
        with _collected(problems):
            seen.append(_look(hub))
    if not problems:
        for hub, there in zip(asked, seen, strict=True):
            with _collected(problems):
                done.append(_fetch(hub, there))
    if problems:
        raise RecipeError(problems)
    return done


@contextmanager
def _collected(problems: list[Problem]) -> Generator[None]:
    try:
        yield
    except RecipeError as error:
        problems += error.problems


# ---- looking


def _look(hub: HubId) -> _Seen:
    """Pin the revision, list the files, refuse what cannot be used, and try the gate on the smallest file."""
    with _explained(hub):
        commit = HfApi().resolve_revision(hub.name, repo_type=hub.repo_type, revision=hub.revision).resolved
        try:
            sizes = _sizes(hub, commit)
        except (TransportError, OfflineModeIsEnabled) as error:  # a cache of an older huggingface_hub has no listing
            return _Seen(commit=commit, files=None, unlisted=_unreached(error))
        files = [name for name in sizes if _is_asked(hub, name)]
        if problem := _unusable(hub, commit, files, sizes) or _no_room(hub, commit, {one: sizes[one] for one in files}):
            raise problem.error()
        hf_hub_download(hub.name, min(files, key=sizes.__getitem__), repo_type=hub.repo_type, revision=commit)
        return _Seen(commit=commit, files=files)


def _sizes(hub: HubId, commit: str) -> dict[str, int]:
    """Bytes of every file of the repository by name, from the cache or from the hub."""
    try:
        tree = get_cached_repo_tree(hub.name, repo_type=hub.repo_type, revision=commit)
    except CachedRepoTreeNotFoundError:
        tree = HfApi().list_repo_tree(hub.name, repo_type=hub.repo_type, revision=commit, recursive=True)
    return {one.path: one.size for one in tree if isinstance(one, RepoFile)}


def _patterns(hub: HubId) -> tuple[str, ...]:
    return (*PATTERNS[hub.kind], *CODE_FILES) if hub.code else PATTERNS[hub.kind]


def _is_asked(hub: HubId, name: str) -> bool:
    """Whether a file is fetched. A model's lie at the top (not in onnx/ or original/), a data set's anywhere."""
    if name.startswith("consolidated"):  # Mistral's repositories hold the same weights again under this name
        return False
    return any(
        fnmatch(name, pattern) and (hub.kind == "dataset" or name.count("/") == pattern.count("/"))
        for pattern in _patterns(hub)
    )


def _unusable(hub: HubId, commit: str, files: Sequence[str], sizes: Mapping[str, int]) -> Problem | None:
    """What the list of its files shows to be missing from the repository, before anything is downloaded."""
    listed = ", ".join(sorted(sizes)[:SHOWN]) + (f" and {len(sizes) - SHOWN} more" if len(sizes) > SHOWN else "")
    why = f"at commit {commit[:12]} it holds {listed or 'nothing'}"
    missing = [
        pattern
        for pattern in NEEDED[hub.kind]
        if not any(fnmatch(name, part) for part in pattern.split() for name in files)
    ]
    if not missing:
        return None
    if hub.kind == "model" and "adapter_config.json" in sizes:
        return _said(hub, "is an adapter, not a base model", why=why, next="name the base that it was trained on")
    pickles = sorted(name for name in sizes if name.endswith(PICKLES))
    if pickles and any(one.endswith(".safetensors") for one in missing):
        return _said(
            hub,
            f"has its weights as pickles only: {', '.join(pickles[:SHOWN])}",
            why="a pickle can run code when it is opened, so none is ever opened, nor downloaded, here",
            next="name a repository with safetensors (some have them at another revision); or, if you trust it, "
            "convert it with transformers' or peft's save_pretrained and name that folder",
        )
    return _said(
        hub,
        f"has no {' and no '.join(one.replace(' ', ' or ') for one in missing)}",
        why=why,
        next=f"check the id and the revision on {_page(hub)}",
    )


def _no_room(hub: HubId, commit: str, sizes: Mapping[str, int]) -> Problem | None:
    """The files that are not in the cache yet against its disk's free bytes."""
    needed = sum(size for name, size in sizes.items() if not _is_cached(hub, commit, name))
    cache = Path(HF_HUB_CACHE)
    free = shutil.disk_usage(next(folder for folder in (cache, *cache.parents) if folder.exists())).free
    if needed <= free:
        return None
    return _said(
        hub,
        "does not fit the disk of the cache",
        why=f"{needed / GIB:.1f} GiB are to be downloaded, {free / GIB:.1f} GiB are free at {cache}",
        next="make room, or set HF_HOME to a folder on a larger disk",
    )


def _is_cached(hub: HubId, commit: str, name: str) -> bool:
    return isinstance(try_to_load_from_cache(hub.name, name, revision=commit, repo_type=hub.repo_type), str)


# ---- fetching


def _fetch(hub: HubId, seen: _Seen) -> Snapshot:
    with _explained(hub, seen):
        folder = snapshot_download(
            hub.name,
            revision=seen.commit,
            repo_type=hub.repo_type,
            allow_patterns=list(_patterns(hub)) if seen.files is None else [escape(name) for name in seen.files],
            local_files_only=seen.files is None,
        )
    return Snapshot(folder=Path(folder), source=f"{hub.name}@{seen.commit}")


# ---- what went wrong


def _page(hub: HubId) -> str:
    """Address of the repository's page, where terms are accepted."""
    return f"{ENDPOINT}/{'datasets/' if hub.kind == 'dataset' else ''}{hub.name}"


def _said(hub: HubId, what: str, *, why: str, next: str) -> Problem:
    """A problem of this repository; `what` continues `model org/name@revision`."""
    revision = f"@{hub.revision}" if hub.revision else ""
    return Problem(what=f"{hub.kind} {hub.name}{revision} {what}", where=hub.field, why=why, next=next)


@contextmanager
def _explained(hub: HubId, seen: _Seen | None = None) -> Generator[None]:
    """Turn whatever huggingface_hub raises into a RecipeError."""
    try:
        yield
    except (OSError, TransportError, RevisionResolutionError, HFValidationError) as error:
        raise _problem(hub, seen, error).error() from error


def _problem(hub: HubId, seen: _Seen | None, error: Exception) -> Problem:
    nothing_cached = isinstance(error, LocalEntryNotFoundError | RevisionResolutionError)
    cause = error.__cause__ if nothing_cached else error
    if isinstance(cause, HfHubHTTPError):
        return _refused(hub, cause)
    if isinstance(cause, HFValidationError):
        return _said(hub, "is no id of a hub", why=_first_line(cause), next="write it as org/name, or name a folder")
    if nothing_cached or (isinstance(cause, TransportError) and seen is None):
        return _absent(hub, seen.unlisted if seen and seen.unlisted else _unreached(cause))
    return _broken_off(hub, seen, cause)


def _unreached(error: BaseException | None) -> str:
    """Why the hub was not asked, or did not answer."""
    if error is None or isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set"
    return f"{ENDPOINT} cannot be reached: {_first_line(error)}"


def _refused(hub: HubId, error: HfHubHTTPError) -> Problem:
    """The hub answered, and its answer is no."""
    status, token = error.response.status_code, get_token() is not None
    why = f"{ENDPOINT} answered {status}"
    if isinstance(error, GatedRepoError) or status == 403:
        if not token:
            return _said(
                hub,
                "is gated, and no token is set",
                why=f"{why}: its files are given to those who accepted its terms",
                next=f"accept the terms on {_page(hub)}, then set HF_TOKEN to a token that may read gated repositories",
            )
        return _said(
            hub,
            "is gated, and the token has no access to it",
            why=f"{why} to the token: {error.server_message or 'its owner is not on the list'}",
            next=f"accept the terms on {_page(hub)} with the token's account and wait for the approval; a fine-grained "
            "token also needs the right to read gated repositories. Or set HF_TOKEN to another token",
        )
    if isinstance(error, RevisionNotFoundError):
        return _no_revision(hub, why)
    if isinstance(error, RepositoryNotFoundError):
        return _said(
            hub,
            "is not there, or it is private",
            why=f"{why}; it tells nobody about a private repository who may not read it",
            next=f"check the id on {_page(hub)}; for a private one set HF_TOKEN to a token that may read it",
        )
    if status == 401:
        return _said(
            hub,
            "cannot be read with this token",
            why=f"{why}: {error.server_message or 'the token is not valid'}",
            next="set HF_TOKEN to a valid token, or unset it for a public repository",
        )
    return _said(hub, "cannot be fetched", why=f"{why}: {_first_line(error)}", next="type the same command again later")


def _no_revision(hub: HubId, why: str) -> Problem:
    """The repository is there, the revision is not: name the nearest ones."""
    try:
        refs = HfApi().list_repo_refs(hub.name, repo_type=hub.repo_type)
        names = [one.name for one in (*refs.branches, *refs.tags)]
    except (HfHubHTTPError, TransportError):  # a mirror may not serve them
        names = []
    near = get_close_matches(hub.revision or "", names, n=3) or names[:SHOWN]
    return _said(
        hub,
        "has no such revision",
        why=f"{why}; a revision is a branch, a tag or a commit of 40 digits",
        next=f"write one of: {', '.join(near)}" if near else f"look at the branches and tags on {_page(hub)}/tree/main",
    )


def _absent(hub: HubId, why: str) -> Problem:

    return _said(
        hub,
        "is not in the cache, and the hub is out of reach",
        why=f"{why}; the cache is {HF_HUB_CACHE}",
        next=f"run `quench plan` once with a network to {ENDPOINT} (unset HF_HUB_OFFLINE; HF_ENDPOINT names a "
        "mirror), set HF_HOME to a folder that has it, or name a local folder instead",
    )


def _broken_off(hub: HubId, seen: _Seen | None, error: BaseException | None) -> Problem:
    """The download began and did not end: the connection, or the disk."""
    files = seen.files or [] if seen else []
    kept = [name for name in files if seen and _is_cached(hub, seen.commit, name)]
    return _said(
        hub,
        "was not downloaded to its end",
        why=f"{type(error).__name__}: {_first_line(error)}; {len(kept)} of {len(files)} files are whole and kept",
        next="type the same command again: it fetches only the files that are missing, each from its beginning",
    )


def _first_line(error: BaseException | None) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
