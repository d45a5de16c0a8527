"""Which files of a folder hold the rows that are meant: configurations and splits, as hubs and people name them."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice, takewhile
from pathlib import Path
from typing import Any, Literal, NamedTuple

import yaml

from recipes.data.raw.opening import kind
from recipes.data.raw.row import Unread
from recipes.plain import is_list, is_mapping, json_object
from recipes.plain_yaml import Loader
from recipes.problem import Problem

KINDS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow")
TEXT = ".txt"  # counts where a folder has no other kind
NO_FILES = f"no {', '.join(f'*{ending}' for ending in KINDS)} or *{TEXT} file in it"
NOT_ROWS = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")  # what data set tools leave
NOT_TEXTS = re.compile(
    r"(readme|licen[cs]e|notice|copying|authors|citation|change(log|s)|contributing|requirements)", re.IGNORECASE
)
SPLIT = re.compile(r"(train|(testing|test|validation|valid|val|dev|evaluation|eval)(?![a-z]))", re.IGNORECASE)
SHARD = re.compile(r"[-_.]?\d+(-of-\d+)?$")  # behind the name of a split: train-00000-of-00002
NAMED = re.compile(r"^\w[\w.]*-\d{5}-of-\d{5}$")  # a hub's file, whose split can have any name
DATA = "data"  # a folder, or a file of shards, of this name says nothing
TRAIN = "train"
MOST_ENTRIES = 200_000  # what `data.path: /` has in it takes minutes to look at
SHOWN = 20  # names that are listed; the rest is counted
FENCE = "---"  # before and behind the YAML of a card
DEFAULT = "default"  # a hub's name for the configuration that has none


Field = Literal["config", "split"]


class FolderChoice(Unread):
    """A folder holds several sets of rows, or not the one that is asked for.

    Attributes:
        field: What chooses: `config` or `split`.
        names: Those that there are.
        what: One sentence.
        why: The names, in a sentence.
    """

    def __init__(self, field: Field, names: Iterable[str], *, what: str, why: str) -> None:
        self.field: Field = field
        self.names = sorted(names)
        self.what = what
        self.why = why
        super().__init__(f"{what} {why}")

    def problem(self, where: str, *, written: Literal["data", "source", "nowhere"] = "data") -> Problem:
        """The refusal, with the line to write.

        Args:
            where: The folder.
            written: Where the recipe names it: `data.path`, an entry of `data.sources`, or a field with no such choice.
        """
        prefix = "data." if written == "data" else ""
        place = " in this entry of data.sources" if written == "source" else ""
        if written == "nowhere":
            following = "Name the file, or the folder, that is meant."
        elif self.names:
            more = ", or another one of these" if len(self.names) > 1 else ""
            following = f"Write `{prefix}{self.field}: {self.names[0]}`{place}{more}."
        else:
            following = f"Remove `{prefix}{self.field}`{place}."
        return Problem(what=self.what, where=where, why=self.why, next=following)


class Unlistable(FolderChoice):
    """A folder of which not every entry can be looked at."""

    def __init__(self, why: str) -> None:
        super().__init__("split", (), what="The folder is no folder of rows that can be listed.", why=why)

    def problem(self, where: str, *, written: Literal["data", "source", "nowhere"] = "data") -> Problem:
        """The refusal, see FolderChoice."""
        return Problem(what=self.what, where=where, why=self.why, next="Name the file, or the folder, that is meant.")


class _File(NamedTuple):
    """A file with rows.

    Attributes:
        path: Its path.
        config: Name of its configuration; "" for none.
        split: Name of its split; "" for none.
        declared: The name of the split is exact: it is on the data set's card, or in the name of a shard.
    """

    path: Path
    config: str
    split: str
    declared: bool = False


def data_files(path: Path, *, config: str | None = None, split: str | None = None) -> list[Path]:
    """The file itself, or the files of a folder that hold the rows that are meant, sorted.

    Where a folder has train files, these are meant: those whose name, or a folder on the way to them, begins with
    `train`. Hidden files are left out.

    Args:
        path: File or folder.
        config: Configuration of a folder, by name.
        split: Split of a folder, by name.

    Raises:
        FolderChoice: The folder has several configurations or splits and none is named; or not the one that is named.
    """
    if path.is_file():
        chosen: tuple[tuple[Field, str | None], ...] = (("config", config), ("split", split))
        for field, name in chosen:
            if name is not None:
                raise FolderChoice(
                    field, (), what=f"There is no {field} `{name}` in a file.", why=f"{path.name} is one set of rows."
                )
        return [path]
    paths = _paths(path)
    files = _of_config(_on_card(path, paths) or [_by_path(path, file) for file in paths], config)
    return sorted(file.path for file in _of_split(files, split))


def _paths(folder: Path) -> list[Path]:
    """Every file that can hold rows.

    Raises:
        FolderChoice: Of another kind: there is too much in the folder, or it changes while it is listed.
    """
    try:
        entries = sorted(islice(folder.rglob("*"), MOST_ENTRIES + 1))
    except OSError as error:
        raise Unlistable(f"{error.filename} in it cannot be read: {error.strerror}.") from None
    if len(entries) > MOST_ENTRIES:
        raise Unlistable(f"It has more than {MOST_ENTRIES:,} files and folders in it.")
    files = [
        file
        for file in entries
        if kind(file) in (*KINDS, TEXT)
        and file.name not in NOT_ROWS
        and not any(part.startswith(".") for part in file.relative_to(folder).parts)
        and file.is_file()
    ]
    files = [file for file in files if _is_saved(file)]
    rows = [file for file in files if kind(file) != TEXT]
    return rows or [file for file in files if not NOT_TEXTS.match(file.name)]


def _is_saved(file: Path) -> bool:
    """False for what `save_to_disk` has left over beside its files: shards of an earlier call, caches."""
    state = json_object(file.parent / "state.json") if kind(file) == ".arrow" else None
    named = state.get("_data_files") if state else None
    if not is_list(named):
        return True
    return any(is_mapping(entry) and entry.get("filename") == file.name for entry in named)


# ---- configurations and splits of files


def _by_path(folder: Path, file: Path) -> _File:
    """What the names of a file and of the folders on the way to it say."""
    *folders, name = file.relative_to(folder).parts
    parts = [*folders, name[: name.index(".", 1)] if "." in name[1:] else name]
    saved = json_object(folder / "dataset_dict.json") or {}
    splits = saved.get("splits")
    if folders and is_list(splits) and folders[0] in splits:
        return _File(file, "", folders[0], declared=True)
    for number, part in enumerate(parts):
        if SPLIT.match(part):
            last = number == len(parts) - 1
            return _File(file, _config(parts[:number]), SHARD.sub("", part), declared=last and bool(NAMED.match(part)))
    shards = SHARD.sub("", parts[-1]) if NAMED.match(parts[-1]) else ""
    return _File(file, _config(folders), "" if shards == DATA else shards, declared=bool(shards))


def _config(folders: Sequence[str]) -> str:
    return "/".join(folders[1:] if folders and folders[0] == DATA else folders)


def _of_config(files: list[_File], config: str | None) -> list[_File]:
    """The files of the configuration that is named; all where there is one only."""
    if config is None:
        names = {file.config or DEFAULT for file in files if file.split}
        if len(names) > 1:
            raise FolderChoice("config", names, what=f"The folder has {len(names)} configurations.", why=_one_of(names))
        return files
    chosen = [file for file in files if (file.config or DEFAULT) == config]
    if not chosen:
        names = {file.config or DEFAULT for file in files if file.config}
        why = _one_of(names) if names else "It has none by name."
        raise FolderChoice("config", names, what=f"The folder has no configuration `{config}`.", why=why)
    return chosen


def _of_split(files: list[_File], split: str | None) -> list[_File]:
    """The files of the split that is named; else those of train; else all, where they are of one split."""
    names = {file.split for file in files if file.split}
    if split is not None:
        chosen = [file for file in files if file.split == split]
        if not chosen:
            why = _one_of(names) if names else "No file of it is named by a split."
            raise FolderChoice("split", names, what=f"The folder has no split `{split}`.", why=why)
        return chosen
    train = [file for file in files if file.split.lower().startswith(TRAIN)]
    if train:
        return _of_train(train)
    without = sorted(file.path.name for file in files if not file.split)
    if len(names) > 1 or (names and without):
        other = f" These files name no split, and can be given as paths: {_listed(without)}." if without else ""
        what = f"The folder has no split `{TRAIN}`, but others."
        raise FolderChoice("split", names, what=what, why=_one_of(names) + other)
    return files


def _of_train(files: list[_File]) -> list[_File]:
    """Files that begin with `train`: together, unless they are declared to be several splits."""
    declared = {file.split for file in files if file.declared}
    if len(declared) < 2:
        return files
    if TRAIN not in declared:
        what = f"The folder has {len(declared)} splits that begin with `{TRAIN}`."
        raise FolderChoice("split", declared, what=what, why=_one_of(declared))
    return [file for file in files if file.split == TRAIN]


def _one_of(names: Iterable[str]) -> str:
    return f"One of them is meant: {_listed(sorted(names))}."


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


# ---- the card of a hub data set


def _on_card(folder: Path, paths: Sequence[Path]) -> list[_File]:
    """Files as the `configs` of a data set's README.md declare them; none where it has no such thing."""
    files: list[_File] = []
    for config in _configs(folder / "README.md"):
        name = str(config.get("config_name", DEFAULT))
        root = folder / str(config.get("data_dir") or "")
        if config.get("data_files") is None:
            inside = [path for path in paths if path.is_relative_to(root)] if config.get("data_dir") else []
            files += (_by_path(root, path)._replace(config=name) for path in inside)
            continue
        for split, pattern in _patterns(config["data_files"]):
            files += (_File(path, name, split, declared=True) for path in _matching(root, pattern, paths))
    return files


