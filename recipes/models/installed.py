"""Which model types the installed transformers has: read from its files, since importing it takes seconds."""

from __future__ import annotations

import importlib.util
import re
from functools import lru_cache
from pathlib import Path

_PAIR = re.compile(r'^\s*\(?"([^"]+)"[,:]\s*"(\w+)"', re.MULTILINE)
_TYPE = re.compile(r"\w[\w.-]{0,79}")  # it becomes a folder's name: config.json of a stranger is no path
_MAPPINGS = ("auto_mappings.py", "configuration_auto.py")


def is_known(kind: str) -> bool:
    """Transformers has a configuration class for this `model_type`."""
    if not _TYPE.fullmatch(kind):
        return False
    return kind in _folders() or any((root / kind.replace("-", "_")).is_dir() for root in _roots())


def configuration(kind: str) -> str:
    """Source of the module with the configuration class of this `model_type`; empty where there is none."""
    if not _TYPE.fullmatch(kind):
        return ""
    name = _folders().get(kind, kind.replace("-", "_"))
    files = (root / name / f"configuration_{name}.py" for root in _roots())
    return next((file.read_text(encoding="utf-8") for file in files if file.is_file()), "")


def is_installed() -> bool:
    """Transformers is in this environment."""
    return bool(_roots())


@lru_cache(maxsize=1)
def _roots() -> tuple[Path, ...]:
    spec = importlib.util.find_spec("transformers")
    return tuple(Path(root) / "models" for root in (spec.submodule_search_locations or [])) if spec else ()


@lru_cache(maxsize=1)
def _folders() -> dict[str, str]:
    """Model type -> folder under transformers/models: `gemma3_text` lies in gemma3, and most are called alike."""
    files = (root / "auto" / name for root in _roots() for name in _MAPPINGS)
    pairs = [pair for file in files if file.is_file() for pair in _PAIR.findall(file.read_text(encoding="utf-8"))]
    types = {kind: kind.replace("-", "_") for kind, value in pairs if value.endswith("Config")}
    return types | {kind: value for kind, value in pairs if kind in types and value.islower()}  # no class, a folder
