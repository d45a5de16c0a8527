"""Sends a folder to a hub, through huggingface_hub and nothing else. Imported where --push is asked for.

huggingface_hub 2.4 takes Xet where hf_xet is installed (HF_HUB_DISABLE_XET=1 before the import: Git LFS). Small files
travel in the commit, weights before it; what is there already is not sent again.
"""

from __future__ import annotations

import hashlib
import sys
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from httpx2 import TransportError
from huggingface_hub import HfApi, get_token
from huggingface_hub.constants import ENDPOINT
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled, RepositoryNotFoundError
from huggingface_hub.utils import disable_progress_bars

from recipes.problem import Problem
from tasks.runtime.fingerprint import file_digest
from tasks.runtime.hub.repository import explained, first_line, list_files, shortened

OWN = ".gitattributes"  # what a hub puts into a new repository
# What huggingface_hub raises; a ValueError, too, for a model card that it cannot read.
ERRORS = (OSError, TransportError, ValueError, RuntimeError)


class Pushed(NamedTuple):
    """Where a folder went.

    Attributes:
        url: Page of the repository.
        commit: Its commit, 40 hex digits.
        created: The repository is new, and private.
    """

    url: str
    commit: str
    created: bool


def check(name: str) -> None:
    """Refuse what can be known before anything is copied: offline, no token, a token that may not write there.

    Raises:
        RecipeError: With what to do.
    """
    settings = f"{ENDPOINT}/settings/tokens"
    if get_token() is None:
        raise _problem(
            name,
            "No token is set.",
            why="a hub takes files only from somebody whom it knows",
            next=f"set HF_TOKEN to a token with write access (from {settings})",
        ).error()
    with explained(partial(_push_problem, name), *ERRORS):
        account: dict[str, Any] = HfApi().whoami()  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
    owner, repository = name.split("/")[0], name.split("/")[-1]
    role = account.get("auth", {}).get("accessToken", {}).get("role")
    owners = [account["name"], *(org["name"] for org in account.get("orgs", []))]
    if role == "read":
        raise _problem(
            name,
            "The token may only read.",
            why=f"it is a token of {account['name']} with the role read",
            next=f"set HF_TOKEN to one with write access (from {settings})",
        ).error()
    if owner not in owners:
        raise _problem(
            name,
            f"The token belongs to nobody in {owner}.",
            why=f"it is of {account['name']}, who may write to {', '.join(owners)}",
            next=f"push to {account['name']}/{repository}, or set HF_TOKEN to a token of a member of {owner}",
        ).error()


def push(folder: Path, name: str) -> Pushed:
    """Send every file of a folder in one commit to a model repository, which is made, private, where it is not there.

    Pushing the same again sends nothing; a push that broke off goes on.

    Raises:
        RecipeError: The repository holds files that are not in the folder, or with other content; no write access.
    """
    if not sys.stderr.isatty():
        disable_progress_bars()
    api = HfApi()
    with explained(partial(_push_problem, name), *ERRORS):
        digests = _digests(name)
        foreign = sorted(file for file, digest in (digests or {}).items() if digest != _digest(folder / file, digest))
        if foreign:
            raise _problem(
                name,
                "The repository exists, with other content.",
                why=f"these files are not in {folder}, or differ: {shortened(foreign)}",
                next=f"name another repository, or delete this one on {ENDPOINT}/{name}/settings",
            ).error()
        if digests is None:
            api.create_repo(name, private=True)
        commit = api.upload_folder(repo_id=name, folder_path=folder, commit_message=f"Upload {folder.name} by Quench")
    return Pushed(url=f"{ENDPOINT}/{name}", commit=commit.oid, created=digests is None)


def _digests(name: str) -> dict[str, str] | None:
    """File -> sha256 (of large files) or Git's id (of others); None where there is no repository."""
    try:
        files = list_files(name)
    except RepositoryNotFoundError:
        return None
    return {file.path: file.lfs.sha256 if file.lfs else file.blob_id for file in files if file.path != OWN}


def _digest(path: Path, like: str) -> str:
    """The file's digest of the same kind: sha256 has 64 hex digits, Git's id 40."""
    if not path.is_file():
        return ""
    if len(like) == 64:
        return file_digest(path)
    data = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


def _problem(name: str, what: str, *, why: str, next: str) -> Problem:
    return Problem(what=what, where=f"--push {name}", why=why, next=next)


def _push_problem(name: str, error: BaseException) -> Problem:
    """What huggingface_hub raised, with what to do."""
    if isinstance(error, RuntimeError) and error.__cause__:
        error = error.__cause__
    again = "type the same command again"
    if isinstance(error, HFValidationError):
        return _problem(name, "This is no id of a hub.", why=first_line(error), next="Write it as ORG/NAME.")
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        why = f"{ENDPOINT} answered {status}: {error.server_message or first_line(error)}"
        if status in (401, 403):
            remedy = f"set HF_TOKEN to a token that may write to {name} (from {ENDPOINT}/settings/tokens)"
            return _problem(name, "The token may not write there.", why=why, next=remedy)
        return _problem(name, "The hub did not take it.", why=why, next=f"{again} later")
    if isinstance(error, ValueError):
        why = " ".join(str(error).split())
        return _problem(name, "The hub does not take the folder.", why=why, next="mend that file")
    if isinstance(error, OfflineModeIsEnabled):
        return _problem(name, "HF_HUB_OFFLINE is set.", why="nothing can be sent then", next="unset it")
    why = f"{type(error).__name__}: {first_line(error)}"
    return _problem(name, f"{ENDPOINT} was not reached, or not to the end.", why=why, next=f"{again}: it goes on")
