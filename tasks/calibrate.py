"""calibrate: dataset -> calibset (rows of train, stratified, seeded, packed, with fixed token ids)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from recipes.arms import Calibration
from recipes.schema import TOKENS_PER_INPUT, Recipe
from tasks.runtime.step import External, Step, present


def step(recipe: Recipe, *, dataset: Step, largest_in_features: int) -> Step:
    """The calibration set. Fewer than 4 tokens per input feature would leave the widest Hessian badly estimated."""
    settings = recipe.calibrate.model_dump(exclude={"controls", "general"})
    return Step(
        stage="calibrate",
        slug=recipe.name,
        entry="tasks.jobs.calibrate:run",
        version=3,
        params={**settings, "min_tokens": TOKENS_PER_INPUT * largest_in_features},
        inputs={"dataset": dataset},
    )


def alone(slug: str, *, rows: External, tokenizer: External, params: Mapping[str, Any]) -> Step:
    """A calibration set of a user's own rows, without a recipe; params: rows, seq_len, seed, min_tokens."""
    return Step(
        stage="calibrate",
        slug=slug,
        entry="tasks.jobs.calibration.user_rows:run",
        version=2,
        params={"stratify": "proportional", "max_near_duplicates": 0.0, **params},
        inputs={"rows": rows, "tokenizer": tokenizer},
        tools=("transformers", "tokenizers"),
    )


def control(recipe: Recipe, kind: Calibration, *, dataset: Step, calibset: Step, general: External | None) -> Step:
    """A control: a set of the same shape that is not of the domain, or only half of it."""
    return Step(
        stage="calibrate",
        slug=f"{recipe.name}-{kind}",
        entry="tasks.jobs.calibration.controls:run",
        version=1,
        params={"kind": kind, "seed": recipe.calibrate.seed},
        inputs=present(dataset=dataset, calibset=calibset, general=None if kind == "random" else general),
        tools=("transformers", "tokenizers"),
    )
