"""`quench plan --gpu-gib`: figures by hand, what makes a step fit, and that nothing but files is needed."""

import json
import os
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from flows.plan.card import plan_for, text
from flows.plan.fit import Setting, enough_tokens, fits, fitting, on_card
from flows.plan.machine import Memory
from flows.plan.memory import StepNeeds, predict
from flows.plan.row_sizes import RowSizes
from flows.plan.work import active_parameters, work
from recipes.models.headers import Headers, read_headers
from recipes.problem import RecipeError
from recipes.read.load import load
from recipes.schema import Recipe
from tests.bench.shapes import SHAPES, write_shape
from tests.hub import Hub
from tests.recipes.folders import chat, write_rows, write_safetensors

RECIPE = """
name: card
model: {base: base}
data: {path: rows.jsonl, max_length: 2048}
train: {batch_size: 16}
calibrate: {rows: 512}
quantize: {schemes: [gptq-w4-g128, rtn-w4-g128]}
evaluate: {batch_size: 16}
"""
ROWS = RowSizes(rows=1000, longest=4096, completion_tokens=100, data_bytes=4_000_000, tokens=400)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An 8B's headers, and rows of which some are long."""
    folder = tmp_path_factory.mktemp("card")
    write_shape(folder / "base", SHAPES["Llama-8B"])
    rows = [chat(number) for number in range(400)]
    rows[7]["messages"][0]["content"] *= 300  # cut to max_length
    write_rows(folder / "rows.jsonl", rows)
    (folder / "recipe.yaml").write_text(RECIPE)
    return folder / "recipe.yaml"


@pytest.fixture(scope="module")
def headers(project: Path) -> Headers:
    return read_headers(project.parent / "base")


@pytest.fixture(scope="module")
def recipe(project: Path) -> Recipe:
    return load(project).recipe


def of_stage(plan: dict[str, Any], stage: str) -> dict[str, Any]:
    return next(step for step in plan["steps"] if step["key"].startswith(f"{stage}/"))


def quench(*words: str, home: Path) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "QUENCH_HOME": str(home), "MLFLOW_TRACKING_URI": "http://127.0.0.1:9"}
    return subprocess.run(
        [sys.executable, "-P", "-m", "flows.cli", *words], capture_output=True, text=True, env=env, check=False
    )


# ---- the command


def test_it_needs_no_store_no_mlflow_and_no_gpu(project: Path, tmp_path: Path):
    home = tmp_path / "home"
    done = quench("plan", str(project), "--gpu-gib", "80", "--host-gib", "128", "--json", home=home)
    assert done.returncode in (0, 1), done.stderr
    plan = json.loads(done.stdout)
    assert not home.exists() and plan["machine"] == {"gpu_gib": 80, "gpus": 1, "host_gib": 128}
    train = of_stage(plan, "train")
    assert train["gpu_left_gib"] == pytest.approx(80 - train["gpu_gib"]) and train["flops"] > 1e12
    assert plan["disk_gib"] == pytest.approx(sum(step["disk_gib"] for step in plan["steps"])) and plan["disk_gib"] > 30


def test_the_command_that_it_names_fits(project: Path):
    """What the last line says, planned again, fits as it is, with the same steps."""
    memory = Memory(64.0, 20.0)
    first = plan_for(project, memory, sets=["train.rank=32"], only=["base", "nf4-adapter", "rtn-w4-g128"])
    assert not first.never and first.setting.values
    last = text(first).splitlines()[-1]
    assert last.strip() == first.command and "FITS ONLY WITH OTHER SETTINGS" in text(first)
    assert last.strip().startswith("quench evaluate ") and " --only base nf4-adapter rtn-w4-g128 --set " in last
    words = shlex.split(last)
    sets = [words[place + 1] for place, word in enumerate(words) if word == "--set"]
    assert "train.rank=32" in sets
    again = plan_for(project, memory, sets=sets, only=["base", "nf4-adapter", "rtn-w4-g128"])
    assert not again.never and not again.setting.values
    assert [step.needs.key for step in again.steps] == [step.needs.key for step in first.steps]
    assert all(fits(step.needs, memory) for step in again.steps)


