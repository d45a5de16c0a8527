"""`data`: where rows come from and how they are split. The string under a field is its documentation."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from recipes.data.formats import Format, Keep, Target, is_template, parts_of
from recipes.section import Place, Section

Fraction = Annotated[float, Field(gt=0, lt=0.5)]


def _columns(columns: dict[Target, str]) -> dict[Target, str]:
    for name, source in columns.items():
        try:
            parts = parts_of(source) if is_template(source) else []
        except ValueError as error:
            raise ValueError(f"data.columns.{name} is {source!r}: {error}") from None
        if not source or (parts and not any(column for _, column in parts)):
            raise ValueError(f"data.columns.{name} is {source!r}: it names no column")
    return columns


Columns = Annotated[dict[Target, str], AfterValidator(_columns)]


class RowFields(Section):
    """What `data` and each of its sources have: which rows and columns of the files are meant."""

    columns: Columns = {}
    """Names for columns of your own: `{prompt: question, completion: answer}`. A value with braces is a text put
    together from columns, `prompt: "{instruction} {context}"`; an empty column leaves no gap. Names are prompt and
    completion, messages, conversations, text, instruction, input, output, history, system, tools, group, domain."""
    keep: dict[str, Keep | list[Keep]] = {}
    """Rows to keep, by the value of a column: `{label: true}`, or several values in a list. null keeps the rows that do
    not have the column. Others are left out and counted."""
    drop_reasoning: bool = False
    """Leave out the reasoning of turns (reasoning_content, reasoning, thinking), for a chat template with no place for
    it."""
    config: str | None = None
    """Configuration of a folder or hub data set that has several."""
    split: str | None = None
    """Split of a folder or hub data set; default: its train files, where it has any."""


class DataSource(RowFields):
    path: Place
    """A file, a folder or a hub data set id, as in `data.path`."""
    revision: str | None = None
    """Hub revision; pinned to a commit when the run starts."""
    format: Literal["auto"] | Format = "auto"
    """As `data.format`, for this source."""
    weight: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of this source's train rows that is kept; dev and test keep all. A row is kept or not by the hash of its
    content: a kept row stays kept when sources grow or weights rise. How many are kept is in the log. To give one
    source more weight, give the others less: no row is repeated. A row of several sources belongs to the first one."""
    domain: str | None = None
    """Domain of all rows of this source, in place of the column `data.domain`."""


class Data(RowFields):
    path: Place | None = None
    """Training domain: a file (JSONL, JSON, CSV, TSV, parquet, Arrow, or text with a line per row, compressed or not),
    a folder of such files (only its train* files, where it has any) or of save_to_disk, or a hub data set id. Either
    this or `sources`. docs/data.md shows every shape that rows may have."""
    revision: str | None = None
    """Hub revision of the data set; pinned to a commit when the run starts."""
    sources: list[DataSource] | None = None
    """Several sources in place of `path`."""
    general: Place | None = None
    """File of any of these kinds with a column `text`, outside the domain: measures forgetting (ppl_general)."""
    format: Literal["auto"] | Format = "auto"
    """`messages` (turns with role and content), `prompt-completion` (texts, or lists of turns), `sharegpt`
    (conversations: from, value), `alpaca` (instruction, input, output, system) or `text` (every token is trained; has
    no prompt, so no task score). `auto` detects it from the first row and says so. CSV holds turns as JSON text."""
    domain: str | None = None
    """Column that names a row's sub-domain; calibration is stratified over it, metrics are shown per value."""
    group: str | None = None
    """Column that keeps rows together on one side of the split. Default: the first question of a row (system turn,
    first user turn, tools), so that all answers to a question, and all ways to go on from it, are on one side."""
    dev: Fraction = 0.1
    """Share of groups for dev: every choice is made on these alone."""
    test: Fraction = 0.15
    """Share of groups for test: published figures and the gate."""
    salt: str = ""
    """Another salt draws another split. Membership does not change when the data grows."""
    max_length: Annotated[int, Field(ge=16)] = 1024
    """Tokens per row. Longer rows lose whole turns at the start, never a part of a completion; a plain text loses its
    end. What is lost is counted."""
    near_duplicates: Literal["count", "remove", "ignore"] = "count"
    """Rows that are almost equal to another one, by their 5-grams: of words, and of characters where the writing has no
    spaces (Chinese, Japanese, Thai ...); system turns are left out. `remove` keeps the copy in test, then the one in
    dev; rows of test are never removed. With `ignore`, leaks between train and dev or test are not looked for either;
    see `calibrate.max_near_duplicates`."""
    near_duplicate_jaccard: Annotated[float, Field(ge=0.5, lt=1)] = 0.9
    """Jaccard similarity from which rows are almost equal. MinHash proposes pairs, which are then compared exactly:
    at least 8 in 10 of the pairs just at the limit are found, and with a limit of 0.9, 99 in 100 of the pairs at
    0.95."""

    @property
    def parts(self) -> list[DataSource]:
        """The sources; `path` alone is one source."""
        if self.path is not None:
            own = {name: getattr(self, name) for name in RowFields.model_fields}
            return [DataSource(path=self.path, revision=self.revision, format=self.format, **own)]
        return self.sources or []

    @property
    def group_column(self) -> str | None:
        """`group`, or the column of this name that `columns` makes; None: the first question."""
        return self.group or self._mapped("group")

    @property
    def domain_column(self) -> str | None:
        """`domain`, or the column of this name that `columns` makes."""
        return self.domain or self._mapped("domain")

    def _mapped(self, name: Target) -> str | None:
        return name if any(name in source.columns for source in self.parts) else None

    def field(self, source: int) -> str:
        """Dotted name of a source's path."""
        return "data.path" if self.path is not None else f"data.sources.{source}.path"

    @model_validator(mode="after")
    def _path_or_sources(self) -> Data:
        if self.path is None and not self.sources:
            raise ValueError("data.path is missing: rows come from data.path, or from several data.sources")
        if self.path is not None and self.sources is not None:
            raise ValueError(
                "data.sources stands beside data.path: write one of them; `path: null` undoes an extended one"
            )
        fields = DataSource.model_fields
        own = [
            name
            for name in ("revision", "format", *RowFields.model_fields)
            if getattr(self, name) != fields[name].default  # an extended recipe is undone by the default
        ]
        if self.sources is not None and own:
            raise ValueError(f"data.sources stands beside data.{own[0]}: each source has its own")
        has_domain = [source.domain is not None for source in self.sources or []]
        if any(has_domain) and not all(has_domain) and self.domain_column is None:
            raise ValueError(
                f"data.sources.{has_domain.index(False)}.domain is missing: other sources name one, and no column "
                "data.domain says it either"
            )
        for name, column in (("group", self.group), ("domain", self.domain)):
            if column is not None and any(name in source.columns for source in self.parts):
                raise ValueError(f"data.{name} stands beside columns.{name}: write one of them")
        return self
