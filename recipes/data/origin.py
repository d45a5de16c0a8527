"""Where rows come from: one source of a recipe, as files on this machine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recipes.data.formats import Keep, columns_of
from recipes.plain import is_list


@dataclass(frozen=True, kw_only=True)
class Origin:
    """One source of rows, as files on this machine.

    Attributes:
        path: File or folder.
        format: `auto`, or a format.
        required: Columns that every row must have beside its turns.
        identity: Columns that tell two rows apart beside turns and tools: those that a domain or a scorer reads.
        weight: Share of its train rows that is kept.
        domain: Domain of all its rows; None where a column says it.
        inside: Prefix of file names in messages, to tell sources apart.
        columns: `data.columns` as (name, column or template).
        keep: `data.keep` as (column, values).
        drop_reasoning: Leave reasoning out of turns.
        config: Configuration of a folder that has several.
        split: Split of a folder that has several.
    """

    path: Path
    format: str = "auto"
    required: tuple[str, ...] = ()
    identity: tuple[str, ...] = ()
    weight: float = 1.0
    domain: str | None = None
    inside: str = ""
    columns: tuple[tuple[str, str], ...] = ()
    keep: tuple[tuple[str, tuple[Keep, ...]], ...] = ()
    drop_reasoning: bool = False
    config: str | None = None
    split: str | None = None

    @property
    def named(self) -> list[str]:
        """Columns of the file that the recipe names."""
        return [*self.required, *self.identity, *(column for column, _ in self.keep), *columns_of(self.columns)]


def origins(
    paths: Sequence[Path],
    sources: Sequence[Mapping[str, Any]],
    *,
    domain: str | None,
    group: str | None,
    scored: Sequence[str] = (),
) -> list[Origin]:
    """Sources of a recipe with the paths that they have here.

    Args:
        paths: One per source.
        sources: The fields of recipes.data.schema.DataSource, but for path and revision.
        domain: Column of the domain; a source with a domain of its own need not have it.
        group: Column of the group.
        scored: Columns that scorers read.
    """
    made: list[Origin] = []
    for path, source in zip(paths, sources, strict=True):
        domains = [domain] if domain and source["domain"] is None else []
        columns: Mapping[str, str] = source.get("columns") or {}
        keep: Mapping[str, Any] = source.get("keep") or {}
        made.append(
            Origin(
                path=path,
                format=source["format"],
                required=tuple(dict.fromkeys([*domains, *([group] if group else []), *scored])),
                identity=tuple(sorted({*domains, *scored})),
                weight=source["weight"],
                domain=source["domain"],
                inside=f"{path.name if path.is_dir() else path.parent.name}/" if len(paths) > 1 else "",
                columns=tuple(columns.items()),
                keep=tuple((column, tuple(value) if is_list(value) else (value,)) for column, value in keep.items()),
                drop_reasoning=bool(source.get("drop_reasoning")),
                config=source.get("config"),
                split=source.get("split"),
            )
        )
    return made


def source_name(number: int) -> str:
    """Name of a source as an input of prepare: data, data-1, data-2 ..."""
    return f"data-{number}" if number else "data"
