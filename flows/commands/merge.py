"""`quench merge BASE ADAPTER OUT`: merge an adapter without a recipe, a flow or a server."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from flows.commands.folders import check_disk, check_output, find_input
from flows.commands.terminal import Output, say
from recipes.models.adapters import RECORD, read_adapter
from recipes.models.headers import read_headers
from recipes.problem import Problem, RecipeError
from tasks import merge
from tasks.runtime.hub.ids import ADAPTER_FILES, MODEL_FILES, Snapshot
from tasks.runtime.outside import make_folder, work_folder
from tasks.runtime.pin import Digests, external_folder
from tasks.runtime.process.launch import Launcher
from tasks.runtime.process.leases import Leases, cpu_slots
from tasks.runtime.step import Context, External, Limits, Step
from tasks.runtime.store.local import Store, find_home
from tasks.runtime.tokenizer_files import TOKENIZER_FILES

ONTO = {"nf4": ("dequantized",), "bf16": ("original",), "unknown": ("dequantized", "original")}


class Sources(NamedTuple):
    """What is merged, and where it came from."""

    base: Snapshot
    adapter: Snapshot


class MergedFolder(NamedTuple):
    """A merged model's folder and its manifest."""

    folder: Path
    manifest: dict[str, Any]


def command(args: argparse.Namespace) -> Output:
    """Merge; answer with the manifests.

    Raises:
        RecipeError: As of merge_into.
        StepFailed: As of merge_into.
    """
    merged = merge_into(args.base, args.adapter, args.out, onto=args.onto, accept_other_base=args.accept_other_base)
    lines = [
        f"{folder}: {manifest['result']['parameters'] / 1e6:.1f} M parameters onto {manifest['result']['onto']}, "
        f"{manifest['seconds']:.0f} s, peak {manifest['peak_rss_gib']:.2f} GiB"
        for folder, manifest in merged
    ]
    return Output(
        json={"ok": True, "merged": [{"folder": str(folder), **manifest} for folder, manifest in merged]},
        text="\n".join(lines),
    )


def merge_into(base: str, adapter: str, out: Path, *, onto: str | None, accept_other_base: bool) -> list[MergedFolder]:
    """Merge an adapter into a base; both are folders or hub ids.

    Without `onto` the base's type in training decides; where that is unknown both merges are made, in
    OUT/dequantized and OUT/original.

    Raises:
        RecipeError: Everything that is wrong with the three, before anything is started.
        StepFailed: The merge itself failed.
    """
    out = out.absolute()
    sources = Sources(find_input("base", base, kind="model"), find_input("adapter", adapter, kind="adapter"))
    choices = _check(sources, out, onto=onto, accept_other_base=accept_other_base)
    home = find_home()
    if not home.exists():
        home = work_folder(out)
    inputs = _pinned(sources, digests=Digests(home), keep=home != work_folder(out))
    steps = {name: merge.alone(name, **inputs, onto=name, accept_other_base=accept_other_base) for name in choices}
    with Launcher() as launcher:
        context = Context(
            store=Store(home),
            launcher=launcher,
            leases=Leases(home),
            limits=Limits(threads=cpu_slots()),
            on_event=_say_note,
        )
        merged = list(_make(steps, context, out))
    shutil.rmtree(work_folder(out), ignore_errors=True)
    return merged


def _check(sources: Sources, out: Path, *, onto: str | None, accept_other_base: bool) -> Sequence[str]:
    """Check all three; returns what to merge onto: `dequantized`, `original`, or both."""
    problems: list[Problem] = list(check_output(out, word="OUT", inputs=[source.folder for source in sources]))
    base_type, evidence = "unknown", ""
    try:
        described = read_adapter(sources.adapter.folder)
        base_type, evidence = described.base_type, described.evidence
    except RecipeError as error:
        problems += error.problems
    choices = (onto,) if onto else ONTO[base_type]
    if accept_other_base and ("dequantized" not in choices or not (sources.adapter.folder / RECORD).exists()):
        problems.append(_nothing_to_accept(sources.adapter.folder))
    try:
        size = 2 * read_headers(sources.base.folder, needs_tokenizer=False).parameters * len(choices)
        problems += check_disk(out, size, word="OUT", content="the merged model")
    except RecipeError as error:
        problems += error.problems
    if problems:
        raise RecipeError(problems)
    if onto is None:
        say(f"base in training: {base_type} ({evidence}); merging onto {' and '.join(choices)}")
    return choices


def _nothing_to_accept(adapter: Path) -> Problem:
    return Problem(
        what="--accept-other-base would do nothing.",
        where=str(adapter / RECORD),
        why="It merges in spite of a base that differs from the adapter's record of the NF4 weights that it was "
        "trained on; there is no such record, or nothing goes onto NF4 weights.",
        next="Leave it out.",
    )


def _pinned(sources: Sources, *, digests: Digests, keep: bool) -> dict[str, External]:
    """Both with their digests, which are kept for the next command where there is a home."""
    patterns = {"base": (*MODEL_FILES, *TOKENIZER_FILES), "adapter": ADAPTER_FILES}
    inputs = {
        name: external_folder(name, source.folder, patterns=patterns[name], digests=digests, source=source.source)
        for name, source in sources._asdict().items()
    }
    if keep:
        digests.save()
    return inputs


def _make(steps: dict[str, Step], context: Context, out: Path) -> Iterator[MergedFolder]:
    def make(step: Step, folder: Path) -> dict[str, Any]:
        inputs = {name: source.artifact for name, source in step.inputs.items() if not isinstance(source, Step)}
        return make_folder(step, inputs, context, out=folder)

    if len(steps) == 1:
        (step,) = steps.values()
        yield MergedFolder(out, make(step, out))
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
        yield MergedFolder(out / name, manifest)


def _say_note(step: Step, event: dict[str, Any]) -> None:
    if event["kind"] == "note":
        say(f"{step.slug}: {event['about']}: {event['text']}")
