"""`data`: where rows come from and how they are split. The string under a field is its documentation."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from recipes.data.rows import Format
from recipes.section import Place, Section

Fraction = Annotated[float, Field(gt=0, lt=0.5)]


class DataSource(Section):
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


class Data(Section):
    path: Place | None = None
    """Training domain: a file (JSONL, JSON array, CSV with a header, parquet), a folder of such files (only its train*
    files, where it has any) or a hub data set id. Either this or `sources`."""
    revision: str | None = None
    """Hub revision of the data set; pinned to a commit when the run starts."""
    sources: list[DataSource] | None = None
    """Several sources in place of `path`."""
    general: Place | None = None
    """JSONL file with rows `{"text": ...}` outside the domain: measures forgetting (ppl_general)."""
    format: Literal["auto"] | Format = "auto"
    """`messages` (turns with role and content), `prompt-completion` (texts, or lists of turns), `sharegpt`
    (conversations: from, value), `alpaca` (instruction, input, output, system) or `text` (every token is trained; has
    no prompt, so no task score). `auto` detects it from the first row and says so. CSV holds turns as JSON text."""
    domain: str | None = None
    """Column that names a row's sub-domain; calibration is stratified over it, metrics are shown per value."""
    group: str | None = None
    """Column that keeps rows together on one side of the split. Default: the row's content hash."""
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
    """Rows that are almost equal to another one, by their word 5-grams (system turns left out). `remove` keeps the copy
    in test, then the one in dev; rows of test are never removed."""
    near_duplicate_jaccard: Annotated[float, Field(ge=0.5, lt=1)] = 0.9
    """Jaccard similarity from which rows are almost equal. MinHash proposes pairs, which are then compared exactly:
    at least 8 in 10 of the pairs just at the limit are found, and with a limit of 0.9, 99 in 100 of the pairs at
    0.95."""

    @property
    def parts(self) -> list[DataSource]:
        """The sources; `path` alone is one source."""
        if self.path is not None:
            return [DataSource(path=self.path, revision=self.revision, format=self.format)]
        return self.sources or []

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
        if self.sources is not None and (self.revision is not None or self.format != "auto"):
            raise ValueError("data.sources stands beside data.revision or data.format: each source has its own")
        has_domain = [source.domain is not None for source in self.sources or []]
        if any(has_domain) and not all(has_domain) and self.domain is None:
            raise ValueError(
                f"data.sources.{has_domain.index(False)}.domain is missing: other sources name one, and no column "
                "data.domain says it either"
            )
        return self
