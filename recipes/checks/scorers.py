"""What is wrong with `evaluate.scorers`, without any answer to score: files, functions, names of tasks."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from recipes.checks.lm_eval_folder import ways_out
from recipes.checks.lm_eval_tasks import find_tasks
from recipes.data.rows import SHOWN, Row
from recipes.data.turns import said_bytes
from recipes.data.wrong import Wrong
from recipes.plain import NOT_JSON, is_mapping
from recipes.problem import Problem, shown
from recipes.read.load import Loaded, missing
from recipes.scorers import JsonSchemaSpec, LmEvalSpec, PythonCallableSpec, SqlExecutionSpec

ARGUMENTS = ("answer", "reference", "columns")
TOKEN_BYTES = 4  # of English text; most other text has fewer bytes a token


def scorer_problems(loaded: Loaded) -> Iterator[Problem]:
    """Problems of all scorers, each with the field that it is about."""
    for number, scorer in enumerate(loaded.recipe.evaluate.scorers):
        field = f"evaluate.scorers.{number}.{scorer.content or 'kind'}"
        match scorer:
            case SqlExecutionSpec():
                yield from _databases(scorer, loaded, field)
            case JsonSchemaSpec():
                yield from _schema(loaded.resolve(scorer.schema_file), field)
            case PythonCallableSpec():
                yield from _function(scorer, loaded, field)
            case LmEvalSpec():
                yield from _tasks(scorer, loaded, f"evaluate.scorers.{number}")
            case _:
                pass


def _databases(scorer: SqlExecutionSpec, loaded: Loaded, field: str) -> Iterator[Problem]:
    folder = loaded.resolve(scorer.databases)
    if not folder.is_dir():
        yield missing(folder, field=field, kind="folder")
    elif not any(folder.glob("*.sql")):
        yield Problem(
            what=f"There is no *.sql file in {shown(folder)}.",
            where=field,
            why="The scorer builds one sqlite3 database from each, to run answers on.",
            next=f"Put a SCHEMA.sql with tables and rows there for each value of `{scorer.schema_column}`.",
        )


def _schema(path: Path, field: str) -> Iterator[Problem]:
    if not path.is_file():
        yield missing(path, field=field, kind="file")
        return
    try:
        schema: object = json.loads(path.read_text(encoding="utf-8"))
        wrong = "" if is_mapping(schema) or isinstance(schema, bool) else "It holds no JSON object."
    except NOT_JSON as error:
        wrong = f"It is no JSON: {error}."
    if wrong:
        yield Problem(
            what=f"{shown(path)} is no JSON schema.",
            where=field,
            why=wrong,
            next='Write a JSON schema: {"type": "object", "required": [...], "properties": {...}}.',
        )


def _function(scorer: PythonCallableSpec, loaded: Loaded, field: str) -> Iterator[Problem]:
    """The file is parsed, never imported: `check` runs nobody's code."""
    path, name = loaded.content(scorer), scorer.parts.function
    if path is None or not path.is_file():
        yield missing(path or loaded.folder, field=field, kind="file")
        return
    try:
        module = ast.parse(path.read_bytes(), filename=str(path))
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:  # the last two: nested too deep
        yield Problem(
            what=f"{shown(path)} is no Python that can be read.",
            where=field,
            why=f"{type(error).__name__}: {error}.",
            next="Correct the file.",
        )
        return
    bound = {bound_name: node for node in module.body for bound_name in _names(node)}
    if name not in bound:
        yield Problem(
            what=f"{shown(path)} has no `{name}`.",
            where=field,
            why=f"It defines {', '.join(sorted(bound)) or 'nothing'} at its top level.",
            next=f"Write `def {name}({', '.join(ARGUMENTS)})` there, or correct the name.",
        )
    elif isinstance(node := bound[name], ast.AsyncFunctionDef) or (
        isinstance(node, ast.FunctionDef) and not _takes_three(node.args)
    ):
        yield Problem(
            what=f"`{name}` cannot be called with {', '.join(ARGUMENTS)}.",
            where=f"{shown(path)}:{node.lineno}",
            why="A scorer gets the model's answer, the reference answer and the row's other columns, as positional "
            "arguments.",
            next=f"Write `def {name}({', '.join(ARGUMENTS)})`; it returns a number from 0 to 1, or a bool.",
        )


def _names(node: ast.stmt) -> list[str]:
    """Names that a statement binds at the top level of a module."""
    match node:
        case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
            return [node.name]
        case ast.Import() | ast.ImportFrom():
            return [(alias.asname or alias.name).split(".")[0] for alias in node.names]
        case ast.Assign():
            return [target.id for target in node.targets if isinstance(target, ast.Name)]
        case ast.AnnAssign(target=ast.Name() as target):
            return [target.id]
        case _:
            return []


