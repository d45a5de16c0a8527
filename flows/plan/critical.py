"""The critical path: the chain of steps that no machine, however large, can make at the same time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from flows.plan.lookup import Planned


class Chain(NamedTuple):
    """Steps, each of which waits for the one before it.

    Attributes:
        seconds: What they took before, together; None where one of the run's steps was never made here.
    """

    keys: list[str]
    seconds: float | None


def critical_path(planned: Sequence[Planned], took: Mapping[str, float]) -> Chain:
    """The longest chain of the steps that are to be made: in seconds where all are known, else in steps.

    Args:
        planned: In the order of the composition: what a step needs stands before it.
        took: Seconds of earlier ones, by key.
    """
    to_make = [step for step in planned if not step.hit]
    known = all(step.key in took for step in to_make)
    chains: dict[str, Chain] = {}
    for step in to_make:
        before = max((chains[key] for key in step.needs if key in chains), key=_length, default=Chain([], 0.0))
        chains[step.key] = Chain([*before.keys, step.key], _length(before) + (took[step.key] if known else 1.0))
    longest = max(chains.values(), key=_length, default=Chain([], 0.0))
    return longest if known else Chain(longest.keys, None)


def _length(chain: Chain) -> float:
    return chain.seconds or 0.0


def behind(planned: Sequence[Planned], took: Mapping[str, float]) -> dict[str, float]:
    """How long the longest chain is that begins with each step to make: who has the longest goes first."""
    to_make = [step for step in planned if not step.hit]
    known = all(step.key in took for step in to_make)
    lengths: dict[str, float] = {}
    for step in reversed(to_make):  # what waits for a step stands after it
        after = max((lengths[later.key] for later in to_make if step.key in later.needs), default=0.0)
        lengths[step.key] = after + (took[step.key] if known else 1.0)
    return lengths


def sentence(planned: Sequence[Planned], took: Mapping[str, float]) -> str:
    """The path in words; empty where nothing is to be made."""
    keys, seconds = critical_path(planned, took)
    if not keys:
        return ""
    work = sum(took[step.key] for step in planned if not step.hit) if seconds is not None else 0.0
    time = f" ({_time(seconds)} of {_time(work)} of work, as it took here before)" if seconds is not None else ""
    return f"longest chain: {' -> '.join(keys)}{time}"


def _time(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
