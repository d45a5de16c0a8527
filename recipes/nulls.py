"""Null arms: the bytes of merged-dequantized, computed in another way. What they differ by is noise of arithmetic.

Sums in bf16 depend on their order, and the order on the shape of a batch, on how many threads share a product, and on
the kernel. No model is better or worse for it, so a difference of that size between two arms says nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from recipes.schema import Recipe

Null = Literal["batch", "threads", "attention"]
KINDS: tuple[Null, ...] = ("batch", "threads", "attention")  # the cheapest first
# Null arms are at most an eighth of all arms that are evaluated. Each costs about what an arm costs, so the number of
# arms decides. The default recipe has seven, five of its own and two schemes: with one null arm, that is an eighth.
OTHERS_FOR_EACH = 7
# Eager attention keeps the scores of a whole batch in one layer: the bf16 product, the same in fp32, and the softmax.
SCORE_BYTES = 10
HEADS = 64  # of models up to 70B: Llama 3 70B has 64, smaller ones have fewer
MOST_SCORE_GIB = 1.0  # what no card misses that the model itself fits; more has to be asked for by name


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What null arms depend on beside the recipe.

    Attributes:
        device: `cpu` or `cuda`.
        threads: CPU threads of a step.
        slots: CPU slots of the machine.
    """

    device: str = "cpu"
    threads: int = 1
    slots: int = 1


@dataclass(frozen=True, kw_only=True)
class NullArm:
    """One null arm: what is other about it, and why it is not made; None where it is."""

    kind: Null
    unavailable: str | None


def null_arms(recipe: Recipe, *, others: int, machine: Machine) -> Iterator[NullArm]:
    """The null arms of a recipe: those that it names, or the cheapest ones within the share.

    Args:
        recipe: The recipe.
        others: Arms that are evaluated beside them.
        machine: Where they are evaluated.
    """
    named = recipe.evaluate.null_arms
    left = others // OTHERS_FOR_EACH
    for kind in KINDS:
        impossible = _impossible(kind, machine)
        if named != "auto":
            if kind in named:
                yield NullArm(kind=kind, unavailable=impossible)
            continue
        if kind == ("attention" if machine.device == "cpu" else "threads"):
            continue  # the other device's
        cost = _cost(kind, machine)
        why = impossible or _too_dear(kind, recipe, others=others, fits=cost <= left)
        left -= cost if why is None else 0
        yield NullArm(kind=kind, unavailable=why)


def other_batch(size: int) -> int:
    """Half the batch size: the shapes of all products change, and it fits wherever the arm itself fitted."""
    return size // 2 or 2


def other_threads(machine: Machine) -> int | None:
    """Half the threads of a step; two where it has one; None where the machine has one core."""
    if machine.threads > 1:
        return machine.threads // 2
    return 2 if machine.slots > 1 else None


def score_gib(rows: int, tokens: int, *, heads: int = HEADS) -> float:
    """Memory of eager attention's scores in one layer, GiB."""
    return SCORE_BYTES * heads * rows * tokens**2 / (1 << 30)


def _impossible(kind: Null, machine: Machine) -> str | None:
    if kind != "threads":
        return None
    if machine.device != "cpu":
        return "on a GPU the number of CPU threads changes no sum"
    return None if other_threads(machine) else "this machine has one CPU slot, so there is no other number of threads"


def _cost(kind: Null, machine: Machine) -> int:
    """What it costs, in arms. Two threads in place of one take two slots, and a small model gets hardly faster."""
    return 2 if kind == "threads" and machine.threads == 1 else 1


def _too_dear(kind: Null, recipe: Recipe, *, others: int, fits: bool) -> str | None:
    """Why `auto` leaves it out; `fits`: it keeps to the share that is left."""
    name = f"`evaluate.null_arms: [{kind}]` makes it"
    if not fits:
        return f"beside {others} other arms it would take null arms beyond an eighth of the evaluation; {name}"
    longest = recipe.data.max_length
    if kind == "attention" and score_gib(recipe.evaluate.batch_size, longest) > MOST_SCORE_GIB:
        return (
            f"eager attention keeps the scores of {recipe.evaluate.batch_size} rows of up to {longest:,} tokens at "
            f"once, which is more than {MOST_SCORE_GIB:g} GiB with {HEADS} heads; {name}"
        )
    return None