def _takes_three(arguments: ast.arguments) -> bool:
    """True where three positional arguments are taken, and no more are required."""
    places = len(arguments.posonlyargs) + len(arguments.args)
    required = places - len(arguments.defaults)
    enough = arguments.vararg is not None or places >= len(ARGUMENTS)
    return enough and required <= len(ARGUMENTS) and all(default is not None for default in arguments.kw_defaults)


def _tasks(scorer: LmEvalSpec, loaded: Loaded, field: str) -> Iterator[Problem]:
    include = loaded.content(scorer)
    if include is not None and not include.is_dir():
        yield missing(include, field=f"{field}.include", kind="folder")
        return
    for way in ways_out(include) if include is not None else ():
        yield Problem(
            what=f"A folder of lm-eval tasks reaches out of itself: `{way.written}`.",
            where=f"{shown(way.file)}{f':{way.line}' if way.line else ''}",
            why=f"It leads to {way.target}. Who allows the folder has read what lies in it, and nothing else of it is "
            "part of a step's identity.",
            next="Copy that file into the folder, and name it there.",
        )
    for name, near in find_tasks(scorer.tasks, include).near.items():
        yield Problem(
            what=f"lm-evaluation-harness has no task `{name}`.",
            where=f"{field}.tasks",
            why="No task, group or tag has that name"
            + (f", in {shown(include)} or in lm_eval's own." if include else "; `include:` names no folder of yours."),
            next=f"Did you mean `{near}`?" if near else "`.venv/bin/lm-eval ls tasks` lists all names.",
        )


class RowChecks:
    """What only reading every row shows: databases that rows name, rows of dev and test without an answer."""

    def __init__(self, loaded: Loaded) -> None:
        """No rows yet.

        Args:
            loaded: The recipe.
        """
        self._databases = [
            (scorer.schema_column, loaded.resolve(scorer.databases))
            for scorer in loaded.recipe.evaluate.scorers
            if isinstance(scorer, SqlExecutionSpec)
        ]
        self._first: dict[str, dict[str, str]] = {column: {} for column, _ in self._databases}
        self._unanswered = Wrong()
        self._long, self._longest = Wrong(), 0
        recipe = loaded.recipe
        limit, self._kept = recipe.evaluate.max_new_tokens, recipe.data.max_length  # longer rows are not kept
        self._limit = limit if limit < self._kept else None

    def add(self, row: Row, *, held_out: bool) -> None:
        """The next row.

        Args:
            row: The row.
            held_out: It is in dev or test.
        """
        for column, first in self._first.items():
            first.setdefault(str(row.columns[column]), row.where)
        if held_out and not row.is_text and not _answers(row):
            self._unanswered.add(row.where)
        if self._limit is None or not held_out or row.is_text:
            return
        tokens = said_bytes(row.messages[-1]) // TOKEN_BYTES
        if self._limit <= tokens < self._kept:
            self._long.add(row.where)
            self._longest = max(self._longest, tokens)

    def warnings(self) -> Iterator[Problem]:
        """What an estimate says of the rows so far; the stage `rehearse` counts it in tokens, and refuses it."""
        if self._long.count:
            yield Problem(
                what=f"Reference answers of dev and test have more than {self._limit} tokens, by an estimate of "
                f"{TOKEN_BYTES} bytes a token: {self._long.count}.",
                where="evaluate.max_new_tokens",
                why="An answer that is cut off there scores 0, so the run ends before training where one is that long: "
                f"{', '.join(self._long.lines)}.",
                next=f"Set evaluate.max_new_tokens to {16 * (self._longest // 16 + 2)} or more; `rehearse` counts, and "
                "names the number that will do.",
            )

    def problems(self) -> Iterator[Problem]:
        """What is wrong with the rows so far."""
        for column, folder in self._databases:
            yield from _row_databases(column, folder, self._first[column])
        unanswered = self._unanswered
        if unanswered.count:
            yield Problem(
                what=f"{unanswered.count} rows of dev and test have no reference answer.",
                where=unanswered.lines[0],
                why=f"Their last turn is thinking that has no end, or nothing behind it, so no answer can be scored: "
                f"{', '.join(unanswered.lines)}.",
                next="Write the answer behind </think>, or remove these rows.",
            )


def _answers(row: Row) -> bool:
    """True where the last turn says or calls something; thinking that it never ends is nothing said."""
    turn = row.messages[-1]
    said = str(turn.get("content") or "").rpartition("</think>")[2].strip()
    return bool(turn.get("tool_calls") or (said and not said.startswith("<think>")))


def _row_databases(column: str, folder: Path, first: Mapping[str, str]) -> Iterator[Problem]:
    databases = {path.stem for path in folder.glob("*.sql")}  # a row's value is compared, it never becomes a path
    absent = [name for name in first if name not in databases]
    if absent and folder.is_dir():
        yield Problem(
            what=f"{len(absent)} databases are missing: {', '.join(f'{name}.sql' for name in absent[:SHOWN])}.",
            where=first[absent[0]],
            why=f"Rows name them in `{column}`, and their answers are run on them.",
            next=f"Put them into {shown(folder)}.",
        )
