"""`quench choose`: the arm to serve on a card of so many GiB, and what it is compared with."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from flows.plan.memory import GIB
from flows.report.text import FIT_RULE
from flows.results.card_fit import (
    FREE_SHARE,
    Refused,
    Workload,
    allowance_bytes,
    best,
    cache_of,
    fits,
    front,
    headers_of,
)
from flows.results.read import read_run
from flows.run.folder import find_run
from recipes.problem import Problem, RecipeError
from tasks.runtime.store.local import find_home


def command(args: argparse.Namespace) -> int:
    """Print the best arm, the front and what does not fit; exit code 1 where nothing fits.

    Raises:
        RecipeError: No such run or no report; numbers that mean nothing; a cache that config.json does not describe.
    """
    if args.vram <= 0 or args.context < 1 or args.batch < 1:
        raise _refused(
            "--vram, --context and --batch have to be above zero.",
            "quench choose",
            "They are GiB, tokens of prompt and answer, and sequences at once.",
            "Write for example: quench choose --vram 24 --context 8192 --batch 8",
        )
    home = find_home()
    folder = find_run(home, args.run)
    made = chosen(folder, home, vram_gib=args.vram, work=Workload(args.context, args.batch), engine=args.engine)
    if args.json:
        print(json.dumps(made, indent=2))
    else:
        _print(made, Console())
    return 0 if made["best"] else 1


def chosen(folder: Path, home: Path, *, vram_gib: float, work: Workload, engine: str | None) -> dict[str, Any]:
    """What `--json` prints."""
    run = read_run(folder, home)
    headers = headers_of(run)
    path = folder / "report.json"
    if headers is None or not path.exists():
        missing = "neither its base nor a merged model is there any more" if path.exists() else "it has no report"
        raise _refused("The run says too little to choose.", str(folder), f"{missing}.", "quench run its recipe again.")
    limit = headers.max_positions
    if limit is not None and work.context > limit:
        raise _refused(
            f"--context is {work.context} tokens; the base ends at {limit}.",
            "quench choose",
            "config.json names the longest context.",
            f"Write --context {limit} or less.",
        )
    arms = json.loads(path.read_text(encoding="utf-8"))["arms"]
    figures = {
        slug: {name: one["metrics"][name]["value"] for name in ("size_bytes", "task", "kl_mean")}
        for slug, one in arms.items()
    }
    try:
        every, cache = fits(run, figures, work, headers, engine), cache_of(headers)
    except Refused as error:
        raise _refused(
            "The KV cache of this model cannot be computed.",
            str(headers.folder / "config.json"),
            f"{error}.",
            "Start the server once and read what it reserves.",
        ) from None
    found, ahead = best(every, vram_gib), front(every)
    return {
        "run": run.raw["id"],
        "vram_gib": vram_gib,
        **work._asdict(),
        "engine": engine or (run.recipe.get("serve") or {}).get("engine", "none"),
        "best": found.arm if found else None,
        "rule": FIT_RULE,
        "free_share": FREE_SHARE,
        "allowance_bytes": allowance_bytes(headers, work),
        "arms": [
            {
                **vars(one),
                "cache_bytes": cache.size(one.cache, context=work.context, batch=work.batch),
                "fits": one.fits(vram_gib),
                "on_front": one.arm in ahead,
            }
            for one in every
        ],
    }


def _refused(what: str, where: str, why: str, next: str) -> RecipeError:
    return Problem(what=what, where=where, why=why, next=next).error()


def _print(made: Mapping[str, Any], console: Console) -> None:
    work = f"{made['batch']} x {made['context']:,} tokens on {made['vram_gib']:g} GiB"
    table = Table(title=f"run {made['run']}: {work}", title_justify="left", box=box.SIMPLE_HEAD)
    for name in ("arm", "weights", "KV cache", "needs", "KL", "task %", ""):
        table.add_column(name, justify="left" if name in ("arm", "") else "right", no_wrap=name != "")
    for one in sorted(made["arms"], key=_order):
        style = "bold" if one["arm"] == made["best"] else "" if one["fits"] else "dim"
        table.add_row(*_row(one, made), style=style)
    console.print(table)
    said = f"Best: {made['best']} ({FIT_RULE})." if made["best"] else f"No arm of this run fits {work}."
    console.print(said)
    console.print(
        f"Needs are GiB: weights as they are in the files, KV cache, {made['allowance_bytes'] / GIB:.2f} for context, "
        f"activations and logits; {100 * made['free_share']:.0f} % of the card stays free. "
        "* on the Pareto front of needs and KL."
    )


def _order(one: Mapping[str, Any]) -> tuple[bool, float]:
    return one["refused"] is not None, one["needed"] or float("inf")


def _row(one: Mapping[str, Any], made: Mapping[str, Any]) -> Iterator[str]:
    yield f"{one['arm']}{' *' if one['on_front'] else ''}"
    for value in (one["weights"], one["cache_bytes"], one["needed"]):
        yield "–" if value is None else f"{value / GIB:.2f}"
    yield "–" if one["kl_mean"] is None else f"{one['kl_mean']:.2g}"
    yield "–" if one["task"] is None else f"{100 * one['task']:.1f}"
    if one["refused"]:
        yield one["refused"]
    else:
        yield "best" if one["arm"] == made["best"] else "" if one["fits"] else "too large"
