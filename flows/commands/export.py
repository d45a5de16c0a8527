"""`quench export`: an arm of a run as a folder of its own, real copies all of it, loaded again before it says done."""

from __future__ import annotations

import argparse
import contextlib
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from flows.commands.arms import named_arm, unmade
from flows.commands.folders import check_disk, check_output
from flows.commands.terminal import FAILED, Output, refusal, say
from flows.report.build import render
from flows.report.model_card import card, provenance_of
from flows.results.artifacts import Part, bf16_headers, parts_of, serve_record
from flows.results.read import Run, RunArm, read_run, recipe_of
from flows.run.folder import find_run
from recipes.plain import json_object
from recipes.problem import Problem, RecipeError
from recipes.schemes import on_disk
from recipes.schemes.serve_file import write
from tasks import reload
from tasks.runtime.fingerprint import file_digest
from tasks.runtime.hub.ids import MODEL_FILES
from tasks.runtime.outside import work_folder
from tasks.runtime.pin import Digests, external_folder
from tasks.runtime.process.launch import Launcher
from tasks.runtime.process.leases import Leases, cpu_slots
from tasks.runtime.step import Context, External, Limits, resolve_device, run_step
from tasks.runtime.store.local import Store, find_home, read_json
from tasks.runtime.tokenizer_files import TOKENIZER_FILES


@dataclass(frozen=True, kw_only=True)
class Exported:
    """A finished export.

    Attributes:
        folder: DEST.
        arm: The arm.
        files: How many there are.
        n_bytes: Their size.
        reloaded: What the child that loaded it said: prompt_tokens, largest_difference, kernel; None where DEST held
            this export already.
        on_disk: Of a quantized arm, what the copied files hold: packed share, bits a weight, codes; None for others,
            and where DEST held this export already.
    """

    folder: Path
    arm: str
    files: int
    n_bytes: int
    reloaded: dict[str, Any] | None
    on_disk: dict[str, Any] | None = None


def export(run_folder: Path, slug: str, dest: Path, *, home: Path, again: bool = False) -> Exported:
    """Copy an arm out of the store.

    An arm with an adapter on top has two parts: DEST/base and DEST/adapter.

    Args:
        run_folder: runs/<id>/.
        slug: The arm.
        dest: Folder to write; must not exist or be empty.
        home: QUENCH_HOME.
        again: DEST may hold this very export, which is then left as it is: a push that failed goes on from there.

    Raises:
        RecipeError: No such arm, it failed, its files are damaged or gone, or hold other than its scheme promises; DEST
            is not empty, the disk is too small.
        StepFailed: The copy does not load, or answers otherwise; nothing is left at DEST.
    """
    dest = dest.absolute()
    run = read_run(run_folder, home)
    arm = _find(run, slug)
    parts = list(parts_of(run, arm))
    if again and _is_there(dest, parts):
        return _exported(dest, slug, None)
    if problems := [*_check_dest(dest, parts), *_check_parts(parts)]:
        raise RecipeError(problems)
    path = run_folder / "report.json"
    report = read_json(path) if path.exists() else render(run_folder, home).json
    work = work_folder(dest)
    shutil.rmtree(work, ignore_errors=True)
    draft = work / "copy"
    try:
        for part in parts:
            _copy(part, draft / part.under, run)
        counted = _counted(run, arm, draft / parts[0].under, source=parts[0].source)
        served = serve_record(run, arm, parts)
        write(draft, served)
        (draft / "recipe.yaml").write_text(_recipe(run), encoding="utf-8")
        (draft / "README.md").write_text(card(provenance_of(run, arm), report, served), encoding="utf-8")
        say("loading the copy in plain transformers, and comparing its logits with the original's")
        reloaded = _reload(arm, parts, draft, work=work, home=home)
        if dest.exists():
            dest.rmdir()
        draft.rename(dest)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
        with contextlib.suppress(OSError):  # the log of a copy that did not load stays
            work.rmdir()
    shutil.rmtree(work, ignore_errors=True)
    return replace(_exported(dest, slug, reloaded), on_disk=counted)