def test_what_never_fits_is_named_with_the_arms_that_do(project: Path):
    """12 GiB hold no bf16 model of 15; the arms in NF4 and rounded to 4 bits are left."""
    plan = plan_for(project, Memory(64.0, 12.0))
    assert {"evaluate/base", "evaluate/merged-original"} <= {step.needs.key for step in plan.never}
    assert {"base-nf4", "nf4-adapter", "rtn-w4-g128"} <= set(plan.only) and "base" not in plan.only
    shown = text(plan)
    assert "DOES NOT FIT, with any setting" in shown and "weights bf16 15.0 GiB" in shown
    assert shown.splitlines()[-1].strip().startswith("quench evaluate ")
    smaller = plan_for(project, plan.memory, only=plan.only)
    assert not smaller.never


def test_exit_codes(project: Path, tmp_path: Path):
    ok = quench("plan", str(project), "--only", "nf4-adapter", "--gpu-gib", "24", home=tmp_path)
    assert ok.returncode == 0 and "a host that is large enough" in ok.stdout, ok.stderr
    never = quench("plan", str(project), "--only", "base", "--gpu-gib", "12", home=tmp_path)
    assert never.returncode == 1
    without = quench("plan", str(project), "--host-gib", "64", home=tmp_path)
    assert without.returncode == 2 and "--gpu-gib" in without.stderr
    none = quench("plan", str(project), "--gpu-gib", "nan", home=tmp_path)
    assert none.returncode == 2 and "no size in GiB" in none.stderr


def test_a_small_host_is_told(project: Path):
    plan = plan_for(project, Memory(1.0, 80.0), only=["nf4-adapter"])
    assert "train/card" in {step.needs.key for step in plan.never} and not plan.only
    assert "NO: libraries 1.8 GiB" in text(plan) and "No arm is left" in text(plan)


def test_more_processes_than_gpus_are_refused(project: Path):
    with pytest.raises(RecipeError, match=r"run.processes is 4; 2 GPU"):
        plan_for(project, Memory(64.0, 80.0, 2), sets=["run.processes=4"])


