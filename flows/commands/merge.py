"""One stage without a recipe, a flow or a server: `quench merge BASE ADAPTER OUT`."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from recipes.models.adapters import Adapter, read_adapter
from recipes.models.headers import read_headers
from recipes.problem import Problem, RecipeError
from recipes.schema import is_hub_id
from tasks import merge
from tasks.runtime.hub.ids import ADAPTER_FILES, MODEL_FILES, Kind, Snapshot
from tasks.runtime.outside import make_folder, work_folder
from tasks.runtime.pin import Digests, external_folder, snapshot
from tasks.runtime.process.launch import Launcher
from tasks.runtime.process.leases import Leases, cpu_slots
from tasks.runtime.step import Context, Limits, Step, resolve_device
from tasks.runtime.store.local import Store, find_home
from tasks.runtime.tokenizer_files import TOKENIZER_FILES

ONTO = {"nf4": ("dequantized",), "bf16": ("original",), "unknown": ("dequantized", "original")}


class Merged(NamedTuple):
    """A merged model's folder and its manifest."""

    folder: Path
    manifest: dict[str, Any]


def merge_into(
    base: str,
    adapter: str,
    out: Path,
    *,
    onto: str | None,
    device: str,
    accept_other_base: bool,
    say: Callable[[str], None],
) -> list[Merged]:
    """Merge an adapter into a base; both are folders or hub ids.

    Without `onto` the base's type in training decides; where nothing tells it both merges are made, in
    OUT/dequantized and OUT/original.

    Raises:
        RecipeError: Everything that is wrong with the three, before anything is started.
        StepFailed: The merge itself failed.
    """
    out = out.absolute()
    found = [find("base", base, kind="model"), find("adapter", adapter, kind="adapter")]
    problems: list[Problem] = list(check_out(out, [one.folder for one in found]))
    described: Adapter | None = None
    try:
        described = read_adapter(found[1].folder)
    except RecipeError as error:
        problems += error.problems
    try:
        size = 2 * read_headers(found[0].folder).parameters
        wanted = (onto,) if onto else ONTO[described.base_type if described else "unknown"]
        problems += check_disk(out, size * len(wanted), what="the merged model")
    except RecipeError as error:
        problems += error.problems
    if problems or described is None:
        raise RecipeError(problems)
    choices = (onto,) if onto else ONTO[described.base_type]
    if onto is None:
        say(f"base in training: {described.base_type} ({described.evidence}); merging onto {' and '.join(choices)}")
    home = find_home()
    if not home.exists():
        home = work_folder(out)
    digests = Digests(home)
    patterns = (*MODEL_FILES, *TOKENIZER_FILES)
    pinned = {
        "base": external_folder("base", found[0].folder, patterns=patterns, digests=digests, source=found[0].source),
        "adapter": external_folder(
            "adapter", found[1].folder, patterns=ADAPTER_FILES, digests=digests, source=found[1].source
        ),
    }
    if home != work_folder(out):
        digests.save()
    steps = {name: merge.alone(name, **pinned, onto=name, accept_other_base=accept_other_base) for name in choices}
    with Launcher() as launcher:
        context = Context(
            store=Store(home),
            launcher=launcher,
            leases=Leases(home),
            limits=Limits(device=resolve_device(device), threads=cpu_slots()),
            on_event=lambda step, event: _tell(step, event, say),
        )
        merged = list(_make(steps, context, out))
    shutil.rmtree(work_folder(out), ignore_errors=True)
    return merged


def _make(steps: dict[str, Step], context: Context, out: Path) -> Iterator[Merged]:
    def make(step: Step, folder: Path) -> dict[str, Any]:
        inputs = {name: one.artifact for name, one in step.inputs.items() if not isinstance(one, Step)}
        return make_folder(step, inputs, context, out=folder)

    if len(steps) == 1:
        (step,) = steps.values()
        yield Merged(out, make(step, out))
        return
    both = out.with_name(f".{out.name}.both")
    shutil.rmtree(both, ignore_errors=True)
    try:
        manifests = {name: make(step, both / name) for name, step in steps.items()}
        if out.exists():
            out.rmdir()
        both.rename(out)
    finally:
        for folder in both.glob("[!.]*"):  # a merge whose sibling failed; the hidden work folder keeps its log
            shutil.rmtree(folder, ignore_errors=True)
    for name, manifest in manifests.items():
        yield Merged(out / name, manifest)


def _tell(step: Step, event: dict[str, Any], say: Callable[[str], None]) -> None:
    if event["kind"] == "note":
        say(f"{step.slug}: {event['about']}: {event['text']}")


def find(role: str, named: str, *, kind: Kind) -> Snapshot:
    """A folder, or a hub id's snapshot.

    Raises:
        RecipeError: It is neither, or cannot be fetched.
    """
    folder = Path(named).expanduser()
    if folder.is_dir():
        return Snapshot(folder=folder.resolve(), source=named)
    if is_hub_id(named, folder=Path.cwd()):
        return snapshot(named, revision=None, kind=kind, field=f"{role} {named}")
    raise Problem(
        what=f"The {role} is not there.",
        where=named,
        why="It is neither a folder nor a hub id (org/name).",
        next="Check the path.",
    ).error()


def check_out(out: Path, inputs: list[Path]) -> Iterator[Problem]:
    """OUT can be written, and is no input."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        yield Problem(
            what="OUT is not an empty folder.",
            where=str(out),
            why="Nothing is written over: what is there may be wanted.",
            next="Name another folder, or remove this one.",
        )
    for folder in inputs:
        if out.resolve().is_relative_to(folder):
            yield Problem(
                what="OUT lies inside an input.",
                where=str(out),
                why=f"{folder} is only read.",
                next="Name a folder outside of it.",
            )


def check_disk(out: Path, size: int, *, what: str) -> list[Problem]:
    """OUT's disk holds what is written there."""
    there = next(folder for folder in out.parents if folder.exists())
    free = shutil.disk_usage(there).free
    if free >= size:
        return []
    return [
        Problem(
            what=f"The disk has {free / 1e9:.1f} GB free, {what} takes {size / 1e9:.1f} GB.",
            where=str(there),
            why="It would be full in the middle of writing.",
            next="Free space, or name an OUT on another disk.",
        )
    ]
