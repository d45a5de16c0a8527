"""A home without what is large, and the way back into a folder where it can be read: `thin` and `opened`.

Large files become a line of text and parquet is compressed again; manifests then say what is there, and whatever names
an artifact by its digest names the new one. Nothing else is changed: keys, layouts and words are those of the Quench
that wrote the home.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from tasks.runtime.fingerprint import file_digest, fingerprint
from tasks.runtime.process.launch import CHECKOUT

HOME, PLACE = "@HOME@", "@CHECKOUT@"  # in place of the folders of the machine that wrote the home
LARGE = 3_000  # bytes of a file that nobody parses
DROPPED = ("kl.parquet", "nf4.json")
GONE = ("evaluate/base-nf4",)  # removed by hand, as it were: a run may name what is not there any more
WHOLE = ("evaluate/rtn",)  # keep what one of each kind has: answers, the attempt's folder
FEW = {"rows.parquet": 4, "general.parquet": 4, "calibset.parquet": 4, "rows_seen.parquet": 4}  # rows that are kept
RUN_FILES = ("recipe.yaml", "recipe.resolved.json", "registered.json", "steps.json", "promotion.json", "retrain.json")
RUN_FILES += ("rows_seen.parquet",)
UP = {"deployments": [], "folder": HOME, "home": HOME, "mlflow": "http://127.0.0.1:9", "pid": 1}
UP |= {"prefect": "http://127.0.0.1:9/api"}  # of a `quench up` that was killed


def thin(home: Path, dest: Path, *, checkout: Path = CHECKOUT, without: str = "") -> None:
    """Write a home for the tree.

    Args:
        home: What `make` made.
        dest: New folder.
        checkout: Whose paths the home has.
        without: Run that is left out: what it alone has is unreached then.
    """
    dest.mkdir(parents=True)
    names: dict[str, str] = {}
    unread = _champion_of(home / "runs" / without) if without else None
    for manifest in sorted(home.glob("store/*/*/manifest.json")):
        place = manifest.parent.relative_to(home / "store")
        if not str(place).startswith(GONE):
            names |= _artifact(manifest.parent, dest / "store" / place, few=f"store/{place}" == unread)
    _beside(home, dest, without)
    names |= {str(home): HOME, str(home.parent): "/somewhere", str(checkout): PLACE}
    for path in dest.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
        if path.suffix == ".parquet" and "store" not in path.parts:
            _smaller(path)
        elif path.is_file() and path.suffix != ".parquet" and "files" not in path.parts:
            _named_anew(path, names)


def _beside(home: Path, dest: Path, without: str) -> None:
    """Everything of a home but the store."""
    for name in ("layout", "promotions.jsonl", "digests.json"):
        shutil.copy(home / name, dest / name)
    shutil.copytree(home / "promotions", dest / "promotions")
    for path in dest.glob("promotions/*/*/train_rows.json"):
        told = json.loads(path.read_text(encoding="utf-8"))
        path.write_text(json.dumps({**told, "rows": told["rows"][:20]}), encoding="utf-8")
    for card in dest.glob("promotions/*/*/card.md"):
        card.write_text("".join(card.read_text(encoding="utf-8").splitlines(keepends=True)[:20]), encoding="utf-8")
    for run in sorted(path for path in (home / "runs").iterdir() if not path.is_symlink() and path.name != without):
        (dest / "runs" / run.name).mkdir(parents=True)
        files = RUN_FILES + (("preflight.json",) if (run / "retrain.json").exists() else ())
        for name in files:
            if (run / name).exists():
                shutil.copy(run / name, dest / "runs" / run.name / name)
    (dest / "runs" / "latest").symlink_to((home / "runs" / "latest").readlink())
    for attempt in home.glob("partial/*/*/attempt-*"):
        shutil.copytree(attempt, dest / attempt.relative_to(home))
    (dest / "up.json").write_text(json.dumps(UP), encoding="utf-8")


def opened(name: Path, home: Path) -> Path:
    """A home of the tree, in a folder where it can be read and changed."""
    shutil.copytree(name, home, symlinks=True)
    for path in home.rglob("*"):
        if path.is_file() and "files" not in path.parts and path.suffix != ".parquet":
            text = path.read_text(encoding="utf-8")
            if HOME in text or PLACE in text:
                path.write_text(text.replace(HOME, str(home)).replace(PLACE, str(CHECKOUT)), encoding="utf-8")
    return home


def _champion_of(run: Path) -> str | None:
    """The evaluation of the champion that a run was compared with: without the run nothing reaches it."""
    record = json.loads((run / "promotion.json").read_text(encoding="utf-8"))
    return record["champion"] and record["champion"]["evaluate"]


def _artifact(folder: Path, dest: Path, *, few: bool) -> dict[str, str]:
    """Write an artifact with small files, without its tables where these are `few`; returns old and new digest."""
    manifest: dict[str, Any] = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    whole = f"{folder.parent.name}/{folder.name}".startswith(WHOLE)
    (dest / "files").mkdir(parents=True)
    for name in sorted(manifest["files"]):
        path = dest / "files" / name
        if (
            path.name in DROPPED
            or (path.name == "answers.parquet" and not whole)
            or (few and path.suffix == ".parquet")
        ):
            del manifest["files"][name]
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        _file(folder / "files" / name, path)
        manifest["files"][name] = {"sha256": file_digest(path), "size": path.stat().st_size}
    if whole:
        for attempt in folder.glob("attempt-*"):
            shutil.copytree(attempt, dest / attempt.name)
    content = {name: file["sha256"] for name, file in manifest["files"].items() if name != "events.jsonl"}
    old, manifest["digest"] = manifest["digest"], fingerprint({"files": content})
    (dest / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    return {old: manifest["digest"]}


def _file(source: Path, path: Path) -> None:
    size = source.stat().st_size
    if source.suffix == ".parquet":
        shutil.copy(source, path)
        path.chmod(0o644)
        _smaller(path)
    elif source.name == "events.jsonl":  # curves are long
        lines = source.read_text(encoding="utf-8").splitlines()
        kept = [line for line in lines if json.loads(line)["kind"] == "note"] + lines[-1:]
        path.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
    elif source.name == "quantize.json":  # the report reads it
        path.write_text(_compact(source.read_text(encoding="utf-8")), encoding="utf-8")
    elif size > LARGE or source.suffix == ".md":
        path.write_text(f"{source.name} of {size} bytes\n", encoding="utf-8")
    else:
        shutil.copy(source, path)


def _smaller(path: Path) -> None:
    """The same table in fewer bytes."""
    table = pq.read_table(path)
    table = table.slice(0, FEW.get(path.name, len(table)))
    pq.write_table(table, path, compression="zstd", compression_level=19, write_statistics=False)


def _named_anew(path: Path, names: Mapping[str, str]) -> None:
    text = path.read_text(encoding="utf-8")
    for old, new in names.items():
        text = text.replace(old, new)
    path.write_text(_compact(text) if path.suffix == ".json" else text, encoding="utf-8")


def _compact(text: str) -> str:
    """JSON without spaces."""
    return json.dumps(json.loads(text), separators=(",", ":"), ensure_ascii=False) + "\n"
