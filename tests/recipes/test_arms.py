"""The evaluation matrix, spelled out."""

from dataclasses import replace

import pytest

from recipes.arms import Arm, arms
from recipes.problem import RecipeError
from recipes.schema import Recipe
from recipes.schemes.slugs import parse_scheme


def recipe(
    *,
    schemes: list[str],
    on_base: list[str],
    merge: str = "dequantized",
    controls: list[str] | None = None,
    kv_cache: list[str] | None = None,
    dora: bool = False,
) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "test",
            "model": {"base": "base"},
            "data": {"path": "rows.jsonl"},
            "merge": {"base": merge},
            "calibrate": {"controls": controls or [], "general": "general.jsonl"},
            "quantize": {"schemes": schemes},
            "train": {"dora": dora},
            "evaluate": {"on_base": on_base, "kv_cache": kv_cache or [], "null_arms": []},
        }
    )


def test_order_kinds_and_what_is_loaded():
    found = arms(recipe(schemes=["awq-w4-g128", "rtn-w3-g32"], on_base=["rtn-w3-g32"], merge="original"))
    assert found == (
        Arm(slug="base", kind="bf16"),
        Arm(slug="base-nf4", kind="nf4"),
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
    assert [arm.slug for arm in found[9:]] == [
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


def test_kv_caches_of_an_arm_differ_from_it_in_nothing_else():
    found = arms(recipe(schemes=["gptq-w4-g32"], on_base=["gptq-w4-g32"], kv_cache=["gptq-w4-g32", "nf4-adapter"]))
    named = {arm.slug: arm for arm in found}
    assert list(named)[-6:] == [
        *(f"gptq-w4-g32.kv-{kv}" for kv in ("fp8", "fp8-calibrated", "int8")),
        *(f"nf4-adapter.kv-{kv}" for kv in ("fp8", "fp8-calibrated", "int8")),
    ]
    for arm in found[-6:]:
        assert arm.of is not None and not arm.is_control
        assert replace(arm, slug=arm.of, kv=None, of=None) == named[arm.of]


def test_kv_caches_of_no_arm_are_refused():
    with pytest.raises(RecipeError) as caught:
        arms(
            recipe(schemes=["gptq-w4-g32"], on_base=[], kv_cache=["gptq-w4-g128", "base", "base", "gptq-w4-g32.kv-fp8"])
        )
    found = {problem.where: problem for problem in caught.value.problems}
    assert list(found) == ["evaluate.kv_cache.0", "evaluate.kv_cache.2", "evaluate.kv_cache.3"]
    assert "no arm gptq-w4-g128" in found["evaluate.kv_cache.0"].what and "twice" in found["evaluate.kv_cache.2"].what
    assert found["evaluate.kv_cache.0"].next.endswith(
        "base-nf4, nf4-adapter, merged-dequantized, merged-original, gptq-w4-g32."
    )


def test_dora_on_formats_that_peft_refuses_is_no_arm_with_the_reason():
    slugs = ["gptq-w4-g32", "awq-w4-g32", "rtn-w4-g32", "ct-gptq-w4-g32", "nf4"]
    plain = recipe(schemes=["gptq-w4-g32"], on_base=slugs)
    assert not any(arm.unavailable for arm in arms(plain))
    asked = recipe(schemes=["gptq-w4-g32"], on_base=slugs, kv_cache=["gptq-w4-g32.on-base"], dora=True)
    found = {arm.slug: arm.unavailable for arm in arms(asked) if arm.unavailable}
    assert list(found) == [f"{slug}.on-base" for slug in slugs[:3]] + [
        f"gptq-w4-g32.on-base.kv-{kv}" for kv in ("fp8", "fp8-calibrated", "int8")
    ]
    assert found["awq-w4-g32.on-base"] == "PEFT puts no DoRA on awq layers: AwqLoraLinear does not support DoRA yet"
    elsewhere = arms(plain, adapter={"use_dora": True})  # trained before, by whatever tool
    assert [arm.slug for arm in elsewhere if arm.unavailable] == [f"{slug}.on-base" for slug in slugs[:3]]


def test_what_may_be_promoted_is_what_this_run_made_to_be_shipped():
    asked = recipe(
        schemes=["awq-w4-g32", "rtn-w3-g128"],
        on_base=["awq-w4-g32"],
        merge="auto",
        controls=["awq-w4-g32"],
        kv_cache=["awq-w4-g32", "base"],
    )
    raw = asked.model_dump()
    raw["evaluate"] |= {"external": {"production": "models/production"}, "null_arms": ["batch"]}
    found = arms(Recipe.model_validate(raw))
    assert {arm.slug for arm in found if arm.may_be_promoted} == {
        "merged-dequantized",
        "merged-original",
        "awq-w4-g32",
        "rtn-w4-g32",  # added for the controls
        "rtn-w3-g128",
    }
    assert len(found) > 15
