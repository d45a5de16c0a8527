"""`quench champion [NAME]`: what runs in production, for other tools. Exit code 1 where there is nothing to take.

Of a name without a champion nothing is printed on stdout, and the reason on stderr. Of a champion whose files are not
what was promoted the record is printed, the trouble on stderr, and the exit code is 1, too.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from flows.commands.terminal import DONE, FAILED, Output, say, warn
from flows.promotion.journal import Journal, Promotion, challenger, models, with_champion
from flows.promotion.present import Present, present
from flows.reach import JOURNAL
from flows.results.metrics import METRICS, interval_text, value_text
from recipes.problem import Problem
from recipes.read.load import load
from tasks.runtime.store.local import find_home

ALIAS = "@champion"  # as `quench serve` and the registry write it
RECIPES = (".yaml", ".yml")  # no model name has a dot


def command(args: argparse.Namespace) -> Output:
    """Show one champion, or list all.

    Raises:
        RecipeError: promotions.jsonl is damaged, or the recipe that was named cannot be read.
    """
    home = find_home()
    return listed(home) if args.name is None else shown(home, model_of(args.name))


def model_of(word: str) -> str:
    """The model name that was typed, or that a recipe has.

    Raises:
        RecipeError: The recipe cannot be read.
    """
    path = Path(word)
    return load(path).recipe.model_name if path.suffix in RECIPES else word.removesuffix(ALIAS)


def shown(home: Path, model: str) -> Output:
    """The champion of a model name."""
    now = present(home, model)
    if now is None:
        say(f"error: {_none(home, model)}")
        return Output(json=None, text="", code=FAILED)
    _warn_unread(home, model, now.unread)
    if now.problem:
        warn([now.problem])
    return Output(json=now.as_dict(), text="\n".join(_lines(now)), code=FAILED if now.problem else DONE)


def listed(home: Path) -> Output:
    """Every model name that something was decided about, with its champion."""
    every = {model: present(home, model) for model in models(home)}
    if not any(every.values()):
        say(f"error: {_none(home, None)}")
        return Output(json=None, text="", code=FAILED)
    for model, now in every.items():
        _warn_unread(home, model, now.unread if now else 0)
    warn([now.problem for now in every.values() if now and now.problem])
    known = [{"model": model, "champion": now and now.as_dict()} for model, now in every.items()]
    return Output(json=known, text="\n".join(_row(model, now) for model, now in every.items()))


def _row(model: str, now: Present | None) -> str:
    if now is None:
        return f"{model:<40} has no champion"
    gone = "  its files are not what was promoted" if now.problem else ""
    return f"{model:<40} version {now.line.version:<4} {now.line.arm:<32} since {now.line.at}{gone}"


def _lines(now: Present) -> Iterator[str]:
    """What a person wants to know of a champion."""
    line, judged = now.line, now.judged
    yield f"{line.model}: version {line.version} is champion"
    yield f"  since      {line.at} ({_how(now)})"
    yield f"  arm        {line.arm}, scheme {now.scheme}" if now.scheme else f"  arm        {line.arm}, {line.kind}"
    yield f"  path       {now.files}"
    yield from [f"  bucket     {now.bucket}"] if now.bucket else []
    yield f"  decided    {judged.outcome} in run {judged.run}, {judged.at}"
    for name, cell in now.figures.items():
        text = value_text(name, cell.value, cell.ci95 and list(cell.ci95), unit=True)
        ends = interval_text(name, cell.value, cell.ci95 and list(cell.ci95)) or f"no interval: {cell.reason}"
        yield f"  {METRICS[name].label:<10} {text} {ends}, n {cell.n:,}" if cell.n else f"  {name:<10} {cell.reason}"
    yield from [f"  figures    none: {now.no_figures}"] if now.no_figures else []
    yield from (f"  check      {check['text']}" for check in judged.checks if check.get("domain") is None)
    if later := now.challenger:
        yield f"  later      version {later.version} was judged {later.outcome} and not promoted, {later.at}"


def _how(now: Present) -> str:
    before = f"instead of version {now.line.champion}" if now.line.champion else "the first one"
    taken = f"; taken away: version {', '.join(map(str, now.withdrawn))}" if now.withdrawn else ""
    return f"{now.line.event}, {before}{taken}"


def _warn_unread(home: Path, model: str, unread: int) -> None:
    if unread:
        warn([_unread(home, model, unread)])


def _unread(home: Path, model: str, unread: int) -> Problem:
    return Problem(
        what=f"{unread} {'line' if unread == 1 else 'lines'} about {model} cannot be read here.",
        where=str(home / JOURNAL),
        why="Another version of Quench wrote them, with fields or events that this one does not know; a later decision "
        "may be among them.",
        next="Ask with the newest Quench that works on this home.",
    )


def _none(home: Path, model: str | None) -> Problem:
    every, able = models(home), with_champion(home)
    if model in every:
        journal = Journal(home, model)
        why = _judged(challenger(journal.lines()), journal.unread())
    elif able:
        why = f"Nothing was decided about this name. Champions have {', '.join(able)}."
    else:
        why = "Nothing was promoted on this QUENCH_HOME."
    return Problem(
        what=f"{model} has no champion." if model else "No model has a champion.",
        where=str(home / JOURNAL),
        why=why,
        next=f"quench champion {able[-1]}"
        if able and model not in every
        else "quench promote puts a run's candidate through the gate. Is it another QUENCH_HOME?",
    )


def _judged(latest: Promotion | None, unread: int) -> str:
    if unread:
        return f"{unread} of its lines cannot be read: another version of Quench wrote them."
    assert latest is not None  # something was decided about it, and nothing was promoted
    return f"What was judged last did not pass: version {latest.version}, {latest.outcome}, in run {latest.run}."
