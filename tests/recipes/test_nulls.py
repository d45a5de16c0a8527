"""Which null arms a recipe has, where, and why not."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from recipes.arms import FLOOR, Arm, arms
from recipes.nulls import Machine, other_batch, other_threads
from recipes.schema import Recipe

SCHEMES = [f"{method}-w{bits}-g{group}" for method in ("rtn", "gptq") for bits in (2, 3, 4, 8) for group in (32, 64)]
MANY = len(SCHEMES)
CPU, GPU = Machine(device="cpu", threads=1, slots=2), Machine(device="cuda", threads=4, slots=16)


def recipe(*, schemes: int, null_arms: Any = "auto", batch: int = 16, length: int = 2048) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "test",
            "model": {"base": "base"},
            "data": {"path": "rows.jsonl", "max_length": length},
            "quantize": {"schemes": SCHEMES[:schemes]},
            "evaluate": {"null_arms": null_arms, "batch_size": batch},
        }
    )


def nulls(wanted: Recipe, machine: Machine) -> dict[str, str | None]:
    """Kind -> why it is not made."""
    found = [arm for arm in arms(wanted, machine=machine) if arm.null]
    assert all(arm.slug == f"{FLOOR}.null-{arm.null}" for arm in found)
    return {str(arm.null): arm.unavailable for arm in found}


def made(wanted: Recipe, machine: Machine) -> list[str]:
    return [kind for kind, why in nulls(wanted, machine).items() if why is None]


def test_a_null_arm_has_the_files_of_merged_dequantized_and_is_no_control() -> None:
    (null,) = (arm for arm in arms(recipe(schemes=2), machine=CPU) if arm.null == "batch")
    assert null == Arm(slug=f"{FLOOR}.null-batch", kind="bf16", merge_base="dequantized", null="batch", of=FLOOR)
    assert not null.is_control


@pytest.mark.parametrize(
    ("schemes", "machine", "expected"),
    [
        (1, CPU, []),  # 6 others: one null arm would be a seventh of 7
        (2, CPU, ["batch"]),
        (8, CPU, ["batch"]),
        (9, CPU, ["batch"]),  # two threads in place of one cost two arms
        (9, Machine(threads=2, slots=2), ["batch", "threads"]),
        (MANY, CPU, ["batch", "threads"]),
        (9, GPU, ["batch"]),  # rows of 2,048 tokens: eager attention's scores are too many
        (9, Machine(), ["batch"]),  # one core
    ],
)
def test_auto_keeps_to_an_eighth_of_all_arms(schemes: int, machine: Machine, expected: list[str]) -> None:
    wanted = recipe(schemes=schemes)
    assert made(wanted, machine) == expected
    every = [arm for arm in arms(wanted, machine=machine) if arm.unavailable is None]
    assert len(expected) <= len(every) / 8
    assert set(nulls(wanted, machine)) == {"batch", "threads" if machine.device == "cpu" else "attention"}


def test_auto_takes_attention_where_its_scores_are_few() -> None:
    assert made(recipe(schemes=9, length=320), GPU) == ["batch", "attention"]


def test_what_is_left_out_says_why_and_how_to_have_it() -> None:
    few = nulls(recipe(schemes=1), CPU)
    assert "beside 6 other arms" in str(few["batch"]) and "an eighth of the evaluation" in str(few["batch"])
    assert "`evaluate.null_arms: [threads]` makes it" in str(few["threads"])
    assert "2,048 tokens" in str(nulls(recipe(schemes=9), GPU)["attention"])
    assert "one CPU slot" in str(nulls(recipe(schemes=9), Machine())["threads"])


def test_a_list_is_what_is_made_whatever_it_costs() -> None:
    assert made(recipe(schemes=1, null_arms=["threads", "batch"]), CPU) == ["batch", "threads"]
    assert made(recipe(schemes=1, null_arms=["attention"]), CPU) == ["attention"]
    assert nulls(recipe(schemes=9, null_arms=[]), CPU) == {}
    assert "changes no sum" in str(nulls(recipe(schemes=1, null_arms=["threads"]), GPU)["threads"])
    with pytest.raises(ValidationError, match="null_arms"):
        recipe(schemes=1, null_arms=["seed"])


def test_the_other_size_is_always_another() -> None:
    assert [other_batch(size) for size in (1, 2, 3, 16, 50)] == [2, 1, 1, 8, 25]
    machines = [Machine(threads=threads, slots=8) for threads in (1, 2, 3, 8)]
    assert [other_threads(machine) for machine in machines] == [2, 1, 1, 4]
    assert other_threads(Machine(threads=1, slots=1)) is None
