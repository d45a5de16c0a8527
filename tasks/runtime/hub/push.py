"""Sends a folder to a hub, through huggingface_hub and nothing else. Imported where --push is asked for.

huggingface_hub 2.4 takes Xet where hf_xet is installed (HF_HUB_DISABLE_XET=1 before the import: Git LFS). Small files
travel in the commit, weights before it; what is there already is not sent again.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from httpx2 import TransportError
from huggingface_hub import HfApi, RepoFile, get_token
from huggingface_hub.constants import ENDPOINT
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled, RepositoryNotFoundError
from huggingface_hub.utils import disable_progress_bars

from recipes.problem import Problem, RecipeError
from tasks.runtime.fingerprint import file_digest

OWN = ".gitattributes"  # what a hub puts into a new repository
SHOWN = 8  # files that an error lists


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
    if get_token() is None:
        raise _refused(
            name,
            "No token is set.",
            "a hub takes files only from somebody whom it knows",
            f"set HF_TOKEN to a token with write access (from {ENDPOINT}/settings/tokens)",
        )
    with _explained(name):
        account: dict[str, Any] = HfApi().whoami()  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
    owner = name.split("/")[0]
    role = account.get("auth", {}).get("accessToken", {}).get("role")
    mine = [account["name"], *(one["name"] for one in account.get("orgs", []))]
    if role == "read":
        raise _refused(
            name,
            "The token may only read.",
            f"it is a token of {account['name']} with the role read",
            f"set HF_TOKEN to one with write access (from {ENDPOINT}/settings/tokens)",
        )
    if owner not in mine:
        raise _refused(
            name,
            f"The token belongs to nobody in {owner}.",
            f"it is of {account['name']}, who may write to {', '.join(mine)}",
            f"push to {account['name']}/{name.split('/')[-1]}, or set HF_TOKEN to a token of a member of {owner}",
        )


def push(folder: Path, name: str) -> Pushed:
    """Send every file of a folder in one commit to a model repository, which is made, private, where it is not there.

    Pushing the same again sends nothing; a push that broke off goes on.

    Raises:
        RecipeError: The repository holds files that are not in the folder, or with other content; no write access.
    """
    if not sys.stderr.isatty():
        disable_progress_bars()
    api = HfApi()
    with _explained(name):
        there = _files(api, name)
        if foreign := sorted(one for one, digest in (there or {}).items() if digest != _digest(folder / one, digest)):
            shown = ", ".join(foreign[:SHOWN]) + (f" and {len(foreign) - SHOWN} more" if len(foreign) > SHOWN else "")
            raise _refused(
                name,
                "The repository exists, with other content.",
                f"these files are not in {folder}, or differ: {shown}",
                f"name another repository, or delete this one on {ENDPOINT}/{name}/settings",
            )
        if there is None:
            api.create_repo(name, private=True)
        said = api.upload_folder(repo_id=name, folder_path=folder, commit_message=f"Upload {folder.name} by Quench")
    return Pushed(url=f"{ENDPOINT}/{name}", commit=said.oid, created=there is None)


def _files(api: HfApi, name: str) -> dict[str, str] | None:
    """File -> sha256 (of large files) or Git's id (of others); None where there is no repository."""
    try:
        tree = list(api.list_repo_tree(name, recursive=True))
    except RepositoryNotFoundError:
        return None
    files = [one for one in tree if isinstance(one, RepoFile) and one.path != OWN]
    return {one.path: one.lfs.sha256 if one.lfs else one.blob_id for one in files}


def _digest(path: Path, like: str) -> str:
    """The file's digest of the same kind: sha256 has 64 hex digits, Git's id 40."""
    if not path.is_file():
        return ""
    if len(like) == 64:
        return file_digest(path)
    data = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


def _refused(name: str, what: str, why: str, next: str) -> RecipeError:
    return Problem(what=what, where=f"--push {name}", why=why, next=next).error()


@contextmanager
def _explained(name: str) -> Generator[None]:
    """Turn whatever huggingface_hub raises into a RecipeError."""
    try:
        yield
    except (OSError, TransportError, ValueError, RuntimeError) as error:  # ValueError: a card that it cannot read, too
        cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error
        raise _problem(name, cause) from error


def _problem(name: str, error: BaseException) -> RecipeError:
    first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    if isinstance(error, HFValidationError):
        return _refused(name, "This is no id of a hub.", first, "Write it as ORG/NAME.")
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        why = f"{ENDPOINT} answered {status}: {error.server_message or first}"
        if status in (401, 403):
            remedy = f"set HF_TOKEN to a token that may write to {name} (from {ENDPOINT}/settings/tokens)"
            return _refused(name, "The token may not write there.", why, remedy)
        return _refused(name, "The hub did not take it.", why, "type the same command again later")
    if isinstance(error, ValueError):
        return _refused(name, "The hub does not take the folder.", " ".join(str(error).split()), "mend that file")
    if isinstance(error, OfflineModeIsEnabled):
        return _refused(name, "HF_HUB_OFFLINE is set.", "nothing can be sent then", "unset it")
    why = f"{type(error).__name__}: {first}"
    return _refused(
        name, f"{ENDPOINT} was not reached, or not to the end.", why, "type the same command again: it goes on"
    )
