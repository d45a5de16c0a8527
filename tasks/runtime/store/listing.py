"""The committed folders of one stage, by the fingerprints and slugs in their names."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

FINGERPRINT = re.compile(r"-([0-9a-f]{12})(?=-|$)")  # in the name of a folder; a slug may look like one


@dataclass(frozen=True, kw_only=True)
class Listing:
    """A stage's committed folders, oldest name first: by any 12 digits in their names, and by what is before."""

    by_fingerprint: dict[str, list[str]]
    by_name: dict[str, list[str]]


def list_stage(folder: Path, part: str = "") -> Listing:
    """List the folders of a stage with `part` in their names."""
    listing = Listing(by_fingerprint={}, by_name={})
    names = sorted(entry.name for entry in os.scandir(folder) if part in entry.name) if folder.is_dir() else ()
    for name in names:
        if name.startswith("."):
            continue
        for match in FINGERPRINT.finditer(name):
            listing.by_fingerprint.setdefault(match[1], []).append(name)
            listing.by_name.setdefault(name[: match.start()], []).append(name)
    return listing
