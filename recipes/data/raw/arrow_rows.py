"""Rows of Arrow tables: parquet, and the Arrow files that `datasets.save_to_disk` writes. Only they import pyarrow."""

from __future__ import annotations

import contextlib
import importlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from recipes.data.raw.row import RawRow, Unread, columns
from recipes.data.raw.strict import NUL, check_text, parse
from recipes.plain import is_list, is_mapping

BROKEN = (ValueError, OSError, NotImplementedError)  # what pyarrow raises for a file that it cannot read
NO_VALUE = (ValueError, KeyError, OverflowError)  # bytes that are no UTF-8, a map with a key twice, the year 292277
BATCH = 1000  # rows that are held as Python values at once
READ_AHEAD = 1 << 20  # bytes of a column of a parquet file that are held; its row groups can be gigabytes
JSON = "json"  # a column of JSON text that says so (`datasets.Json`)
Within = str | dict[str, Any] | list[Any] | None


def parquet_rows(path: Path) -> int | None:
    """Rows of a parquet file, from its footer, or of an Arrow file; None for another file or one that is broken."""
    suffix = path.suffix.lower()
    if suffix not in (".parquet", ".arrow"):
        return None
    parquet: Any = importlib.import_module("pyarrow.parquet")
    try:
        if suffix == ".arrow":
            return sum(batch.num_rows for batch in _arrow(path))
        return int(parquet.read_metadata(path).num_rows)
    except BROKEN:
        return None


def arrow_rows(file: Path, shown: str) -> Iterator[RawRow]:
    """Rows in the order of the file; `shown` is its name in the place of a row."""
    number = 0
    try:
        for batch in (_parquet if file.suffix.lower() == ".parquet" else _arrow)(file):
            within = [_json_within(field.type) for field in batch.schema]
            for values in _values(batch):
                number += 1
                yield _row(f"{shown}#{number}", values, within)
    except BROKEN as error:
        place = f"{shown}#{number + 1}" if number else shown
        kind = file.suffix.lower().removeprefix(".")
        yield RawRow(place, None, f"is not {kind} ({_first_line(error)})")


def _parquet(file: Path) -> Iterator[Any]:
    parquet: Any = importlib.import_module("pyarrow.parquet")
    with parquet.ParquetFile(file, buffer_size=READ_AHEAD, pre_buffer=False) as opened:
        yield from opened.iter_batches(batch_size=BATCH, use_threads=False)


def _arrow(file: Path) -> Iterator[Any]:
    pyarrow: Any = importlib.import_module("pyarrow")
    with pyarrow.memory_map(str(file)) as mapped:
        if mapped.read(6) == b"ARROW1":  # the file format; save_to_disk writes the streaming one
            opened = pyarrow.ipc.open_file(mapped)
            batches = (opened.get_batch(number) for number in range(opened.num_record_batches))
        else:
            mapped.seek(0)
            batches = iter(pyarrow.ipc.open_stream(mapped))
        for batch in batches:
            for column in batch.columns:
                _check_places(pyarrow, column)
            yield from (batch.slice(start, BATCH) for start in range(0, batch.num_rows, BATCH))


def _check_places(pyarrow: Any, column: Any) -> None:
    """Look at every offset of a column: Arrow believes the file, and one that points outside ends the process.

    Text is looked at as bytes, so that one that is not UTF-8 stays a matter of its row.

    Raises:
        ValueError: An offset points outside.
    """
    with contextlib.suppress(ValueError, NotImplementedError):  # a type that has no such view
        column = column.view(_as_bytes(pyarrow, column.type))
    column.validate(full=True)


def _as_bytes(pyarrow: Any, type: Any) -> Any:
    """The type with bytes in place of text, where they have the same layout."""
    is_type = pyarrow.types
    for is_text, other in ((is_type.is_string, pyarrow.binary()), (is_type.is_large_string, pyarrow.large_binary())):
        if is_text(type):
            return other
    for is_listed, make in ((is_type.is_list, pyarrow.list_), (is_type.is_large_list, pyarrow.large_list)):
        if is_listed(type):
            return make(type.value_field.with_type(_as_bytes(pyarrow, type.value_type)))
    if is_type.is_struct(type):
        members = [type.field(number) for number in range(type.num_fields)]
        return pyarrow.struct([member.with_type(_as_bytes(pyarrow, member.type)) for member in members])
    return type


def _values(batch: Any) -> Iterator[dict[str, Any] | str]:
    """Rows of a batch as Python values; of a row that has none, why."""
    options = {"maps_as_pydicts": "strict"} if "map<" in str(batch.schema) else {}  # five times slower
    try:
        yield from batch.to_pylist(**options)
    except NO_VALUE:  # of one row: look for it
        for number in range(batch.num_rows):
            try:
                yield batch.slice(number, 1).to_pylist(**options)[0]
            except NO_VALUE as error:
                yield f"cannot be read ({_first_line(error)})"


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def _row(where: str, values: dict[str, Any] | str, within: list[Within]) -> RawRow:
    if isinstance(values, str):
        return RawRow(where, None, values)
    plain: dict[str, Any] = {}
    for (name, value), inner in zip(values.items(), within, strict=True):
        if isinstance(value, float) and math.isnan(value):  # what pandas writes for no value
            continue
        try:
            plain[name] = _plain(value, inner)
        except Unread as error:
            return RawRow(where, None, f"{error} (in `{name}`)")
    return RawRow(where, columns(plain))


def _json_within(type: Any) -> Within:
    """Where a type holds JSON text that says so: "json", the members or items that hold it, or None for nowhere."""
    if getattr(type, "extension_name", "") == "arrow.json":
        return JSON
    if hasattr(type, "value_type"):  # a list of any kind
        inner = _json_within(type.value_type)
        return [inner] if inner else None
    if hasattr(type, "item_type"):  # a map
        return None
    members = [type.field(number) for number in range(type.num_fields)]
    return {member.name: inner for member in members if (inner := _json_within(member.type))} or None


def _plain(value: Any, within: Within = None) -> Any:
    """A value as JSON has it: dates and the like as text, a null as it is.

    Raises:
        Unread: It is one that no row may hold.
    """
    if isinstance(value, str):
        if within == JSON:
            return parse(value)
        if "\0" in value:  # half of a surrogate pair is no UTF-8, so Arrow has none
            raise Unread(NUL)
        return value
    if is_mapping(value):
        members = within if is_mapping(within) else {}
        return {_plain(str(name)): _plain(inner, members.get(name)) for name, inner in value.items()}
    if is_list(value):
        item = within[0] if is_list(within) else None
        return [_plain(inner, item) for inner in value]
    return value if value is None or isinstance(value, int) else _converted(value)


def _converted(value: Any) -> float | str:
    if isinstance(value, float):
        if not math.isfinite(value):
            raise Unread(f"holds {value}, which is no JSON")
        return value
    if not isinstance(value, bytes):
        return str(value)
    try:
        text = value.decode()
    except UnicodeDecodeError:
        raise Unread("holds bytes that are no text: remove the column") from None
    check_text(text)
    return text