def _configs(card: Path) -> list[dict[str, Any]]:
    """The `configs` of the YAML that stands at the head of a card."""
    try:
        with card.open(encoding="utf-8-sig") as opened:
            if opened.readline().rstrip() != FENCE:
                return []
            head = list(takewhile(lambda line: line.rstrip() != FENCE, opened))
        written: object = yaml.load("".join(head), Loader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return []
    configs = written.get("configs") if is_mapping(written) else None
    return [config for config in configs if is_mapping(config)] if is_list(configs) else []


def _patterns(data_files: Any) -> Iterator[tuple[str, str]]:
    """Split and pattern of everything that `data_files` names: a pattern, several, or some a split."""
    if is_mapping(data_files):
        data_files = [{"split": split, "path": path} for split, path in data_files.items()]
    for entry in data_files if is_list(data_files) else [data_files]:
        split, path = (str(entry.get("split", TRAIN)), entry.get("path")) if is_mapping(entry) else (TRAIN, entry)
        for pattern in path if is_list(path) else [path]:
            yield split, str(pattern)


def _matching(root: Path, pattern: str, paths: Sequence[Path]) -> list[Path]:
    """The files below `root` that a pattern names, as the hub's own library reads it."""
    utils: Any = importlib.import_module("fsspec.utils")
    try:
        expression = re.compile(utils.glob_translate(pattern.removeprefix("./")))
    except ValueError:  # no pattern
        return []
    below = [path for path in paths if path.is_relative_to(root)]
    return [path for path in below if expression.match(path.relative_to(root).as_posix())]
