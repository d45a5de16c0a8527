"""Pinning: everything that a recipe reads from outside, as bytes with a digest."""

from __future__ import annotations

import glob
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

from recipes.data.files import FolderChoice, data_files
from recipes.data.origin import source_name
from recipes.data.schema import RowFields
from recipes.problem import RecipeError
from recipes.read.load import Loaded
from recipes.scorers import LmEvalSpec, Scorer, SqlExecutionSpec, input_name
from tasks.runtime.hub.ids import ADAPTER_FILES, CODE_FILES, MODEL_FILES, HubId, Snapshot
from tasks.runtime.pin import Digests, external_file, external_folder, headers_only, snapshots
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
    recipe = loaded.recipe
    source = _Outside(loaded, fetch(loaded), Digests(home))
    model = source.at("model.base", recipe.model.base)
    template = recipe.model.chat_template
    pins = Pins(
        base=source.folder("base", model, MODEL_FILES),
        tokenizer=source.folder("tokenizer", model, (*TOKENIZER_FILES, "generation_config.json", "config.json")),
        data=tuple(source.data(number) for number in range(len(recipe.data.parts))),
        general=source.text("general", recipe.data.general),
        calibration_text=source.text(
            "calibration_text", recipe.calibrate.general if recipe.calibrate.controls else None
        ),
        template=source.file("template", template if template != "chatml" else None),
        scorers={
            input_name(number): scorer_content(scorer, path, number, digests=source.digests)
            for number, scorer in enumerate(recipe.evaluate.scorers)
            if (path := loaded.content(scorer)) is not None
        },
        adapter=source.adapter(),
        externals={name: source.external(name) for name in recipe.evaluate.externals},
    )
    source.digests.save()
    return pins


class RowPins(NamedTuple):
    """What prepare reads for its rows, without digests: nothing is made of it."""

    data: tuple[External, ...]
    tokenizer: External
    template: External | None


def row_pins(loaded: Loaded) -> RowPins:
    """Resolve what prepare reads; of a base on a hub, its tokenizer and config alone are fetched.

    Raises:
        RecipeError: Hub ids cannot be fetched, base and data at once; or a folder has several sets of rows.
    """
    data = loaded.recipe.data
    fields = ["model.base", *(data.field(number) for number in range(len(data.parts)))]
    ids = {hub.field: hub for hub in fetchable(loaded) if hub.field in fields}
    wanted = [replace(hub, kind="tokenizer") if hub.kind == "model" else hub for hub in ids.values()]
    source = _Outside(loaded, _snapshots(loaded, wanted), Digests(Path()))

    folders = [source.at(data.field(number), part.path) for number, part in enumerate(data.parts)]
    for number, part in enumerate(data.parts):
        source.files(folders[number], field=data.field(number), part=part)
    template = loaded.recipe.model.chat_template
    return RowPins(
        data=tuple(_undigested(source_name(number), snapshot.folder) for number, snapshot in enumerate(folders)),
        tokenizer=_undigested("tokenizer", source.at("model.base", loaded.recipe.model.base).folder),
        template=_undigested("template", loaded.resolve(template)) if template not in (None, "chatml") else None,
    )


def light_pins(loaded: Loaded, folder: Path) -> Pins:
    """What a recipe reads from outside, without digests and without a weight: enough to plan, not to run.

    Args:
        loaded: The recipe.
        folder: An empty folder. Models on a hub are laid out in it, as far as their headers go.

    Raises:
        RecipeError: Hub ids cannot be fetched.
    """
    ids, recipe = fetchable(loaded), loaded.recipe
    fetched = _snapshots(loaded, [hub for hub in ids if hub.kind != "model"])
    for number, hub in enumerate(hub for hub in ids if hub.kind == "model"):
        try:
            fetched[hub.field] = headers_only(hub, folder / str(number))
        except RecipeError as error:
            raise RecipeError(loaded.placed(problem) for problem in error.problems) from None
    source = _Outside(loaded, fetched, Digests(folder))

    def external(name: str, field: str, path: str) -> External:
        return _undigested(name, source.at(field, path).folder)

    def optional(name: str, path: str | None) -> External | None:
        return external(name, name, path) if path else None

    base = external("base", "model.base", recipe.model.base)
    return Pins(
        base=base,
        tokenizer=base,
        data=tuple(
            external(source_name(number), recipe.data.field(number), part.path)
            for number, part in enumerate(recipe.data.parts)
        ),
        general=optional("general", recipe.data.general),
        template=None,
        scorers={},
        adapter=external("adapter", "train.adapter", recipe.train.adapter) if recipe.train.adapter else None,
        calibration_text=optional("calibration_text", recipe.calibrate.general),
        externals={
            name: external(name, f"evaluate.external.{name}", model.path)
            for name, model in recipe.evaluate.externals.items()
        },
    )


def _undigested(name: str, path: Path) -> External:
    """Something from outside of which nothing is made."""
    return External(name=name, path=path, digest="", source="")


