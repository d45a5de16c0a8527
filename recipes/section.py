"""What every section of a recipe is, and a path in one."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict

PATH_BYTES, PART_BYTES = 4095, 255  # what Linux takes of a path and of a name in it


class Section(BaseModel):
    """Closed and frozen: unknown keys are refused, nothing is changed after loading; no number is `.inf` or `.nan`."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, protected_namespaces=(), allow_inf_nan=False
    )


def can_be_asked_for(path: str) -> bool:
    """True where the system can at least look for a file of this name."""
    raw = path.encode(errors="surrogatepass")
    printed = bool(path.strip()) and path.isprintable()
    return printed and len(raw) <= PATH_BYTES and max(map(len, raw.split(b"/"))) <= PART_BYTES


def _checked(path: str) -> str:
    if not can_be_asked_for(path):
        raise ValueError(
            "that is no path: it is empty, has characters that cannot be printed, or is longer than a name (255 bytes) "
            "or a path (4,095) can be"
        )
    return path


Place = Annotated[str, AfterValidator(_checked)]
"""A file, a folder or a hub id: nothing that the system cannot even look for."""
