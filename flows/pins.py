"""Pinning: everything that a recipe reads from outside, as bytes with a digest."""

from __future__ import annotations

import glob
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from recipes.data.files import data_files
from recipes.data.rows import source_name
from recipes.problem import RecipeError
from recipes.read.load import Loaded
from recipes.scorers import LmEvalSpec, Scorer, SqlExecutionSpec, input_name
from tasks.runtime.hub.ids import ADAPTER_FILES, CODE_FILES, MODEL_FILES, HubId, Snapshot
from tasks.runtime.pin import Digests, external_file, external_folder, snapshots
from tasks.runtime.step import External
from tasks.runtime.tokenizer_files import TOKENIZER_FILES

# What a folder of lm-evaluation-harness tasks can hold that shapes a score.
TASK_FILES = tuple(f"**/*.{end}" for end in ("yaml", "py", "json", "jsonl", "csv", "tsv", "parquet", "txt"))


@dataclass(frozen=True, kw_only=True)
class Pins:
    """Everything a recipe reads from outside, as bytes with a digest."""

    base: External
    tokenizer: External
    data: tuple[External, ...]
    general: External | None
    template: External | None
    scorers: dict[str, External]
    adapter: External | None = None
    calibration_text: External | None = None
    externals: Mapping[str, External] = field(default_factory=dict)


def pin(loaded: Loaded, home: Path) -> Pins:
    """Resolve paths and hub ids; digest what they name.

    Raises:
        RecipeError: Hub ids cannot be fetched: base and data at once.
    """
    recipe, digests = loaded.recipe, Digests(home)
    fetched = fetch(loaded)
    model = fetched.get("model.base") or _local(loaded, recipe.model.base)
    base = external_folder("base", model.folder, patterns=MODEL_FILES, digests=digests, source=model.source)
    tokens = external_folder(
        "tokenizer",
        model.folder,
        patterns=(*TOKENIZER_FILES, "generation_config.json"),
        digests=digests,
        source=model.source,
    )
    data = tuple(_source(loaded, number, fetched=fetched, digests=digests) for number in range(len(recipe.data.parts)))
    general = recipe.data.general and external_file("general", loaded.resolve(recipe.data.general), digests=digests)
    generic = recipe.calibrate.general if recipe.calibrate.controls else None
    text = generic and external_file("calibration_text", loaded.resolve(generic), digests=digests)
    named = recipe.model.chat_template
    template = (
        external_file("template", loaded.resolve(named), digests=digests) if named and named != "chatml" else None
    )
    scorers = {
        input_name(number): scorer_content(one, path, number, digests=digests)
        for number, one in enumerate(recipe.evaluate.scorers)
        if (path := loaded.content(one)) is not None
    }
    adapter = recipe.train.adapter and external_folder(
        "adapter",
        (there := fetched.get("train.adapter") or _local(loaded, recipe.train.adapter)).folder,
        patterns=ADAPTER_FILES,
        digests=digests,
        source=there.source,
    )
    externals: dict[str, External] = {}
    for name, one in recipe.evaluate.externals.items():
        found = fetched.get(f"evaluate.external.{name}") or _local(loaded, one.path)
        externals[name] = _model(name, found, digests, code=one.trust_remote_code)
    digests.save()
    return Pins(
        base=base,
        tokenizer=tokens,
        data=data,
        general=general or None,
        template=template,
        scorers=scorers,
        adapter=adapter or None,
        calibration_text=text or None,
        externals=externals,
    )


def _model(name: str, there: Snapshot, digests: Digests, *, code: bool) -> External:
    """An external model with its tokenizer, and with its Python files where they are run."""
    patterns = (*MODEL_FILES, *TOKENIZER_FILES, *(CODE_FILES if code else ()))
    return external_folder(name, there.folder, patterns=patterns, digests=digests, source=there.source)


def _local(loaded: Loaded, path: str) -> Snapshot:
    return Snapshot(folder=loaded.resolve(path), source=path)


def fetchable(loaded: Loaded) -> list[HubId]:
    """What the recipe names by hub id."""
    recipe = loaded.recipe
    asked: list[HubId] = []
    if loaded.base is None:
        model = recipe.model
        asked.append(HubId(name=model.base, revision=model.revision, kind="model", field="model.base"))
    for number, (part, here) in enumerate(zip(recipe.data.parts, loaded.data, strict=True)):
        if here is None:
            where = recipe.data.field(number)
            asked.append(HubId(name=part.path, revision=part.revision, kind="dataset", field=where))
    if recipe.train.adapter and loaded.adapter is None:
        asked.append(HubId(name=recipe.train.adapter, revision=None, kind="adapter", field="train.adapter"))
    for name, one in recipe.evaluate.externals.items():
        if loaded.externals[name] is None:
            where = f"evaluate.external.{name}"
            code = one.trust_remote_code
            asked.append(HubId(name=one.path, revision=one.revision, kind="model", field=where, code=code))
    return asked


def fetch(loaded: Loaded) -> dict[str, Snapshot]:
    """What the recipe names by hub id, by field; fetched together, so that their problems come at once."""
    asked = fetchable(loaded)
    try:
        found = snapshots(asked)
    except RecipeError as error:
        raise RecipeError(loaded.placed(problem) for problem in error.problems) from None
    return {hub.field: one for hub, one in zip(asked, found, strict=True)}


def _source(loaded: Loaded, number: int, *, fetched: Mapping[str, Snapshot], digests: Digests) -> External:
    """One source of the data: its file, or the files of its folder or snapshot that hold rows."""
    recipe = loaded.recipe.data
    asked, name = recipe.parts[number], source_name(number)
    there = fetched.get(recipe.field(number)) or _local(loaded, asked.path)
    if there.folder.is_file():
        return external_file(name, there.folder, digests=digests, source=there.source)
    files = [glob.escape(str(file.relative_to(there.folder))) for file in data_files(there.folder)]
    return external_folder(name, there.folder, patterns=files, digests=digests, source=there.source)


def scorer_content(scorer: Scorer, path: Path, number: int, *, digests: Digests) -> External:
    """What a scorer reads: a file, or the files of a folder that it looks at."""
    name = input_name(number)
    if isinstance(scorer, SqlExecutionSpec | LmEvalSpec):
        patterns = ("*.sql",) if isinstance(scorer, SqlExecutionSpec) else TASK_FILES
        return external_folder(name, path, patterns=patterns, digests=digests)
    return external_file(name, path, digests=digests)
