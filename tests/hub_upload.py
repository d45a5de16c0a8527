"""The writing half of the hub on loopback: accounts, new repositories, Git LFS uploads to the storage, commits.

What huggingface_hub 2.4 sends without Xet: whoami-v2, repos/create, validate-yaml, preupload (which file goes by LFS),
the LFS batch, PUT to the storage, and the commit as lines of JSON.
"""

from __future__ import annotations

import base64
import hashlib
import json
from dataclasses import dataclass, field
from typing import Any

import yaml


@dataclass(kw_only=True)
class Account:
    """Whose token it is, and what it may."""

    name: str
    orgs: tuple[str, ...] = ()
    role: str = "write"
    may_write: tuple[str, ...] = ()  # owners; default: the account and its organisations

    @property
    def owners(self) -> tuple[str, ...]:
        """Under whose name repositories can be made and changed."""
        return self.may_write or (self.name, *self.orgs)

    def as_whoami(self) -> dict[str, Any]:
        """The answer of whoami-v2."""
        token = {"displayName": "test", "role": self.role}
        orgs = [{"name": one, "type": "org"} for one in self.orgs]
        return {"type": "user", "name": self.name, "orgs": orgs, "auth": {"type": "access_token", "accessToken": token}}


@dataclass(kw_only=True)
class Uploads:
    """Accounts by token, and large files that the storage has got, by sha256."""

    accounts: dict[str, Account] = field(default_factory=dict)
    stored: dict[str, bytes] = field(default_factory=dict)
    failing: bool = False  # the storage answers 403 to a PUT


def front_matter_errors(card: str) -> list[str]:
    """What is wrong with a card's metadata: the hub refuses YAML that it cannot read."""
    if not card.startswith("---\n"):
        return []
    try:
        found = yaml.safe_load(card.split("---\n")[1])
    except yaml.YAMLError as error:
        return [str(error)]
    return [] if isinstance(found, dict) else ["metadata is no mapping"]


def modes(asked: list[dict[str, Any]], large: tuple[str, ...], there: dict[str, bytes]) -> list[dict[str, Any]]:
    """The answer of preupload: large files by LFS, the others in the commit; and what is there already, by its id."""
    return [
        {
            "path": one["path"],
            "uploadMode": "lfs" if one["path"].endswith(large) else "regular",
            "shouldIgnore": False,
            "oid": _oid(one["path"], large, there),
        }
        for one in asked
    ]


def _oid(path: str, large: tuple[str, ...], there: dict[str, bytes]) -> str | None:
    data = there.get(path)
    if data is None:
        return None
    if path.endswith(large):
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def batch(objects: list[dict[str, Any]], uploads: Uploads, storage: str) -> list[dict[str, Any]]:
    """The answer of the LFS batch: where to PUT what is not stored yet."""
    return [
        {"oid": one["oid"], "size": one["size"]}
        | ({} if one["oid"] in uploads.stored else {"actions": {"upload": {"href": f"{storage}/put/{one['oid']}"}}})
        for one in objects
    ]


def committed(lines: bytes, files: dict[str, bytes], uploads: Uploads) -> dict[str, bytes]:
    """The files after a commit; an LFS file has to be in the storage, whole.

    Raises:
        KeyError: It is not.
    """
    after = dict(files)
    for line in lines.splitlines():
        entry = json.loads(line)
        value = entry["value"]
        if entry["key"] == "file":
            after[value["path"]] = base64.b64decode(value["content"])
        elif entry["key"] == "lfsFile":
            after[value["path"]] = uploads.stored[value["oid"]]
    return after


def put(data: bytes, oid: str, uploads: Uploads) -> bool:
    """Store what arrived, if it has the digest under which it was announced."""
    if hashlib.sha256(data).hexdigest() != oid:
        return False
    uploads.stored[oid] = data
    return True
