"""`evaluate.scorers`: how an answer is scored, one section per kind. docs/scorers.md has an example of each."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

from pydantic import Field, model_validator

from recipes.section import Place, Section

# 7, -1,234.50, .5, 2e-3; a dash behind a letter or digit is no sign (3-5); − is the minus of print.
NUMBER = r"((?:(?<!\w)[-+−])?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|(?<!\d)\.\d+)(?:[eE][-+]?\d+)?)"
CALLABLE = re.compile(r"(?P<source>.+):(?P<function>[A-Za-z_]\w*)")


class PythonFunction(NamedTuple):
    """`source:function` in its parts; `source` is a path that ends in .py, or a module's dotted name."""

    source: str
    function: str


class ScorerSpec(Section):
    """What all kinds of scorers have."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,39}$")] | None = None
    """Its scores are the metric `task.NAME` (`task` where it is the first); default: the kind."""

    content: ClassVar[str | None] = None  # field whose file or folder is read: an input of the step, not a parameter

    @property
    def called(self) -> str:
        """Name, or the kind."""
        return self.name or str(self.model_dump(include={"kind"})["kind"])

    @property
    def path(self) -> str | None:
        """The file or folder that it reads, as it is written; None where it reads none."""
        return getattr(self, self.content) if self.content else None

    def params(self) -> dict[str, Any]:
        """What is identity: everything but the paths of files."""
        return {**self.model_dump(exclude={self.content} if self.content else None), "name": self.called}


class ExactMatchSpec(ScorerSpec):
    kind: Literal["exact-match"] = "exact-match"
    """Answer and reference are equal after stripping white space."""


class NumberSpec(ScorerSpec):
    kind: Literal["number"]
    """The last number in the answer is the last number in the reference."""
    pattern: str = NUMBER
    """Regular expression with one group, which is the number; of several matches the last one counts. Commas between
    thousands are dropped."""
    absolute: Annotated[float, Field(ge=0)] = 0.0
    """Largest difference that still counts as equal."""
    relative: Annotated[float, Field(ge=0)] = 0.0
    """The same as a share of the reference."""

    @model_validator(mode="after")
    def _one_group(self) -> NumberSpec:
        try:
            groups = re.compile(self.pattern).groups
        except re.error as error:
            raise ValueError(f"pattern is no regular expression: {error}") from None
        if groups != 1:
            raise ValueError(
                f"pattern has {groups} groups: exactly one is needed, around the number; write (?:...) else"
            )
        return self


class JsonSchemaSpec(ScorerSpec):
    content = "schema_file"

    kind: Literal["json-schema"]
    """The answer is JSON that a JSON schema accepts."""
    schema_file: Place
    """The schema, a JSON file."""
    match: Literal["valid", "equal"] = "valid"
    """`valid`: the schema accepts it. `equal`: it is also the same JSON value as the reference; the order of keys does
    not count."""


class SqlExecutionSpec(ScorerSpec):
    content = "databases"

    kind: Literal["sql-execution"]
    """Answer and reference return the same rows from sqlite3 (order counts only where the reference orders)."""
    databases: Place
    """Folder with one SCHEMA.sql per database: tables and rows."""
    schema_column: str = "schema"
    """Column of the data that names the row's database."""


class PythonCallableSpec(ScorerSpec):
    content = "callable"

    kind: Literal["python"]
    """A function of your own: `def score(answer, reference, columns)` returns a number from 0 to 1, or a bool."""
    callable: Place
    """`path/to/file.py:function`, or `package.module:function` of a file below the recipe's folder or of an installed
    package. Its identity is the digest of that one file; what the file imports is not part of it."""

    @model_validator(mode="after")
    def _two_parts(self) -> PythonCallableSpec:
        if CALLABLE.fullmatch(self.callable) is None:
            raise ValueError(f"callable is `{self.callable}`: it has to be path/to/file.py:function or module:function")
        return self

    @property
    def parts(self) -> PythonFunction:
        """Source and function."""
        parts = CALLABLE.fullmatch(self.callable)
        assert parts is not None  # _two_parts has seen it
        return PythonFunction(parts["source"], parts["function"])

    def params(self) -> dict[str, Any]:
        """The function's name; its file is an input."""
        return super().params() | {"function": self.parts.function}


class LmEvalSpec(ScorerSpec):
    content = "include"

    kind: Literal["lm-eval"]
    """Tasks of lm-evaluation-harness. Each of their documents is scored, beside the rows of test."""
    tasks: Annotated[list[str], Field(min_length=1)]
    """Names of tasks, groups or tags; their documents count alike."""
    include: Place | None = None
    """Folder with YAML tasks of your own; a relative `data_files` in them counts from it."""
    metric: str | None = None
    """Metric of the tasks, `exact_match` or `exact_match,FILTER`, which gives each document 0 to 1, more is better;
    default: the first that each task lists."""
    limit: Annotated[int, Field(ge=1)] | None = None
    """How many documents of each task are scored, the first ones; default: all."""
    chat_template: bool = True
    """Each document is put to the model as a user turn of its chat template."""


Scorer = Annotated[
    ExactMatchSpec | NumberSpec | JsonSchemaSpec | SqlExecutionSpec | PythonCallableSpec | LmEvalSpec,
    Field(discriminator="kind"),
]


def scored_columns(scorers: Iterable[Scorer]) -> list[str]:
    """Columns of the data that scorers read by name; a Python function may read any column."""
    return sorted({scorer.schema_column for scorer in scorers if isinstance(scorer, SqlExecutionSpec)})


def input_name(number: int) -> str:
    """Name of what a scorer reads, as an input of a step, by its place in the list."""
    return f"scorer-{number}"
