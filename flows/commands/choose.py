"""`quench choose`: the arm to serve on a card of so many GiB, or on several, and what it is compared with."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from math import inf
from typing import Any, NamedTuple

from rich import box
from rich.console import Console
from rich.table import Table

from flows.commands.terminal import DONE, FAILED, Output
from flows.plan.sizes import GIB
from flows.report.fit import FIT_RULE, card_text
from flows.results.card_fit import (
    FREE_SHARE,
    Refused,
    Workload,
    allowance_bytes,
    best,
    cache_of,
    cards_of,
    engine_of,
    fits,
    front,
    headers_of,
)
from flows.results.read import Run, read_run
from flows.run.folder import find_run
from recipes.models.headers import Headers
from recipes.problem import Problem
from tasks.runtime.store.local import find_home, read_json


def command(args: argparse.Namespace) -> Output:
    """The best arm, the front and what does not fit; exit code 1 where nothing fits.

    Raises:
        RecipeError: No such run or no report; numbers that mean nothing; a cache that config.json does not describe.
    """
    cards, engine = args.tensor_parallel, args.engine
    if not 0 < args.vram < inf or min(args.context, args.batch, 1 if cards is None else cards) < 1:
        raise Problem(
            what="--vram, --context, --batch and --tensor-parallel have to be above zero.",
            where="quench choose",
            why="They are GiB of each card, tokens of prompt and answer, sequences at once, and cards.",
            next="Write for example: quench choose --vram 24 --context 8192 --batch 8",
        ).error()
    home = find_home()
    run = read_run(find_run(home, args.run), home)
    if cards is not None:
        engine = engine or engine_of(run)  # what the run noted was for its own
    cards = cards or cards_of(run, engine)
    if cards > 1 and (engine or "vllm") != "vllm":
        raise _not_split(cards, engine).error()
    choice = chosen(run, vram_gib=args.vram, work=Workload(args.context, args.batch, cards), engine=engine)
    return Output(json=choice, text=lambda console: _print(choice, console), code=DONE if choice["best"] else FAILED)


def _not_split(cards: int, engine: str) -> Problem:
    name = "the recipe names no engine" if engine == "none" else f"the engine is {engine}"
    return Problem(
        what=f"Nobody is known to split a model over {cards} cards here.",
        where="quench choose --tensor-parallel",
        why=f"Heads, layers and groups are split as vLLM does it, and {name}.",
        next=f"quench choose --tensor-parallel {cards} --engine vllm, with the rest as it was.",
    )


def chosen(run: Run, *, vram_gib: float, work: Workload, engine: str | None) -> dict[str, Any]:
    """What `--json` prints."""
    headers, figures = _known(run, work)
    try:
        arms, cache = fits(run, figures, work, headers, engine), cache_of(headers, ranks=work.tensor_parallel)
    except Refused as error:
        raise Problem(
            what="The KV cache of this model cannot be computed.",
            where=str(headers.folder / "config.json"),
            why=f"{error}.",
            next="Start the server once and read what it reserves.",
        ).error() from None
    first, ahead = best(arms, vram_gib), front(arms)
    return {
        "run": run.raw["id"],
        "vram_gib": vram_gib,
        **work._asdict(),
        "engine": engine or engine_of(run),
        "best": first.arm if first else None,
        "rule": FIT_RULE,
        "free_share": FREE_SHARE,
        "confirmed_on_gpu": False,  # no row of docs/results has held these sums against a card
        "allowance_bytes": allowance_bytes(headers, work),
        "arms": [
            {
                **vars(arm),
                "cache_bytes": cache.size(arm.cache, context=work.context, batch=work.batch),
                "fits": arm.fits(vram_gib),
                "on_front": arm.arm in ahead,
            }
            for arm in arms
        ],
    }


class _Known(NamedTuple):
    headers: Headers
    figures: dict[str, dict[str, Any]]


def _known(run: Run, work: Workload) -> _Known:
    """The headers of a run's model, and size, task score and KL of its arms.

    Raises:
        RecipeError: The run does not have them any more, or the model's context is too short.
    """
    headers = headers_of(run)
    path = run.folder / "report.json"
    if headers is None or not path.exists():
        missing = "neither its base nor a merged model is there any more" if path.exists() else "it has no report"
        raise Problem(
            what="The run says too little to choose.",
            where=str(run.folder),
            why=f"{missing}.",
            next="quench run its recipe again.",
        ).error()
    limit = headers.max_positions
    if limit is not None and work.context > limit:
        raise Problem(
            what=f"--context is {work.context} tokens; the base ends at {limit}.",
            where="quench choose",
            why="config.json names the longest context.",
            next=f"Write --context {limit} or less.",
        ).error()
    figures = {
        slug: {name: arm["metrics"][name]["value"] for name in ("size_bytes", "task", "kl_mean")}
        for slug, arm in read_json(path)["arms"].items()
    }
    return _Known(headers, figures)


def _print(choice: Mapping[str, Any], console: Console) -> None:
    cards = choice["tensor_parallel"]
    of_each = "the card" if cards == 1 else f"each of {cards} cards"
    work = f"{choice['batch']} x {choice['context']:,} tokens on {card_text(choice)}"
    table = Table(title=f"run {choice['run']}: {work}", title_justify="left", box=box.SIMPLE_HEAD)
    for name in ("arm", "weights", "KV cache", "needs", "KL", "task %", ""):
        table.add_column(name, justify="left" if name in ("arm", "") else "right", no_wrap=name != "")
    for arm in sorted(choice["arms"], key=_order):
        style = "bold" if arm["arm"] == choice["best"] else "" if arm["fits"] else "dim"
        table.add_row(*_cells(arm, best=choice["best"]), style=style)
    console.print(table)
    console.print(f"Best: {choice['best']} ({FIT_RULE})." if choice["best"] else f"No arm of this run fits {work}.")
    weights = "weights as they are in the files, KV cache" if cards == 1 else f"on {of_each} its share of both"
    console.print(
        f"Needs are GiB: {weights}, {choice['allowance_bytes'] / GIB:.2f} for "
        f"context, activations and logits; {100 * choice['free_share']:.0f} % of {of_each} stays free. "
        "* on the Pareto front of needs and KL."
    )
    for text in dict.fromkeys(arm["slower"] for arm in choice["arms"] if arm["slower"]):
        console.print(f"Slower: {text}")
    console.print(f"Computed, not measured: no GPU has confirmed it{'' if cards == 1 else f' over {cards} cards'}.")


def _order(arm: Mapping[str, Any]) -> tuple[bool, float]:
    return arm["refused"] is not None, arm["needed"] or float("inf")


def _cells(arm: Mapping[str, Any], *, best: str | None) -> Iterator[str]:
    yield f"{arm['arm']}{' *' if arm['on_front'] else ''}"
    for size in (arm["weights"], arm["cache_bytes"], arm["needed"]):
        yield "–" if size is None else f"{size / GIB:.2f}"
    yield "–" if arm["kl_mean"] is None else f"{arm['kl_mean']:.2g}"
    yield "–" if arm["task"] is None else f"{100 * arm['task']:.1f}"
    if arm["refused"]:
        yield arm["refused"]
    else:
        yield "best" if arm["arm"] == best else "" if arm["fits"] else "too large"
