"""The chat template of a model folder, as its files say: is there one, does it print today's date, how was it used?

Standard library only: the template is read as text and not rendered.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from recipes.plain import is_list, is_mapping, json_object

SETTINGS_FILE = "chat_template_args.json"  # ours: the arguments and the day that rows were rendered with


class Misfit(NamedTuple):
    """How the settings of a recipe and a template do not go together.

    Attributes:
        no_day: The template prints today's date, and the recipe names no day.
        unread_day: The recipe names a day, and the template prints none.
        unread_args: Arguments that the template does not read.
    """

    no_day: bool
    unread_day: bool
    unread_args: list[str]


def prints_today(template: str) -> bool:
    """True where a template asks for the date of the day on which it renders."""
    return "strftime_now" in template


def misfit(template: str, *, args: Iterable[str], has_day: bool) -> Misfit:
    """Compare the text of a template with what a recipe says to it.

    Args:
        template: Jinja; all of a tokenizer's templates.
        args: Names of the arguments.
        has_day: The recipe names the day to print. Llama 3.1's template prints `date_string`, and a fixed day without.
    """
    today = prints_today(template)
    return Misfit(
        no_day=today and not has_day,
        unread_day=has_day and not today and "date_string" not in template,
        unread_args=sorted(name for name in args if name not in template),
    )


@dataclass(frozen=True, kw_only=True)
class FolderTemplate:
    """What a folder has of a chat template.

    Attributes:
        texts: Jinja, one or several with names; none where it has no template.
        args: Arguments that rows were rendered with, in a folder that we wrote.
        day: What it printed as today's date, YYYY-MM-DD.
    """

    texts: tuple[str, ...] = ()
    args: Mapping[str, Any] = field(default_factory=dict[str, Any])
    day: str | None = None

    @property
    def prints_today(self) -> bool:
        """It asks for the date of the day on which it renders."""
        return any(map(prints_today, self.texts))


def read_template(folder: Path) -> FolderTemplate:
    """The template that transformers and our jobs find in a folder."""
    said = json_object(folder / SETTINGS_FILE) or {}
    args, day = said.get("template_args"), said.get("template_date")
    return FolderTemplate(
        texts=tuple(text for _, text in _texts(folder)),
        args=args if is_mapping(args) else {},
        day=day if isinstance(day, str) else None,
    )


def place_of(template: str, folder: Path) -> str:
    """The file that a template stands in, for an error; the recipe's field where no file of the folder has it."""
    return next((str(place) for place, text in _texts(folder) if text == template), "model.chat_template")


def _texts(folder: Path) -> Iterator[tuple[Path, str]]:
    for path in (folder / "chat_template.jinja", *sorted(folder.glob("additional_chat_templates/*.jinja"))):
        if path.is_file():
            yield path, path.read_text(encoding="utf-8", errors="replace")
    for path in (folder / "tokenizer_config.json", folder / "chat_template.json"):
        value = (json_object(path) or {}).get("chat_template")
        if isinstance(value, str):
            yield path, value
        elif is_list(value):  # of named ones
            yield from ((path, str(named.get("template"))) for named in value if is_mapping(named))