class _Outside(NamedTuple):
    """Whatever a recipe names, on this machine or fetched: field of the recipe -> snapshot."""

    loaded: Loaded
    fetched: Mapping[str, Snapshot]
    digests: Digests

    def at(self, field: str, path: str) -> Snapshot:
        """The snapshot of a field, or the local path that it names."""
        return self.fetched.get(field) or Snapshot(folder=self.loaded.resolve(path), source=path)

    def file(self, name: str, path: str | None) -> External | None:
        """A local file; None where the recipe names none."""
        return external_file(name, self.loaded.resolve(path), digests=self.digests) if path else None

    def folder(self, name: str, snapshot: Snapshot, patterns: Sequence[str]) -> External:
        """The files of a folder that match."""
        return external_folder(name, snapshot.folder, patterns=patterns, digests=self.digests, source=snapshot.source)

    def data(self, number: int) -> External:
        """One source of the data: its file, or the files of its folder or snapshot that hold rows."""
        data = self.loaded.recipe.data
        name, snapshot = source_name(number), self.at(data.field(number), data.parts[number].path)
        if snapshot.folder.is_file():
            return external_file(name, snapshot.folder, digests=self.digests, source=snapshot.source)
        return self._rows(name, snapshot, field=data.field(number), part=data.parts[number])

    def text(self, name: str, path: str | None) -> External | None:
        """General text: a local file, or the files of a folder that hold rows; None where the recipe names none."""
        if not path or not (folder := self.loaded.resolve(path)).is_dir():
            return self.file(name, path)
        return self._rows(name, Snapshot(folder=folder, source=path), field=f"{name}: {path}")

    def _rows(self, name: str, snapshot: Snapshot, *, field: str, part: RowFields | None = None) -> External:
        """The files of a folder that hold the rows that are meant."""
        files = self.files(snapshot, field=field, part=part)
        return self.folder(name, snapshot, [glob.escape(str(file.relative_to(snapshot.folder))) for file in files])

    def files(self, snapshot: Snapshot, *, field: str, part: RowFields | None = None) -> list[Path]:
        """The files of a folder that hold the rows that are meant.

        Raises:
            RecipeError: The folder has several sets of rows, and none is named.
        """
        config, split = (part.config, part.split) if part else (None, None)
        try:
            return data_files(snapshot.folder, config=config, split=split)
        except FolderChoice as choice:
            written = "nowhere" if part is None else "data" if field == "data.path" else "source"
            raise self.loaded.placed(choice.problem(field, written=written)).error() from None

    def adapter(self) -> External | None:
        """`train.adapter`, where it stands in the place of training."""
        path = self.loaded.recipe.train.adapter
        return self.folder("adapter", self.at("train.adapter", path), ADAPTER_FILES) if path else None

    def external(self, name: str) -> External:
        """An external model with its tokenizer, and with its Python files where they are run."""
        model = self.loaded.recipe.evaluate.externals[name]
        patterns = (*MODEL_FILES, *TOKENIZER_FILES, *(CODE_FILES if model.trust_remote_code else ()))
        return self.folder(name, self.at(f"evaluate.external.{name}", model.path), patterns)


def fetchable(loaded: Loaded) -> list[HubId]:
    """What the recipe names by hub id."""
    recipe = loaded.recipe
    ids: list[HubId] = []
    if loaded.base is None:
        model = recipe.model
        ids.append(HubId(name=model.base, revision=model.revision, kind="model", field="model.base"))
    for number, (part, local) in enumerate(zip(recipe.data.parts, loaded.data, strict=True)):
        if local is None:
            field = recipe.data.field(number)
            ids.append(HubId(name=part.path, revision=part.revision, kind="dataset", field=field))
    if recipe.train.adapter and loaded.adapter is None:
        ids.append(HubId(name=recipe.train.adapter, revision=None, kind="adapter", field="train.adapter"))
    for name, model in recipe.evaluate.externals.items():
        if loaded.externals[name] is None:
            field, code = f"evaluate.external.{name}", model.trust_remote_code
            ids.append(HubId(name=model.path, revision=model.revision, kind="model", field=field, code=code))
    return ids


def fetch(loaded: Loaded) -> dict[str, Snapshot]:
    """What the recipe names by hub id, by field; fetched together, so that their problems come at once."""
    return _snapshots(loaded, fetchable(loaded))


def _snapshots(loaded: Loaded, ids: Sequence[HubId]) -> dict[str, Snapshot]:
    try:
        fetched = snapshots(ids)
    except RecipeError as error:
        raise RecipeError(loaded.placed(problem) for problem in error.problems) from None
    return {hub.field: snapshot for hub, snapshot in zip(ids, fetched, strict=True)}


def scorer_content(scorer: Scorer, path: Path, number: int, *, digests: Digests) -> External:
    """What a scorer reads: a file, or the files of a folder that it looks at."""
    name = input_name(number)
    if isinstance(scorer, SqlExecutionSpec | LmEvalSpec):
        patterns = ("*.sql",) if isinstance(scorer, SqlExecutionSpec) else TASK_FILES
        return external_folder(name, path, patterns=patterns, digests=digests)
    return external_file(name, path, digests=digests)
