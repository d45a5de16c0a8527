"""Tools and their calls as people write them -> one form, the one that Hugging Face's chat templates and vLLM take.

    tools       [{"type": "function", "function": {"name", "description", "parameters": JSON schema}}]
    tool_calls  [{"type": "function", "id": text, "function": {"name", "arguments": object}}]

Arrow gives all objects of a column the same keys, with null for those that they did not have, and JSONL that was
written from Arrow keeps these nulls. They are padding and go. A null stays where a schema means it: as a `default`, a
`const` or an `enum` of a value that may be null, and as the argument of a parameter that may be null.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from recipes.data.files import Unread
from recipes.data.raw.strict import parse
from recipes.plain import is_list, is_mapping

Tool = dict[str, Any]
VALUES = ("enum", "examples", "default", "const")  # keys of a JSON schema that hold values, not schemas


def tools_of(value: Any) -> list[Tool] | None:
    """The tools of a row: a list, or its JSON text; None where there are none.

    Raises:
        Unread: It is something else, or a tool is no function with a name.
    """
    value = _from_json(value, "`tools`") if isinstance(value, str) and value.strip() else value
    if not value:
        return None
    if not is_list(value):
        raise Unread("has `tools` that are not a list of JSON schemas")
    return [_tool(tool, number) for number, tool in enumerate(value, start=1)]


def calls_of(value: Any, tools: Sequence[Mapping[str, Any]] | None, *, what: str) -> list[dict[str, Any]]:
    """The calls of a turn: a list, one call alone, or the JSON text of either.

    Args:
        value: As it is in the row.
        tools: The row's tools in our form.
        what: `turn 3`, for errors.

    Raises:
        Unread: A call has no name, or arguments that are no object.
    """
    value = _from_json(value, f"{what}: its tool call") if isinstance(value, str) else value
    calls = value if is_list(value) else [value]
    return [_call(call, tools, what=what) for call in calls]


def without_padding(value: Any) -> Any:
    """A value of a row without the keys that are null, at every depth."""
    if is_mapping(value):
        return {name: without_padding(inner) for name, inner in value.items() if inner is not None}
    return [without_padding(inner) for inner in value] if is_list(value) else value


def _tool(raw: Any, number: int) -> Tool:
    tool = _from_json(raw, f"tool {number}") if isinstance(raw, str) else raw
    if not is_mapping(tool):
        raise Unread(f"tool {number} is no JSON schema")
    kind = tool.get("type")
    inner: Any = tool.get("function")
    function = inner if is_mapping(inner) else tool
    if not isinstance(function.get("name"), str):
        raise Unread(f"tool {number} is no function with a name" + (f", but of the type {kind!r}" if kind else ""))
    schema = {name: inner for name, inner in function.items() if inner is not None and name != "type"}
    if function is tool and "input_schema" in schema:  # Anthropic's name
        schema["parameters"] = schema.pop("input_schema")
    if is_mapping(schema.get("parameters")):
        schema["parameters"] = _schema(schema["parameters"])
    return {"type": "function", "function": schema}


def _schema(schema: Any) -> Any:
    """A JSON schema without padding."""
    if is_list(schema):
        return [_schema(inner) for inner in schema]
    if not is_mapping(schema):
        return schema
    padded = any(value is None for name, value in schema.items() if name not in ("default", "const"))
    kept: dict[str, Any] = {}
    for name, value in schema.items():
        if value is None and not (name in ("default", "const") and (takes_null(schema) or not padded)):
            continue
        kept[name] = value if name in VALUES and is_list(value) else _schema(value)
    return kept


def takes_null(schema: Mapping[str, Any]) -> bool:
    """Whether a JSON schema accepts null."""
    kinds = schema.get("type")
    if "null" in (kinds if is_list(kinds) else [kinds]) or schema.get("nullable"):
        return True
    if None in _listed(schema.get("enum")):
        return True
    choices = [*_listed(schema.get("anyOf")), *_listed(schema.get("oneOf"))]
    return any(is_mapping(choice) and takes_null(choice) for choice in choices)


def _listed(value: Any) -> list[Any]:
    """A list; what is none counts as empty."""
    return value if is_list(value) else []


def _call(raw: Any, tools: Sequence[Mapping[str, Any]] | None, *, what: str) -> dict[str, Any]:
    call = _from_json(raw, f"{what}: its tool call") if isinstance(raw, str) else raw
    function = (call.get("function") or call) if is_mapping(call) else None
    if not is_mapping(function) or not isinstance(function.get("name"), str):
        raise Unread(f"{what}: a tool call is no object with a name and arguments")
    name: str = function["name"]
    arguments: Any = function.get("arguments", function.get("parameters"))
    if isinstance(arguments, str):
        arguments = _from_json(arguments, f"{what}: the arguments of {name}") if arguments.strip() else {}
    else:
        arguments = _arguments(arguments, _parameters(name, tools))
    if not is_mapping(arguments):
        raise Unread(f"{what}: the arguments of {name} are no object")
    read: dict[str, Any] = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return read | ({"id": call["id"]} if isinstance(call.get("id"), str) else {})


def _parameters(name: str, tools: Sequence[Mapping[str, Any]] | None) -> Mapping[str, Any]:
    """Parameter -> schema of a tool; empty where the row does not have it."""
    for tool in tools or ():
        if tool["function"]["name"] == name:
            parameters = tool["function"].get("parameters")
            properties = parameters.get("properties") if is_mapping(parameters) else None
            return properties if is_mapping(properties) else {}
    return {}


def _arguments(arguments: Any, schemas: Mapping[str, Any]) -> Any:
    """Arguments without padding. A null of a parameter that may be null is an argument."""
    if not is_mapping(arguments):
        return {} if arguments is None else arguments
    kept: dict[str, Any] = {}
    for name, value in arguments.items():
        schema = schemas.get(name)
        if value is not None:
            kept[name] = without_padding(value)
        elif is_mapping(schema) and takes_null(schema):
            kept[name] = None
    return kept


def _from_json(text: str, what: str) -> Any:
    try:
        return parse(text)
    except Unread as error:
        raise Unread(f"{what}: {error}") from None
