"""`quench export [RUN] ARM DEST [--push ORG/NAME]`: the command around flows.export and the hub."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flows.export import export
from flows.runs import find_run
from recipes.problem import Problem, RecipeError
from tasks.runtime.store import find_home


def command(args: argparse.Namespace) -> int:
    """Copy, reload, say so, push; exit code 1 where only the push failed.

    Raises:
        RecipeError: Words, run, arm, folder or repository that cannot be.
        StepFailed: What was copied does not load.
    """
    if len(args.words) not in (2, 3):
        raise RecipeError([_words_problem(args.words)])
    *run, arm, dest = args.words
    if args.push:  # the hub's client takes half a second to import
        from tasks.runtime import hub_push

        hub_push.check(args.push)
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
        from tasks.runtime import hub_push

        try:
            pushed = hub_push.push(made.folder, args.push)
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
