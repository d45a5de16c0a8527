"""`quench export`: an arm of a run as a folder of its own, real copies all of it, loaded again before it says done."""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

from flows.report.build import render
from flows.report.model_card import _provenance, card
from flows.results.artifacts import Part, parts_of, serve_record
from flows.results.read import Run, RunArm, RunStep, read_run
from flows.run.folder import find_run
from recipes.problem import Problem, RecipeError
from recipes.schema import recipe_of_run
from recipes.schemes.serve_file import write
from tasks import reload
from tasks.runtime.fingerprint import file_digest
from tasks.runtime.hub.ids import MODEL_FILES
from tasks.runtime.outside import work_folder
from tasks.runtime.pin import Digests, external_folder
from tasks.runtime.process.launch import Launcher
from tasks.runtime.process.leases import Leases, cpu_slots
from tasks.runtime.step import Context, External, Limits, resolve_device, run_step
from tasks.runtime.store.local import Store, find_home
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
    """

    folder: Path
    arm: str
    files: int
    n_bytes: int
    reloaded: dict[str, Any] | None


def export(
    run_folder: Path, slug: str, dest: Path, *, home: Path, say: Callable[[str], None], again: bool = False
) -> Exported:
    """Copy an arm out of the store.

    An arm with an adapter on top has two parts: DEST/base and DEST/adapter.

    Args:
        run_folder: runs/<id>/.
        slug: The arm.
        dest: Folder to write; must not exist or be empty.
        home: QUENCH_HOME.
        say: Gets what is being done, a line a time.
        again: DEST may hold this very export, which is then left as it is: a push that failed goes on from there.

    Raises:
        RecipeError: No such arm, it failed, its files are damaged or gone, DEST is not empty, the disk is too small.
        StepFailed: The copy does not load, or answers otherwise; nothing is left at DEST.
    """
    dest = dest.absolute()
    run = read_run(run_folder, home)
    arm = _find(run, slug)
    parts = list(parts_of(run, arm))
    if again and _is_there(dest, parts):
        return _exported(dest, slug, None)
    if problems := [*_check_dest(dest, parts), *_check_parts(run, parts)]:
        raise RecipeError(problems)
    report = json.loads((run_folder / "report.json").read_text(encoding="utf-8")) if _reported(run_folder) else None
    report = report or render(run_folder, home).json
    work = work_folder(dest)
    shutil.rmtree(work, ignore_errors=True)
    draft = work / "copy"
    try:
        for part in parts:
            _copy(part, draft / part.under, run, say)
        served = serve_record(run, arm, parts)
        write(draft, served)
        (draft / "recipe.yaml").write_text(_recipe(run), encoding="utf-8")
        (draft / "README.md").write_text(card(_provenance(run, arm), report, served), encoding="utf-8")
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
    return _exported(dest, slug, reloaded)


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


def _reported(run_folder: Path) -> bool:
    return (run_folder / "report.json").exists()


# ---- refusing


def _refused(what: str, where: str, why: str, next: str) -> RecipeError:
    return Problem(what=what, where=where, why=why, next=next).error()


def _find(run: Run, slug: str) -> RunArm:
    arms = {arm.slug: arm for arm in run.arms}
    arm = arms.get(slug)
    if arm is None:
        near = get_close_matches(slug, arms, n=1)
        raise _refused(
            f"The run has no arm {slug}.",
            str(run.folder),
            f"It has {', '.join(arms) or 'none'}.",
            f"Did you mean {near[0]}?" if near else "Name one of these.",
        )
    if arm.unavailable:
        raise _refused(f"{slug} cannot be.", str(run.folder), f"{arm.unavailable}.", "Name another arm.")
    if arm.of is not None:
        raise _refused(
            f"{slug} has no files of its own.",
            str(run.folder),
            f"It is {arm.of} with a KV cache whose storage was simulated; a server is told to do that when it starts.",
            f"Export {arm.of}; vLLM takes --kv-cache-dtype fp8.",
        )
    if arm.model is None and arm.adapter is None:
        raise _refused(
            f"{slug} is a model from elsewhere." if arm.external else f"{slug} is the untouched base.",
            str(run.folder),
            "Nothing was made of it, so there is nothing to export.",
            "Copy it from where it came from, or name another arm.",
        )
    for step in _behind(run, arm):
        if step is None or not step.ok:
            why = step.trouble if step else "the run ended before it was made"
            raise _refused(f"{slug} was not made.", str(run.folder), f"{why}.", "Mend that, and quench run it again.")
    return arm


def _behind(run: Run, arm: RunArm) -> list[RunStep | None]:
    return [run.step(key) for key in (arm.model, arm.adapter) if key is not None]


def _names(part: Part) -> list[str]:
    if part.sha256:
        return sorted(part.sha256)
    found = {path for pattern in (*MODEL_FILES, *TOKENIZER_FILES) for path in part.source.glob(pattern)}
    return sorted(str(path.relative_to(part.source)) for path in found if path.is_file())


def _check_dest(dest: Path, parts: list[Part]) -> Iterator[Problem]:
    if dest.exists() and (not dest.is_dir() or any(dest.iterdir())):
        yield Problem(
            what="DEST is not an empty folder.",
            where=str(dest),
            why="Nothing is written over: what is there may be wanted.",
            next="Name another folder, or remove this one.",
        )
    for part in parts:
        if dest.resolve().is_relative_to(part.source.resolve()):
            yield Problem(
                what="DEST lies inside of what is exported.",
                where=str(dest),
                why=f"{part.source} is only read.",
                next="Name a folder outside of it.",
            )
    size = sum((part.source / name).stat().st_size for part in parts for name in _names(part) if _there(part, name))
    there = next(folder for folder in dest.parents if folder.exists())
    free = shutil.disk_usage(there).free
    if free < size:
        yield Problem(
            what=f"The disk has {free / 1e9:.1f} GB free, the copy takes {size / 1e9:.1f} GB.",
            where=str(there),
            why="An export is a real copy, without links into the store.",
            next="Free space, or name a DEST on another disk.",
        )


def _there(part: Part, name: str) -> bool:
    return (part.source / name).is_file()


def _check_parts(run: Run, parts: list[Part]) -> Iterator[Problem]:
    for part in parts:
        missing = [name for name in _names(part) if not _there(part, name)]
        if missing:
            yield Problem(
                what=f"Files of the {part.name} are missing: {', '.join(missing)}.",
                where=str(part.source),
                why="The manifest names them.",
                next="quench run makes the artifact again.",
            )


# ---- copying


def _copy(part: Part, out: Path, run: Run, say: Callable[[str], None]) -> None:
    """Copy file by file, and compare what arrived with the manifest, or with what the run read of the base."""
    say(f"copying the {part.name} from {part.source}")
    for name in _names(part):
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(part.source / name, out / name)
        if part.sha256 and file_digest(out / name) != part.sha256[name]:
            raise _changed(part, f"{name} has another sha256 than its manifest says")
    if not part.sha256:
        copied = external_folder("base", out, patterns=MODEL_FILES, digests=Digests(out.parent))
        if copied.digest != run.raw["base"]["digest"]:
            raise _changed(part, "its files are not those that the run read")


def _changed(part: Part, how: str) -> RecipeError:
    return _refused(
        f"The {part.name} has changed.",
        str(part.source),
        f"{how[0].upper()}{how[1:]}: it is not what was evaluated.",
        "Put the old files back, or run the recipe again.",
    )


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
        made = run_step(step, {name: one.artifact for name, one in inputs.items()}, context)
    return made.artifact.manifest["result"]


def _external(name: str, path: Path) -> External:
    return External(name=name, path=path, digest=str(path), source=str(path))  # never looked up again


# ---- where it came from


def _recipe(run: Run) -> str:
    """The recipe as it was run: what was set in the file or by --set, without defaults."""
    asked = recipe_of_run(run.recipe).model_dump(mode="json", exclude_defaults=True)
    head = f"# Run {run.raw['id']}, overrides included; relative paths counted from the folder of its recipe.\n"
    return head + yaml.safe_dump(asked, sort_keys=False, allow_unicode=True)


def command(args: argparse.Namespace) -> int:
    """Copy, reload, say so, push; exit code 1 where only the push failed.

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
    made = export(
        find_run(home, run[0] if run else None),
        arm,
        Path(dest),
        home=home,
        say=lambda text: print(text, file=sys.stderr),
        again=args.push is not None,
    )
    told: dict[str, Any] = {"ok": True, "arm": made.arm, "folder": str(made.folder), "files": made.files}
    told |= {"bytes": made.n_bytes, "reloaded": made.reloaded, "pushed": None}
    loaded = "was there already"
    if said := made.reloaded:
        loaded = f"loaded in plain transformers ({said['kernel']}), logits differ by {said['largest_difference']:.1g}"
    lines = [f"{made.folder}: {made.files} files, {made.n_bytes / 1e6:.1f} MB; {loaded}"]
    if args.push:
        from tasks.runtime.hub import push

        try:
            pushed = push.push(made.folder, args.push)
        except RecipeError as error:
            if args.json:
                problems = [one.as_dict() for one in error.problems]
                print(json.dumps({**told, "ok": False, "problems": problems}, indent=2))
            else:
                print(f"error: {error}\n{made.folder} is complete: only the push failed", file=sys.stderr)
            return 1
        told["pushed"] = pushed._asdict()
        lines.append(f"{pushed.url} at commit {pushed.commit[:12]}{', new and private' if pushed.created else ''}")
    print(json.dumps(told, indent=2, default=str) if args.json else "\n".join(lines))
    return 0


def _words_problem(words: Sequence[str]) -> Problem:
    return Problem(
        what=f"`quench export {' '.join(words)}` is not [RUN] ARM DEST.",
        where="quench export",
        why="It takes an arm and a folder, and a run before them where it is not the latest.",
        next="Write for example: quench export awq-w4-g128 out",
    )