def test_a_base_on_a_hub_is_planned_without_its_weights(project: Path, tmp_path: Path):
    """A shape small enough to be served; of its file of weights the header alone is asked for."""
    shape = replace(SHAPES["0.6B"], hidden=128, intermediate=256, layers=2, heads=4, kv_heads=2, vocabulary=512)
    folder = write_shape(tmp_path / "base", replace(shape, head_dim=32))
    local = plan_for(project, Memory(64.0, 8.0), sets=[f"model.base={folder}"])
    words = ("plan", str(project), "--set", "model.base=org/tiny", "--gpu-gib", "8", "--host-gib", "64", "--json")
    with Hub() as hub:
        hub.add("org/tiny", folder)
        env = {**hub.env(tmp_path / "hf"), "QUENCH_HOME": str(tmp_path / "home")}
        done = subprocess.run(
            [sys.executable, "-P", "-m", "flows.cli", *words], capture_output=True, text=True, env=env, check=False
        )
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["steps"] == local.as_dict()["steps"]
        fresh = ("init", "--model", "org/tiny", "--data", str(project.parent / "rows.jsonl"), "--gpu-gib", "8")
        done = subprocess.run(
            [sys.executable, "-P", "-m", "flows.cli", *fresh, "--out", str(tmp_path / "fresh.yaml")],
            capture_output=True,
            text=True,
            env=env,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert "of 8.0 GiB free on the GPU" in (tmp_path / "fresh.yaml").read_text()
    assert not list((tmp_path / "hf").rglob("*.safetensors"))


# ---- what makes a step fit


def largest(stage: str, recipe: Recipe, headers: Headers, memory: Memory) -> Setting | None:
    def steps(recipe: Recipe) -> list[StepNeeds]:
        return predict(recipe, headers, device="cuda", rows=ROWS)

    return fitting(stage, recipe, memory=memory, steps=steps).setting


def test_settings_that_keep_the_result_come_first(recipe: Recipe, headers: Headers):
    """Of training: rows per forward pass, then recomputing with as many rows as fit, then shorter rows."""
    by_gib = {gib: largest("train", recipe, headers, Memory(64.0, gib)) for gib in (400.0, 40.0, 24.0, 10.0, 6.5)}
    values = {gib: setting.values for gib, setting in by_gib.items() if setting is not None}
    assert values[400.0] == {}
    assert set(values[40.0]) == {"run.micro_batch"} and values[40.0]["run.micro_batch"] > 1
    assert values[10.0]["train.gradient_checkpointing"] is True and "data.max_length" not in values[10.0]
    assert values[6.5]["data.max_length"] < 2048
    micro = [value["run.micro_batch"] for gib, value in values.items() if "data.max_length" not in value and value]
    assert all(16 % size == 0 for size in micro)


def test_several_gpus_share_the_base_before_rows_get_shorter(headers: Headers, recipe: Recipe, tmp_path: Path):
    large = read_headers(write_shape(tmp_path, SHAPES["70B"]))
    checkpointed = recipe.model_copy(update={"train": recipe.train.model_copy(update={"gradient_checkpointing": True})})
    memory = Memory(512.0, 42.0, 8)
    setting = largest("train", checkpointed, large, memory)
    assert setting is not None and setting.values["run.launcher"] == "fsdp-qlora"
    assert setting.values["run.processes"] > 1 and "data.max_length" not in setting.values
    alone = largest("train", checkpointed, large, Memory(512.0, 42.0))
    assert alone is None or "data.max_length" in alone.values


def test_before_fsdp_cuts_the_base_each_rank_holds_it_whole(recipe: Recipe, tmp_path: Path):
    """transformers 5.23 loads a 4-bit base whole on every rank: 36.8 GiB of a 70B, however many GPUs there are."""
    large = read_headers(write_shape(tmp_path, SHAPES["70B"]))
    raw = recipe.model_dump()
    raw["train"]["gradient_checkpointing"] = True
    raw["run"] |= {"processes": 8, "launcher": "fsdp-qlora", "micro_batch": 1}
    step = next(step for step in predict(Recipe.model_validate(raw), large, device="cuda") if step.stage == "train")
    assert on_card(step) > 36.8 and not step.confirmed
    assert step.host_gib < 131.5 + 8 * 2  # the file of weights once


@pytest.mark.parametrize(("gib", "rows"), [(6.0, {}), (3.3, 256), (1.9, None)])
def test_calibration_keeps_the_tokens_that_the_widest_layer_needs(
    gib: float, rows: int | None, recipe: Recipe, headers: Headers
):
    """14,336 inputs need 57,344 tokens, 144 rows of 400: 128 rows would be refused, so they are not proposed."""

    def steps(recipe: Recipe) -> list[StepNeeds]:
        size = recipe.calibrate.rows / 100
        return [StepNeeds(key="quantize/any", host_gib=1, gpu_gib=size, disk_gib=0, parts={"activations": size})]

    found = fitting(
        "quantize", recipe, memory=Memory(64, gib), steps=steps, allows=lambda less: enough_tokens(less, headers, ROWS)
    )
    if rows is None:
        assert found.setting is None and found.never == ("quantize/any",)
    else:
        assert found.setting is not None and found.setting.values.get("calibrate.rows", {}) == rows


def test_too_few_calibration_tokens_are_told(project: Path):
    """The rows that are here are short; a run with them would be refused."""
    (warning,) = plan_for(project, Memory(64.0, 80.0), only=["nf4-adapter"]).warnings
    assert "Calibration needs 57344 tokens" in warning.what


# ---- tokens and operations


def test_work_by_hand(recipe: Recipe, headers: Headers):
    linear = 32 * (2 * 4096**2 + 2 * 4096 * 1024 + 3 * 4096 * 14336)
    active = linear + 4096 * 128256
    assert active_parameters(headers) == active
    by_key = work(recipe, headers, ROWS)
    train = by_key["train/card"]
    assert train.tokens == pytest.approx(750 * 400) and train.flops == pytest.approx(4 * active * 750 * 400)
    raw = recipe.model_dump()
    raw["train"] |= {"gradient_checkpointing": True, "max_steps": 10}
    longer = work(Recipe.model_validate(raw), headers, ROWS)["train/card"]
    assert longer.tokens == 10 * 16 * 400 and longer.flops == pytest.approx(6 * active * longer.tokens)
    merged, base = by_key["evaluate/merged-dequantized"], by_key["evaluate/base"]
    assert merged.tokens == pytest.approx(250 * (400 + 400))
    assert base.tokens == pytest.approx(250 * 400 + 150 * 400)  # its answers to dev are not decoded
    assert base.flops == pytest.approx(2 * active * base.tokens)
    gptq = by_key["quantize/gptq-w4-g128"]
    hessians = 32 * (6 * 4096**2 + 14336**2)
    assert gptq.tokens == 512 * 400 and gptq.flops == pytest.approx((4 * linear + 2 * hessians) * gptq.tokens)
    assert by_key["quantize/rtn-w4-g128"] == (0, 0)
    assert work(recipe, headers, None) == {}


def test_a_mixture_counts_the_experts_that_a_token_meets(tmp_path: Path):
    """Qwen3-30B-A3B: 30.5 billion parameters, 3.3 of them active by its card, 0.3 of which are embeddings."""
    mixture = read_headers(write_shape(tmp_path, SHAPES["30B-A3B"]))
    assert mixture.parameters == pytest.approx(30.5e9, rel=0.01)
    assert active_parameters(mixture) == pytest.approx(3.3e9 - 151936 * 2048, rel=0.02)


def test_training_keeps_the_activations_of_the_experts_that_a_token_meets(recipe: Recipe, tmp_path: Path):
    """8 of 128 experts, stored one by one or as one tensor a layer: the same activations."""
    shape = SHAPES["30B-A3B"]
    folder = write_shape(tmp_path / "apart", shape)
    apart = read_headers(folder)
    together = write_shape(tmp_path / "together", replace(shape, experts=0, intermediate=128))
    shapes = {name: size for name, size in shape.tensors.items() if ".experts." not in name}
    for number in range(shape.layers):
        experts = f"model.layers.{number}.mlp.experts"
        for name in ("gate", "up"):
            shapes[f"{experts}.{name}_proj"] = [shape.experts, shape.intermediate, shape.hidden]
        shapes[f"{experts}.down_proj"] = [shape.experts, shape.hidden, shape.intermediate]
    write_safetensors(together / "model.safetensors", shapes)
    (together / "config.json").write_text((folder / "config.json").read_text())

    def activations(headers: Headers, *, recompute: bool) -> float:
        raw = recipe.model_dump()
        raw["train"] |= {"gradient_checkpointing": recompute, "targets": ["q_proj"]}
        steps = predict(Recipe.model_validate(raw), headers, device="cuda")
        return next(step.parts["activations"] for step in steps if step.stage == "train")

    attention = 2 * (2048 + 4096) + 2 * (2048 + 512)
    experts = 8 * 3 * (2048 + 768)
    by_hand = 1.6 * 2 * 48 * (attention + experts) * 16 * 2048 / (1 << 30)
    for headers in (apart, read_headers(together)):
        assert activations(headers, recompute=False) == pytest.approx(by_hand, rel=1e-6)
    assert activations(apart, recompute=True) == pytest.approx(activations(read_headers(together), recompute=True))


@pytest.mark.parametrize(
    ("name", "billions"), [("0.6B", 0.596), ("4B", 4.02), ("8B", 8.19), ("14B", 14.77), ("32B", 32.76), ("70B", 70.55)]
)
def test_shapes_have_the_parameters_of_their_cards(name: str, billions: float, tmp_path: Path):
    assert read_headers(write_shape(tmp_path, SHAPES[name])).parameters == pytest.approx(billions * 1e9, rel=0.002)
