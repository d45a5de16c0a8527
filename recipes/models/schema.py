"""The section `model:` of a recipe."""

from __future__ import annotations

from datetime import date, datetime
from typing import Annotated, Any

from pydantic import Field, field_validator

from recipes.section import Place, Section

TEMPLATE_NAMES = {"messages", "tools", "documents", "add_generation_prompt", "continue_final_message"}


class Model(Section):
    base: Place
    """Base model: a local folder or a hub id (`org/name`)."""
    revision: str | None = None
    """Hub revision (branch, tag or commit); pinned to a commit when the run starts."""
    chat_template: Place | None = None
    """`chatml` or the path of a Jinja file. Only for a base that has no chat template; saved into every artifact."""
    template_args: dict[str, Any] = {}
    """Arguments of the chat template, for templates that take some: `{enable_thinking: false}`. Rows, prompts of the
    evaluation and the command in serve.md have the same ones; an artifact keeps them in chat_template_args.json."""
    template_date: Annotated[str, Field(pattern=r"^\d{4}-\d{2}-\d{2}$")] | None = None
    """The day (YYYY-MM-DD) that a chat template prints which prints today's. Needed for such a template alone: the rows
    are the same then whenever they are made."""

    @field_validator("template_args")
    @classmethod
    def _names_are_free(cls, value: dict[str, Any]) -> dict[str, Any]:
        if taken := sorted(value.keys() & TEMPLATE_NAMES):
            raise ValueError(f"{', '.join(taken)} cannot be an argument: every row has its own")
        return value

    @field_validator("template_date", mode="before")
    @classmethod
    def _date_of_yaml(cls, value: Any) -> Any:
        """YAML reads a day without quotes as a date."""
        return value.isoformat() if isinstance(value, date) and not isinstance(value, datetime) else value

    @field_validator("template_date")
    @classmethod
    def _is_a_day(cls, value: str | None) -> str | None:
        try:
            if value is not None:
                date.fromisoformat(value)
        except ValueError as error:
            raise ValueError(f"{value} is no day: {error}") from None
        return value