def _exported(dest: Path, slug: str, reloaded: dict[str, Any] | None) -> Exported:
    files = [path for path in dest.rglob("*") if path.is_file()]
    size = sum(path.stat().st_size for path in files)
    return Exported(folder=dest, arm=slug, files=len(files), n_bytes=size, reloaded=reloaded)


def _is_there(dest: Path, parts: list[Part]) -> bool:
    """A finished export of the same artifacts; a folder gets its name only after it was loaded."""
    whole = all((dest / name).is_file() for name in ("README.md", "serve.json", "recipe.yaml"))
    return whole and all(
        (dest / part.under / name).is_file() and part.sha256.get(name) in (None, file_digest(dest / part.under / name))
        for part in parts
        for name in _names(part)
    )


# ---- refusing


def _find(run: Run, slug: str) -> RunArm:
    arm = named_arm(run, slug)
    if problem := unmade(run, arm) or _nothing_to_export(run, arm):
        raise problem.error()
    return arm


def _nothing_to_export(run: Run, arm: RunArm) -> Problem | None:
    """Why an arm of the run has no files that could be copied."""
    slug, where = arm.slug, str(run.folder)
    if arm.null is not None:
        return Problem(
            what=f"{slug} has no files of its own.",
            where=where,
            why=f"It is {arm.of}, computed in another way to show noise of arithmetic.",
            next=f"Export {arm.of}.",
        )
    if arm.of is not None:
        return Problem(
            what=f"{slug} has no files of its own.",
            where=where,
            why=f"It is {arm.of} with a KV cache whose storage was simulated; a server is told to do that when it "
            "starts.",
            next=f"Export {arm.of}; vLLM takes --kv-cache-dtype fp8.",
        )
    if arm.model is None and arm.adapter is None:
        return Problem(
            what=f"{slug} is a model from elsewhere." if arm.external else f"{slug} is the untouched base.",
            where=where,
            why="Nothing was made of it, so there is nothing to export.",
            next="Copy it from where it came from, or name another arm.",
        )
    return None


def _names(part: Part) -> list[str]:
    if part.sha256:
        return sorted(part.sha256)
    files = {path for pattern in (*MODEL_FILES, *TOKENIZER_FILES) for path in part.source.glob(pattern)}
    return sorted(str(path.relative_to(part.source)) for path in files if path.is_file())


def _check_dest(dest: Path, parts: list[Part]) -> Iterator[Problem]:
    yield from check_output(dest, word="DEST", inputs=[part.source for part in parts])
    files = [part.source / name for part in parts for name in _names(part)]
    size = sum(path.stat().st_size for path in files if path.is_file())
    yield from check_disk(dest, size, word="DEST", content="the copy")


def _check_parts(parts: list[Part]) -> Iterator[Problem]:
    for part in parts:
        missing = [name for name in _names(part) if not (part.source / name).is_file()]
        if missing:
            yield Problem(
                what=f"Files of the {part.name} are missing: {', '.join(missing)}.",
                where=str(part.source),
                why="The manifest names them.",
                next="quench run makes the artifact again.",
            )


# ---- copying


def _copy(part: Part, out: Path, run: Run) -> None:
    """Copy file by file, and compare what arrived with the manifest, or with what the run read of the base."""
    say(f"copying the {part.name} from {part.source}")
    for name in _names(part):
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(part.source / name, out / name)
        if part.sha256 and file_digest(out / name) != part.sha256[name]:
            raise _changed(part, f"{name} has another sha256 than its manifest says").error()
    if not part.sha256:
        copied = external_folder("base", out, patterns=MODEL_FILES, digests=Digests(out.parent))
        if copied.digest != run.raw["base"]["digest"]:
            raise _changed(part, "its files are not those that the run read").error()


def _changed(part: Part, how: str) -> Problem:
    return Problem(
        what=f"The {part.name} has changed.",
        where=str(part.source),
        why=f"{how[0].upper()}{how[1:]}: it is not what was evaluated.",
        next="Put the old files back, or run the recipe again.",
    )


