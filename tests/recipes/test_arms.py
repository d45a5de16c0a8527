"""The evaluation matrix, spelled out."""

import pytest

from recipes.arms import Arm, arms
from recipes.problem import RecipeError
from recipes.schema import Recipe
from recipes.slugs import parse_scheme


def recipe(*, schemes: list[str], on_base: list[str], merge: str = "dequantized") -> Recipe:
    return Recipe.model_validate(
        {
            "name": "test",
            "model": {"base": "base"},
            "data": {"path": "rows.jsonl"},
            "merge": {"base": merge},
            "quantize": {"schemes": schemes},
            "evaluate": {"on_base": on_base},
        }
    )


def test_order_kinds_and_what_is_loaded():
    found = arms(recipe(schemes=["awq-w4-g128", "rtn-w3-g32"], on_base=["rtn-w3-g32"], merge="original"))
    assert found == (
        Arm(slug="base", kind="bf16"),
        Arm(slug="nf4-adapter", kind="nf4", adapter=True),
        Arm(slug="merged-dequantized", kind="bf16", merge_base="dequantized"),
        Arm(slug="merged-original", kind="bf16", merge_base="original"),
        Arm(slug="awq-w4-g128", kind="quantized", merge_base="original", scheme=parse_scheme("awq-w4-g128")),
        Arm(slug="rtn-w3-g32", kind="quantized", merge_base="original", scheme=parse_scheme("rtn-w3-g32")),
        Arm(slug="rtn-w3-g32.on-base", kind="quantized", scheme=parse_scheme("rtn-w3-g32"), on_base=True, adapter=True),
    )
    assert len({arm.slug for arm in found}) == len(found)


def test_schemes_that_stand_twice_are_refused_by_field():
    with pytest.raises(RecipeError) as caught:
        arms(recipe(schemes=["rtn-w4-g32", "rtn-w3-g32", "rtn-w4-g32"], on_base=["rtn-w4-g32", "rtn-w4-g32"]))
    merged, on_base = caught.value.problems
    assert (merged.where, on_base.where) == ("quantize.schemes.2", "evaluate.on_base.1")
    assert "quantize.schemes.0" in merged.why
