"""Validation errors in plain words: what is written, what it has to be, the nearest name."""

from __future__ import annotations

import json
from collections.abc import Iterator
from difflib import get_close_matches
from functools import cache
from typing import Any, NamedTuple, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from recipes.plain import is_list, is_mapping
from recipes.problem import Problem
from recipes.schema import Recipe

# What a field has to be, by the kind of error; {x} are the bounds that the schema gives. Only names have a pattern.
NEEDS = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "string_type": "text",
    "string_unicode": "text without halves of surrogate pairs",
    "string_too_short": "text of {min_length} characters or more",
    "bool_type": "true or false",
    "list_type": "a list",
    "too_short": "a list of {min_length} or more",
    "dict_type": "names with a value each",
    "invalid_key": "a section whose keys are text",
    "model_type": "a section with keys of its own",
    "model_attributes_type": "a section with keys of its own",
    "greater_than": "greater than {gt:g}",
    "greater_than_equal": "{ge:g} or more",
    "less_than": "less than {lt:g}",
    "less_than_equal": "{le:g} or less",
    "literal_error": "{expected}",
    "union_tag_invalid": "{expected_tags}",
    "string_pattern_mismatch": "40 small letters, digits and dashes at most, a dash not the first",
}
# Keys that were there once, and what to write now.
FORMER_KEYS = {
    "evaluate.scorer": "Write a list: `scorers:` with `- kind: ...` for each; the first one is the metric `task`.",
    "run.workers": "Remove it: it never had an effect. As many steps run at once as there are GPUs or CPU slots.",
}
WHY_CLOSED = "Keys are a closed set: a misspelled one would silently leave a default in force."


class Complaint(NamedTuple):
    """One problem and the dotted field that it is about; the caller knows file and line."""

    field: str
    problem: Problem


def explain(error: ValidationError, values: dict[str, Any]) -> list[Complaint]:
    """Every error as a plain problem, one per field, also where the field may have several types."""
    by_field: dict[str, list[ErrorDetails]] = {}
    for detail in error.errors(include_url=False):
        by_field.setdefault(_field(detail, values), []).append(detail)
    for field, details in list(by_field.items()):  # text or section: the section was meant, and its keys are wrong
        section = all(detail["type"] == "string_type" and is_mapping(detail["input"]) for detail in details)
        if section and any(other.startswith(f"{field}.") for other in by_field):
            del by_field[field]
    return [Complaint(field, _problem(field, details)) for field, details in by_field.items()]


def _field(detail: ErrorDetails, values: dict[str, Any]) -> str:
    """Dotted name of what was written, without the steps that name a type (`list[str]`, a scorer's kind)."""
    parts: list[str] = []
    inner: Any = values
    for position, step in enumerate(detail["loc"]):
        if is_mapping(inner):
            last = position == len(detail["loc"]) - 1
            if step not in inner and not (last and detail["type"] == "missing"):
                continue
            inner = inner.get(str(step))
        elif is_list(inner) and isinstance(step, int):
            inner = inner[step] if step < len(inner) else None
        else:
            continue
        parts.append(str(step))
    if detail["type"] in ("union_tag_not_found", "union_tag_invalid"):
        parts.append("kind")
    if detail["type"] == "value_error":  # the schema's own validators begin with the field that they speak of
        first_word = str(detail["ctx"]["error"] if "ctx" in detail else "").split(" ", 1)[0]
        return first_word if "." in first_word else ".".join(parts) or "recipe"
    return ".".join(parts) or "recipe"


def _problem(field: str, details: list[ErrorDetails]) -> Problem:
    first = details[0]
    if first["type"] == "extra_forbidden":
        return _unknown(field)
    if first["type"] in ("missing", "union_tag_not_found"):
        return Problem(
            what=f"`{field}` is missing.",
            where=field,
            why=_doc(field) or "There is no default for it.",
            next=f"Write `{field}`; docs/recipe.md shows how.",
        )
    if first["type"] == "value_error":
        what, _, why = first["msg"].removeprefix("Value error, ").partition(": ")
        return Problem(what=f"{what}.", where=field, why=f"{_capital(why)}.", next=f"Change `{field}`.")
    needs = " or ".join(dict.fromkeys(_needs(detail) for detail in details))
    value: object = first["input"]
    if first["type"] == "union_tag_invalid" and is_mapping(value):
        value = value.get(field.rpartition(".")[2])
    quote = isinstance(value, int | float) and needs == "text"
    return Problem(
        what=f"`{field}` is {_as_written(value)}; it has to be {needs}.",
        where=field,
        why=_doc(field) or "A value is taken as it is written and never converted.",
        next=f'Put it in quotes: "{value}".' if quote else f"Change `{field}`.",
    )


def _needs(detail: ErrorDetails) -> str:
    text = NEEDS.get(detail["type"])
    if text is None:
        return detail["msg"][0].lower() + detail["msg"][1:]
    return text.format(**detail.get("ctx", {})).replace("', '", "' or '")


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _as_written(value: object) -> str:
    """A value as the reader wrote it, shortened."""
    if is_mapping(value):
        return "a section"
    if isinstance(value, list):
        return "a list"
    text = {None: "empty", True: "true", False: "false"}[value] if value is None or isinstance(value, bool) else None
    return text or (json.dumps(value, ensure_ascii=False)[:60] if isinstance(value, str | int | float) else repr(value))


def _unknown(field: str) -> Problem:
    section, _, key = _unnumbered(field).rpartition(".")
    known = fields()
    siblings = [name.rpartition(".")[2] for name in known if name.rpartition(".")[0] == section]
    near = get_close_matches(key, siblings, n=1, cutoff=0.5)
    elsewhere = [name for name in known if name.rpartition(".")[2] == key]
    if field in FORMER_KEYS:
        remedy = FORMER_KEYS[field]
    elif len(elsewhere) == 1:
        remedy = f"Did you mean `{elsewhere[0]}`?"
    elif near:
        remedy = f"Did you mean `{near[0]}`?"
    else:
        remedy = f"Remove it; here are known: {', '.join(siblings) or 'no keys'}."
    place = f"the section `{section}`" if section else "a recipe"
    return Problem(what=f"`{key}` is no key of {place}.", where=field, why=WHY_CLOSED, next=remedy)


def _doc(field: str) -> str:
    return fields().get(_unnumbered(field), "")


def _unnumbered(field: str) -> str:
    """`data.sources.1.path` -> `data.sources.path`; the name of an external model is left out, too."""
    parts = [part for part in field.split(".") if not part.isdigit()]
    return ".".join(parts[:2] + parts[3:] if parts[:2] == ["evaluate", "external"] else parts)


@cache
def fields() -> dict[str, str]:
    """Every field of a recipe, by dotted name, with its documentation."""
    return dict(_walk(Recipe, prefix=""))


def _walk(section: type[BaseModel], *, prefix: str) -> Iterator[tuple[str, str]]:
    for name, info in section.model_fields.items():
        yield f"{prefix}{name}", info.description or ""
        for inner in sections(info.annotation):
            yield from _walk(inner, prefix=f"{prefix}{name}.")


def sections(annotation: Any) -> list[type[BaseModel]]:
    """The models that an annotation allows: one for a section, several for a choice, none for a plain value."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in get_args(annotation) for model in sections(part)]
