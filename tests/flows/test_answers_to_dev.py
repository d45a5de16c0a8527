"""Answers to dev from recipe to steps: decoded where something chooses by them, and only there another identity."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flows.compose import ArmSteps, compose
from flows.pins import pin
from flows.results.read import RunArm
from recipes.read.load import load
from tests.recipes.folders import write_project

SETS = (
    "quantize.schemes=[rtn-w4-g32]",
    "evaluate.on_base=[rtn-w4-g32]",
    "evaluate.kv_cache=[rtn-w4-g32]",
    "evaluate.null_arms=[batch]",
)
# What an evaluate step's identity held before there was a choice; an arm that may be promoted has no more.
PARAMS = {"kind", "kv", "scorers", "max_new_tokens", "batch_size", "seed", "device", "attention"}


def composed(folder: Path) -> tuple[ArmSteps, ...]:
    write_project(folder)
    loaded = load(folder / "recipe.yaml", sets=list(SETS))
    return compose(loaded.recipe, pin(loaded, folder / "home"), lambda step: None).arms


def test_what_may_be_promoted_keeps_its_identity(tmp_path: Path) -> None:
    every: dict[str, dict[str, Any]] = {
        row.arm.slug: row.evaluate.identity["params"] for row in composed(tmp_path) if row.evaluate
    }
    kept = {slug for slug, own in every.items() if set(own) == PARAMS}
    assert kept == {"merged-dequantized", "merged-original", "rtn-w4-g32"}
    for slug in every.keys() - kept:
        assert every[slug].pop("decoded") == ["test"]
        assert set(every[slug]) == PARAMS, slug
    assert {"base", "nf4-adapter", "rtn-w4-g32.on-base", "rtn-w4-g32.kv-int8"} <= every.keys() - kept


def test_what_may_be_promoted_is_what_the_gate_takes(tmp_path: Path) -> None:
    """The recipe's word for it and that of a run that has ended are one."""
    for row in composed(tmp_path):
        gated = RunArm.of_recipe(row.arm, row.keys, refused=None)
        assert row.arm.may_be_promoted == (gated.unfit is None), row.arm.slug
