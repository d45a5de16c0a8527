"""What can be asked of a hub, and which files of it count."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from recipes.problem import Problem
from tasks.runtime.tokenizer_files import TOKENIZER_FILES

Kind = Literal["model", "tokenizer", "adapter", "dataset"]  # tokenizer: a model without its weights
# What a model folder can hold besides weights that shapes any result.
MODEL_FILES = ("*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json")
ADAPTER_NEEDED = ("adapter_config.json", "adapter_model.safetensors")
CODE_FILES = ("*.py",)  # of a model whose own code is run
DATA_FILES = (
    *("*.jsonl", "*.json", "*.csv", "*.parquet", "*.ndjson", "*.tsv", "*.arrow", "*.txt"),
    *(f"*.{kind}.{packed}" for kind in ("jsonl", "json", "csv", "tsv", "txt") for packed in ("gz", "zst", "xz", "bz2")),
)
DATA_CARD = "README.md"  # says which files are which configuration
# What an adapter folder can hold that shapes a merge.
ADAPTER_FILES = (
    *ADAPTER_NEEDED,
    "nf4.json",
    "config.json",
    "generation_config.json",
    "tokenizer/*",
    *TOKENIZER_FILES,
)


class Snapshot(NamedTuple):
    """A model or data set on this machine: its folder, and `org/name@commit` or the path as written."""

    folder: Path
    source: str


@dataclass(frozen=True, kw_only=True)
class HubId:
    """What a recipe asks a hub for.

    Attributes:
        name: `org/name`.
        revision: Branch, tag or commit; None is the default branch.
        kind: What is expected in it.
        field: Recipe field, for errors: `model.base`.
        code: Its Python files are wanted too.
    """

    name: str
    revision: str | None
    kind: Kind
    field: str
    code: bool = False

    @property
    def repo_type(self) -> str:
        """The hub's word: an adapter lies in a model repository."""
        return "dataset" if self.kind == "dataset" else "model"

    def problem(self, what: str, *, why: str, next: str) -> Problem:
        """A problem of this repository; `what` continues `model org/name@revision`."""
        revision = f"@{self.revision}" if self.revision else ""
        kind = "model" if self.kind == "tokenizer" else self.kind
        return Problem(what=f"{kind} {self.name}{revision} {what}", where=self.field, why=why, next=next)
