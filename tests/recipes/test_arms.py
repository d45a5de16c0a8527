"""The evaluation matrix, spelled out."""

import pytest

from recipes.arms import Arm, arms
from recipes.problem import RecipeError
from recipes.schema import Recipe
from recipes.slugs import parse_scheme


def recipe(
    *, schemes: list[str], on_base: list[str], merge: str = "dequantized", controls: list[str] | None = None
) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "test",
            "model": {"base": "base"},
            "data": {"path": "rows.jsonl"},
            "merge": {"base": merge},
            "calibrate": {"controls": controls or [], "general": "general.jsonl"},
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


def test_controls_are_spelled_out_once():
    found = arms(
        recipe(
            schemes=["awq-w4-g32", "gptq-w4-g32", "gptq-w3-g128", "rtn-w3-g128"],
            on_base=[],
            controls=["gptq-w4-g32", "awq-w4-g32", "gptq-w3-g128"],
        )
    )
    assert [arm.slug for arm in found[8:]] == [
        "rtn-w4-g32",  # one for AWQ and GPTQ; rtn-w3-g128 is there
        *(f"awq-w4-g32.{one}" for one in ("calib-generic", "calib-mixed", "calib-random", "scales-from-base")),
        *(f"gptq-w4-g32.{one}" for one in ("calib-generic", "calib-mixed", "calib-random")),
        *(f"gptq-w3-g128.{one}" for one in ("calib-generic", "calib-mixed", "calib-random")),
    ]
    assert {arm.slug for arm in found if arm.is_control} == {arm.slug for arm in found if arm.slug.count(".") == 1}
    generic = next(arm for arm in found if arm.slug == "awq-w4-g32.calib-generic")
    assert (generic.calibration, generic.scheme, generic.merge_base) == (
        "generic",
        parse_scheme("awq-w4-g32"),
        "dequantized",
    )


def test_controls_of_nothing_are_refused():
    with pytest.raises(RecipeError) as caught:
        arms(recipe(schemes=["awq-w4-g32", "rtn-w4-g32"], on_base=[], controls=["rtn-w4-g32", "gptq-w4-g32"]))
    assert [problem.where for problem in caught.value.problems] == ["calibrate.controls.0", "calibrate.controls.1"]
    assert all(problem.next == "Write one of awq-w4-g32." for problem in caught.value.problems)