def _counted(run: Run, arm: RunArm, folder: Path, *, source: Path) -> dict[str, Any] | None:
    """What the copied files of a quantized arm hold, read from them; None for an arm that is not quantized.

    The artifact may be older than the step's own check, and what leaves the store is what others serve.
    """
    if arm.quantizer is None:
        return None
    stored = on_disk.read(folder, arm.quantizer, bf16_headers(run, arm))
    record = json_object(folder / "quantize.json") or {}
    if problem := stored.problem(claimed={layer["name"] for layer in record.get("layers", ())}):
        raise replace(problem, where=str(source)).error()  # the copy is removed
    used = stored.codes_used()
    for note in stored.notes(used):
        say(f"note: {note}")
    return stored.record(used)


def _reload(arm: RunArm, parts: list[Part], draft: Path, *, work: Path, home: Path) -> dict[str, Any]:
    inputs = {part.name: _external(part.name, part.source) for part in parts}
    inputs["copy"] = _external("copy", draft)
    with Launcher() as launcher:
        context = Context(
            store=Store(work),
            launcher=launcher,
            leases=Leases(home),
            limits=Limits(device=resolve_device("auto"), threads=cpu_slots()),
        )
        step = reload.step(arm.slug, kind=arm.kind, inputs=inputs)
        loaded = run_step(step, {name: source.artifact for name, source in inputs.items()}, context)
    return loaded.artifact.manifest["result"]


def _external(name: str, path: Path) -> External:
    return External(name=name, path=path, digest=str(path), source=str(path))  # never looked up again


# ---- where it came from


def _recipe(run: Run) -> str:
    """The recipe as it was run: what was set in the file or by --set, without defaults."""
    values = recipe_of(run.folder).model_dump(mode="json", exclude_defaults=True)
    head = f"# Run {run.raw['id']}, overrides included; relative paths counted from the folder of its recipe.\n"
    return head + yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def command(args: argparse.Namespace) -> Output:
    """Copy, reload, push; exit code 1 where only the push failed.

    Raises:
        RecipeError: Words, run, arm, folder or repository that cannot be.
        StepFailed: What was copied does not load.
    """
    if len(args.words) not in (2, 3):
        raise _words_problem(args.words).error()
    *run, arm, dest = args.words
    if args.push:  # the hub's client takes half a second to import
        from tasks.runtime.hub import push

        push.check(args.push)
    home = find_home()
    exported = export(find_run(home, run[0] if run else None), arm, Path(dest), home=home, again=args.push is not None)
    answer: dict[str, Any] = {"ok": True, "arm": exported.arm, "folder": str(exported.folder), "files": exported.files}
    answer |= {"bytes": exported.n_bytes, "reloaded": exported.reloaded, "pushed": None}
    answer["on_disk"] = exported.on_disk
    loaded = "was there already"
    if result := exported.reloaded:
        difference = f"{result['largest_difference']:.1g}"
        loaded = f"loaded in plain transformers ({result['kernel']}), logits differ by {difference}"
    lines = [f"{exported.folder}: {exported.files} files, {exported.n_bytes / 1e6:.1f} MB; {loaded}"]
    if stored := exported.on_disk:
        lines.append(
            f"{stored['packed_share']:.1%} of the linear weights are packed, in {stored['bits_a_weight']:.2f} bits "
            f"each ({stored['promised_bits_a_weight']:.2f} promised)"
        )
    if args.push:
        from tasks.runtime.hub import push

        try:
            pushed = push.push(exported.folder, args.push)
        except RecipeError as error:
            if not args.json:
                say(f"error: {error}\n{exported.folder} is complete: only the push failed")
            return Output(json={**answer, **refusal(error.problems)}, text="", code=FAILED)
        answer["pushed"] = pushed._asdict()
        lines.append(f"{pushed.url} at commit {pushed.commit[:12]}{', new and private' if pushed.created else ''}")
    return Output(json=answer, text="\n".join(lines))


def _words_problem(words: Sequence[str]) -> Problem:
    return Problem(
        what=f"`quench export {' '.join(words)}` is not [RUN] ARM DEST.",
        where="quench export",
        why="It takes an arm and a folder, and a run before them where it is not the latest.",
        next="Write for example: quench export awq-w4-g128 out",
    )
