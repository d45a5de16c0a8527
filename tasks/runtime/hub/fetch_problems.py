"""Why a repository cannot be fetched from a hub: what huggingface_hub raises, as problems with what to do."""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches

from httpx2 import TransportError
from huggingface_hub import HfApi, get_token, try_to_load_from_cache
from huggingface_hub.constants import ENDPOINT, HF_HUB_CACHE
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    RevisionResolutionError,
)

from recipes.problem import Problem
from tasks.runtime.hub.ids import HubId
from tasks.runtime.hub.repository import SHOWN, first_line


@dataclass(frozen=True, kw_only=True)
class Pinned:
    """A repository at the commit that is used; where the hub did not list its `files`, why not."""

    commit: str
    files: list[str] | None
    why_unlisted: str = ""


def is_cached(hub: HubId, commit: str, name: str) -> bool:
    """Whether a file of a repository is on this machine."""
    return isinstance(try_to_load_from_cache(hub.name, name, revision=commit, repo_type=hub.repo_type), str)


def page(hub: HubId) -> str:
    """Address of the repository's page, where terms are accepted."""
    return f"{ENDPOINT}/{'datasets/' if hub.kind == 'dataset' else ''}{hub.name}"


def fetch_problem(hub: HubId, pinned: Pinned | None, error: Exception) -> Problem:
    """Why a repository cannot be pinned (`pinned` is None), or not be downloaded."""
    nothing_cached = isinstance(error, LocalEntryNotFoundError | RevisionResolutionError)
    cause = error.__cause__ if nothing_cached else error
    if isinstance(cause, HfHubHTTPError):
        return _refused(hub, cause)
    if isinstance(cause, HFValidationError):
        return hub.problem("is no id of a hub", why=first_line(cause), next="write it as org/name, or name a folder")
    if nothing_cached or (isinstance(cause, TransportError) and pinned is None):
        return _absent(hub, pinned.why_unlisted if pinned and pinned.why_unlisted else why_unreached(cause))
    return _broken_off(hub, pinned, cause)


def why_unreached(error: BaseException | None) -> str:
    """Why the hub was not asked, or did not answer."""
    if error is None or isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set"
    return f"{ENDPOINT} cannot be reached: {first_line(error)}"


def _refused(hub: HubId, error: HfHubHTTPError) -> Problem:
    """The hub answered, and its answer is no."""
    status, token = error.response.status_code, get_token() is not None
    why = f"{ENDPOINT} answered {status}"
    if isinstance(error, GatedRepoError) or status == 403:
        if not token:
            return hub.problem(
                "is gated, and no token is set",
                why=f"{why}: its files are given to those who accepted its terms",
                next=f"accept the terms on {page(hub)}, then set HF_TOKEN to a token that may read gated repositories",
            )
        return hub.problem(
            "is gated, and the token has no access to it",
            why=f"{why} to the token: {error.server_message or 'its owner is not on the list'}",
            next=f"accept the terms on {page(hub)} with the token's account and wait for the approval; a fine-grained "
            "token also needs the right to read gated repositories. Or set HF_TOKEN to another token",
        )
    if isinstance(error, RevisionNotFoundError):
        return _no_revision(hub, why)
    if isinstance(error, RepositoryNotFoundError):
        return hub.problem(
            "is not there, or it is private",
            why=f"{why}; it tells nobody about a private repository who may not read it",
            next=f"check the id on {page(hub)}; for a private one set HF_TOKEN to a token that may read it",
        )
    if status == 401:
        return hub.problem(
            "cannot be read with this token",
            why=f"{why}: {error.server_message or 'the token is not valid'}",
            next="set HF_TOKEN to a valid token, or unset it for a public repository",
        )
    return hub.problem("cannot be fetched", why=f"{why}: {first_line(error)}", next="type the same command again later")


def _no_revision(hub: HubId, why: str) -> Problem:
    """The repository is there, the revision is not: name the nearest ones."""
    try:
        refs = HfApi().list_repo_refs(hub.name, repo_type=hub.repo_type)
        names = [ref.name for ref in (*refs.branches, *refs.tags)]
    except (HfHubHTTPError, TransportError):  # a mirror may not serve them
        names = []
    near = get_close_matches(hub.revision or "", names, n=3) or names[:SHOWN]
    return hub.problem(
        "has no such revision",
        why=f"{why}; a revision is a branch, a tag or a commit of 40 digits",
        next=f"write one of: {', '.join(near)}" if near else f"look at the branches and tags on {page(hub)}/tree/main",
    )


def _absent(hub: HubId, why: str) -> Problem:
    return hub.problem(
        "is not in the cache, and the hub is out of reach",
        why=f"{why}; the cache is {HF_HUB_CACHE}",
        next=f"run `quench plan` once with a network to {ENDPOINT} (unset HF_HUB_OFFLINE; HF_ENDPOINT names a "
        "mirror), set HF_HOME to a folder that has it, or name a local folder instead",
    )


def _broken_off(hub: HubId, pinned: Pinned | None, error: BaseException | None) -> Problem:
    """The download began and did not end: the connection, or the disk."""
    files = pinned.files or [] if pinned else []
    kept = [name for name in files if pinned and is_cached(hub, pinned.commit, name)]
    return hub.problem(
        "was not downloaded to its end",
        why=f"{type(error).__name__}: {first_line(error)}; {len(kept)} of {len(files)} files are whole and kept",
        next="type the same command again: it fetches only the files that are missing, each from its beginning",
    )
