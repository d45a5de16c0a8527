"""Prediction of memory and disk, and what is refused by it."""

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from flows.compose import compose, limits
from flows.pins import pin
from flows.plan.fit import calibration_problem, fits
from flows.plan.lookup import Planned, plan
from flows.plan.machine import Memory, available
from flows.plan.memory import CUDA_IMPORT, ON_HOST, StepNeeds, predict
from flows.plan.preflight import disk_problem, judge, largest_parts, preflight
from flows.plan.row_sizes import RowSizes, row_sizes
from flows.plan.sizes import GIB, NF4_BYTES
from recipes.data.rows import read_rows
from recipes.models.headers import Headers, read_headers
from recipes.problem import Problem, RecipeError
from recipes.read.load import Loaded, load
from recipes.schema import Recipe
from tasks.runtime.step import Step
from tasks.runtime.store.local import Store
from tests.recipes.folders import chat, write_base, write_like_quickstart, write_project

RECIPE = """
name: like-quickstart
model: {base: base}
data: {path: rows.jsonl, max_length: 256}
train: {rank: 32, batch_size: 32}
quantize: {schemes: [awq-w4-g128, gptq-w4-g128, gptq-w4-g32, rtn-w4-g128, rtn-w3-g128]}
evaluate: {on_base: [gptq-w4-g128], kv_cache: [gptq-w4-g128.on-base], max_new_tokens: 96, batch_size: 50}
"""


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    return load(write_like_quickstart(tmp_path_factory.mktemp("like-quickstart"), RECIPE))


@pytest.fixture(scope="module")
def recipe(loaded: Loaded) -> Recipe:
    return loaded.recipe


@pytest.fixture(scope="module")
def headers(loaded: Loaded) -> Headers:
    return read_headers(loaded.folder / "base")


def by_key(recipe: Recipe, headers: Headers, **options: object) -> dict[str, StepNeeds]:
    return {step.key: step for step in predict(recipe, headers, **options)}  # type: ignore[arg-type]


def changed(recipe: Recipe, section: str, **values: object) -> Recipe:
    raw = recipe.model_dump()
    raw[section] |= values
    return Recipe.model_validate(raw)


def test_every_step_but_choose_is_predicted(loaded: Loaded, recipe: Recipe, headers: Headers, tmp_path: Path):
    composed: list[str] = []
    compose(recipe, pin(loaded, tmp_path), lambda step: composed.append(step.key))
    assert set(by_key(recipe, headers)) == {key for key in composed if not key.startswith("choose/")}


# Peak resident GiB as measured on CPU (torch 2.13.0, one thread), by step, for two bases.
SMALL = {  # the quickstart's base and data: rows of up to 94 tokens, general text of up to 256
    "merge/test-dequantized": 0.46,
    "reference/test": 0.77,
    "quantize/gptq-w4-g128": 0.66,
    "quantize/awq-w4-g128": 0.93,
    "quantize/gptq-w3-g128": 0.66,
    "quantize/rtn-w4-g128": 0.45,
    "evaluate/base": 0.98,
    "evaluate/nf4-adapter": 1.06,
    "evaluate/gptq-w4-g128": 1.03,
    "evaluate/gptq-w3-g128": 1.04,
    "evaluate/awq-w4-g128": 1.00,
    "measure/base": 0.57,
    "measure/nf4-adapter": 0.60,
    "measure/gptq-w3-g128": 0.67,
}
MIDDLE = {  # 100 M parameters, vocabulary 32,000, rows of up to 179 tokens
    "train/test": 3.21,
    "merge/test-dequantized": 0.48,
    "merge/test-original": 0.47,
    "reference/test": 1.03,
    "quantize/gptq-w4-g128": 1.38,
    "quantize/awq-w4-g128": 2.05,
    "quantize/gptq-w3-g128": 1.29,
    "quantize/rtn-w4-g128": 0.81,
    "evaluate/base": 1.06,
    "evaluate/nf4-adapter": 1.65,  # in tiles, rows of up to 253 tokens; 1.92 with the output layer copied for every row
    "evaluate/gptq-w4-g128": 1.29,
    "evaluate/gptq-w3-g128": 1.16,
    "evaluate/awq-w4-g128": 1.24,
    "measure/base": 0.73,
    "measure/nf4-adapter": 1.50,
    "measure/gptq-w4-g128": 1.08,
    "measure/gptq-w3-g128": 0.74,
    "measure/awq-w4-g128": 0.76,
}


def as_measured(folder: Path, *, general: str | None, batch: int, evaluated: int, rank: int, **base: int) -> Recipe:
    write_base(folder, **base)
    return Recipe.model_validate(
        {
            "name": "test",
            "model": {"base": "base"},
            "data": {"path": "rows.jsonl", "general": general, "max_length": 256},
            "train": {"rank": rank, "batch_size": batch},
            "calibrate": {"rows": 128},
            "quantize": {"schemes": ["gptq-w4-g128", "awq-w4-g128", "gptq-w3-g128", "rtn-w4-g128"]},
            "evaluate": {"batch_size": evaluated, "max_new_tokens": 96},
            "measure": {"new_tokens": 8},
        }
    )


def assert_near(predicted: dict[str, StepNeeds], measured: dict[str, float]) -> None:
    """Within 30 %: lengths within a batch differ, loaders keep what threads leave behind, the allocator keeps all."""
    ratios = {key: round(predicted[key].host_gib / value, 2) for key, value in measured.items()}
    assert all(0.7 < ratio < 1.3 for ratio in ratios.values()), ratios
    assert 0.9 < sum(ratios.values()) / len(ratios) < 1.15, ratios


def test_a_small_model_is_predicted_as_it_was_measured(tmp_path: Path):
    shape = {"hidden": 256, "intermediate": 768, "kv": 128, "layers": 6, "vocabulary": 4096}
    recipe = as_measured(tmp_path, general="general.jsonl", batch=32, evaluated=50, rank=32, **shape)
    rows = RowSizes(rows=4000, longest=94, completion_tokens=25.5, data_bytes=1_200_000, tokens=60)
    assert_near(by_key(recipe, read_headers(tmp_path), rows=rows), SMALL)


def test_a_larger_model_is_predicted_as_it_was_measured(tmp_path: Path):
    shape = {"hidden": 768, "intermediate": 2048, "kv": 256, "layers": 12, "vocabulary": 32000}
    recipe = as_measured(tmp_path, general=None, batch=8, evaluated=16, rank=16, **shape)
    rows = RowSizes(rows=300, longest=179, completion_tokens=24.0, data_bytes=130_000, tokens=100)
    assert_near(by_key(recipe, read_headers(tmp_path), rows=rows), MIDDLE)


@pytest.mark.parametrize(
    ("micro_batch", "tokens", "recompute", "measured_gib"),
    [
        (4, 150, False, 0.85),
        (16, 165, False, 1.31),
        (32, 176, False, 1.93),
        (16, 345, False, 1.96),
        (16, 660, False, 2.70),
        (16, 165, True, 1.12),
        (16, 660, True, 1.81),
    ],
)
def test_training_follows_batch_length_and_recomputing(
    recipe: Recipe, headers: Headers, micro_batch: int, tokens: int, recompute: bool, measured_gib: float
):
    """Two steps on the quickstart's base, CPU; 30 % as above."""
    asked = changed(recipe, "run", micro_batch=micro_batch)
    asked = changed(asked, "train", gradient_checkpointing=recompute)
    predicted = by_key(changed(asked, "data", max_length=tokens), headers)["train/like-quickstart"]
    assert predicted.host_gib == pytest.approx(measured_gib, rel=0.3)


@pytest.mark.parametrize(
    ("slug", "rows", "measured_gib"),
    [
        ("ct-gptq-w4-g128", 128, 0.68),
        ("ct-gptq-w4-g128", 512, 0.80),
        ("ct-awq-w4-g128", 128, 0.81),
        ("ct-awq-w4-g128", 256, 0.93),
    ],
)
def test_llm_compressor_follows_the_calibration_set(
    recipe: Recipe, headers: Headers, slug: str, rows: int, measured_gib: float
):
    """17,400 tokens and two and four times as many, CPU."""
    asked = changed(changed(recipe, "calibrate", rows=rows), "quantize", schemes=[slug])
    sizes = RowSizes(rows=4000, longest=136, completion_tokens=25.5, data_bytes=1_200_000, tokens=60)
    predicted = by_key(asked, headers, rows=sizes)[f"quantize/{slug}"]
    assert predicted.host_gib == pytest.approx(measured_gib, rel=0.15)


def test_parts_by_hand(recipe: Recipe, headers: Headers):
    gib = 1 << 30
    steps = by_key(recipe, headers)
    train = steps["train/like-quickstart"]
    rest = headers.parameters - headers.linear_parameters
    assert train.parts["weights nf4"] * gib == pytest.approx(NF4_BYTES * headers.linear_parameters + 2 * rest)
    lora = 32 * sum(layer.in_features + layer.out_features for layer in headers.linears)
    assert train.parts["lora and optimizer"] * gib == pytest.approx(16 * lora)
    assert train.parts["logits"] * gib == pytest.approx(32 * 4096 * 4096)  # bytes, vocabulary, of 8,192 tokens a tile
    assert train.host_gib == pytest.approx(sum(train.parts.values())) and train.gpu_gib == 0
    gptq = steps["quantize/gptq-w4-g128"]
    inputs = [256] * 6 + [768]  # q, k, v, o, gate, up, down
    assert gptq.parts["hessians"] * gib == pytest.approx(4 * (sum(size**2 for size in inputs) + 2 * 768**2))
    assert "hessians" not in steps["quantize/rtn-w4-g128"].parts
    cache = steps["evaluate/base"].parts["kv cache"] * gib
    assert cache == pytest.approx(2 * 2 * 6 * 128 * 50 * (256 + 96))  # k and v, bf16, layers, features, rows, tokens


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_evaluation_holds_a_tile_of_logits_whatever_the_vocabulary(recipe: Recipe, tmp_path: Path, device: str):
    """50 rows of up to 2,048 tokens: all logits of 262,144 tokens would be 50 GiB in bf16."""
    shape = {"hidden": 256, "intermediate": 768, "kv": 128, "layers": 6}
    longer, logits = changed(recipe, "data", max_length=2048), {}
    for vocabulary in (4096, 262144):
        write_base(tmp_path / str(vocabulary), **shape, vocabulary=vocabulary)
        steps = by_key(longer, read_headers(tmp_path / str(vocabulary)), device=device)
        logits[vocabulary] = {
            key: step.parts["logits"] for key, step in steps.items() if step.stage in ("reference", "evaluate")
        }
        assert steps["measure/base"].parts["logits"] < 0.02  # of one position
    assert logits[4096] == logits[262144] and len(logits[4096]) > 5
    assert all(0.25 < gib < 0.6 for gib in logits[262144].values())  # 128 MiB two or three times, and copies in fp64


def test_quantized_bytes_are_those_of_the_file(headers: Headers, recipe: Recipe):
    steps = by_key(recipe, headers)
    sizes = {slug: steps[f"quantize/{slug}"].disk_gib for slug in ("rtn-w3-g128", "rtn-w4-g128", "gptq-w4-g32")}
    assert (
        sizes["rtn-w3-g128"]
        < sizes["rtn-w4-g128"]
        < sizes["gptq-w4-g32"]
        < steps["merge/like-quickstart-original"].disk_gib
    )


def test_files_in_memory_are_no_reason_to_refuse(recipe: Recipe, headers: Headers):
    step = by_key(recipe, headers)["evaluate/base"]
    file = step.parts["file of logits"]
    assert file == 4.0 and step.needed_gib == pytest.approx(step.host_gib - file)
    assert not refuse(recipe, headers, memory=Memory(step.needed_gib, None), make=frozenset({step.key}))
    assert refuse(recipe, headers, memory=Memory(0.99 * step.needed_gib, None), make=frozenset({step.key}))


def test_on_cuda_the_model_is_on_the_gpu(recipe: Recipe, headers: Headers):
    here, steps = by_key(recipe, headers), by_key(recipe, headers, device="cuda")
    train = steps["train/like-quickstart"]
    model = {name: size for name, size in train.parts.items() if name not in ("process", "file of weights")}
    assert train.gpu_gib == pytest.approx(sum(model.values())) and model["weights nf4"] > 0
    assert steps["calibrate/like-quickstart"] == here["calibrate/like-quickstart"]  # imports no torch
    for key in ("prepare/like-quickstart", "merge/like-quickstart-dequantized", "quantize/rtn-w4-g128"):
        assert steps[key].gpu_gib == 0
        assert steps[key].host_gib == pytest.approx(here[key].host_gib + CUDA_IMPORT)


def test_what_leases_a_gpu_is_predicted_there(loaded: Loaded, recipe: Recipe, headers: Headers, tmp_path: Path):
    leased: dict[str, bool] = {}
    compose(recipe, pin(loaded, tmp_path), lambda step: leased.update({step.key: step.gpus > 0}))
    predicted = {key: one.gpu_gib > 0 for key, one in by_key(recipe, headers, device="cuda").items()}
    assert predicted == {key: gpu for key, gpu in leased.items() if not key.startswith("choose/")}


def test_row_sizes_scale_the_sample_up(loaded: Loaded):
    path = loaded.folder / "rows.jsonl"
    sizes = row_sizes(read_rows(path, max_rows=50).rows, data_bytes=path.stat().st_size, per_byte=0.5)
    assert sizes is not None
    assert sizes.rows == pytest.approx(300, rel=0.05)  # later rows have longer numbers
    texts = [[turn["content"] for turn in chat(number)["messages"]] for number in range(50)]
    assert sizes.longest == max(sum(-(-len(text) // 2) + 16 for text in row) for row in texts)
    assert sizes.completion_tokens == pytest.approx(sum(len(row[1]) / 2 + 2 for row in texts) / 50)
    assert row_sizes([], data_bytes=0, per_byte=1.0) is None


def test_shorter_rows_need_less(recipe: Recipe, headers: Headers):
    known = by_key(
        recipe, headers, rows=RowSizes(rows=100, longest=64, completion_tokens=9, data_bytes=9000, tokens=40)
    )
    unknown = by_key(recipe, headers)
    assert known["train/like-quickstart"].host_gib < unknown["train/like-quickstart"].host_gib
    assert known["reference/like-quickstart"].disk_gib < unknown["reference/like-quickstart"].disk_gib == 4.0


def test_controls_have_their_steps_and_predictions(loaded: Loaded, recipe: Recipe, headers: Headers, tmp_path: Path):
    (loaded.folder / "texts.jsonl").write_text('{"text": "words"}\n')
    controlled = changed(recipe, "calibrate", controls=["awq-w4-g128", "gptq-w4-g128"], general="texts.jsonl")
    steps: dict[str, Step] = {}
    pins = pin(replace(loaded, recipe=controlled), tmp_path)
    compose(controlled, pins, lambda step: steps.__setitem__(step.key, step))
    assert set(by_key(controlled, headers)) == {key for key in steps if not key.startswith("choose/")}
    plain, generic = steps["quantize/awq-w4-g128"], steps["quantize/awq-w4-g128.calib-generic"]
    assert plain.params == generic.params
    assert plain.inputs["calibset"].fingerprint != generic.inputs["calibset"].fingerprint
    assert generic.inputs["calibset"] is steps["quantize/gptq-w4-g128.calib-generic"].inputs["calibset"]
    assert plain.inputs["model"] is generic.inputs["model"]
    reused = steps["quantize/awq-w4-g128.scales-from-base"]
    assert reused.inputs["scales_from"] == pins.base and reused.inputs["calibset"] is plain.inputs["calibset"]
    without: dict[str, Step] = {}
    compose(recipe, pins, lambda step: without.__setitem__(step.key, step))
    assert {key: steps[key].fingerprint for key in without} == {key: one.fingerprint for key, one in without.items()}


def test_too_few_calibration_tokens_are_told_before_anything_is_spent(recipe: Recipe, headers: Headers):
    """The widest layer has 768 inputs, so 3,072 tokens are needed."""
    rows = RowSizes(rows=400, longest=14, completion_tokens=5, data_bytes=9000, tokens=10.0)
    problem = calibration_problem(recipe, headers, rows)
    assert problem and "256 rows have about 2560" in problem.what and problem.next == "Set calibrate.rows to 308."
    few = calibration_problem(recipe, headers, rows._replace(rows=300))  # there are not as many
    assert few and few.next.startswith("308 rows like these would do")
    assert calibration_problem(changed(recipe, "calibrate", rows=308), headers, rows) is None
    assert calibration_problem(recipe, headers, None) is None


# ---- refusing


def refuse(recipe: Recipe, headers: Headers, **options: object) -> list[Problem]:
    return judge(recipe, headers, **options).problems  # type: ignore[arg-type]


def setting(problem_next: str) -> dict[str, str]:
    words = problem_next.removesuffix(".").split("--set ")[1:]
    return dict(word.strip().split("=") for word in words)


def test_what_cannot_fit_is_refused_with_the_largest_that_does(recipe: Recipe, headers: Headers):
    memory = Memory(1.5, None)
    (problem,) = [one for one in refuse(recipe, headers, memory=memory) if one.where.startswith("train/")]
    assert "1.5 GiB are free" in problem.what and "logits" in problem.why
    micro = int(setting(problem.next)["run.micro_batch"])
    assert 32 % micro == 0

    def needs(size: int) -> float:
        return by_key(changed(recipe, "run", micro_batch=size), headers)["train/like-quickstart"].host_gib

    assert needs(micro) <= 1.5 < needs(2 * micro)


def test_length_gives_way_after_the_batch(headers: Headers, recipe: Recipe):
    long = changed(recipe, "data", max_length=8192)
    train = next(one for one in refuse(long, headers, memory=Memory(1.2, None)) if one.where.startswith("train/"))
    found = setting(train.next)
    assert found["run.micro_batch"] == "1" and int(found["data.max_length"]) < 8192


def test_each_stage_is_named_once_and_hits_are_left_out(recipe: Recipe, headers: Headers):
    every = refuse(recipe, headers, memory=Memory(0.3, None))
    stages = [problem.where.split("/")[0] for problem in every]
    assert len(stages) == len(set(stages)) and {"train", "merge", "quantize", "evaluate", "measure"} <= set(stages)
    assert all("No batch or length" in problem.next for problem in every if problem.where.startswith("merge/"))
    only = refuse(recipe, headers, memory=Memory(0.3, None), make=frozenset({"evaluate/base"}))
    assert [problem.where for problem in only] == ["evaluate/base"]


def test_steps_side_by_side_have_to_fit_together(recipe: Recipe, headers: Headers):
    memory = Memory(6.0, None)
    assert refuse(recipe, headers, memory=memory, slots=2) == []
    (problem,) = refuse(recipe, headers, memory=memory, slots=16)
    assert "16 steps at once" in problem.what and "QUENCH_CPU_SLOTS=" in problem.next


def test_gpu_memory_counts_on_cuda(recipe: Recipe, headers: Headers):
    assert refuse(recipe, headers, memory=Memory(64.0, 24.0), device="cuda") == []
    small = judge(recipe, headers, memory=Memory(64.0, 0.7), device="cuda")
    assert {problem.where.split("/")[0] for problem in small.problems} == {"train", "evaluate"}
    assert all("GPU memory" in problem.what for problem in (*small.problems, *small.doubts))


def test_what_no_gpu_has_confirmed_warns(recipe: Recipe, headers: Headers):
    """Quantizers were never measured on a GPU (docs/gpu.md); on a CPU they were, and refuse."""
    keys = frozenset({"quantize/awq-w4-g128", "reference/like-quickstart"})
    verdict = judge(recipe, headers, memory=Memory(64.0, 0.61), device="cuda", make=keys)
    assert not verdict.problems and {doubt.where for doubt in verdict.doubts} == keys
    assert all("may need" in doubt.what and "No GPU has confirmed" in doubt.why for doubt in verdict.doubts)
    here = judge(recipe, headers, memory=Memory(0.3, None), make=keys)
    assert not here.doubts and {problem.where for problem in here.problems} == keys
    assert judge(recipe, headers, memory=Memory(64.0, 24.0), device="cuda").doubts == []


def test_fsdp_is_unconfirmed_and_one_gpu_is_not(recipe: Recipe, headers: Headers):
    alone = by_key(recipe, headers, device="cuda")["train/like-quickstart"]
    sharded = changed(recipe, "run", processes=4, launcher="fsdp-qlora", device="cuda")
    assert alone.confirmed and not by_key(sharded, headers, device="cuda")["train/like-quickstart"].confirmed
    assert all(step.confirmed for step in predict(recipe, headers))


def test_what_a_gpu_step_keeps_on_the_host_counts_there(recipe: Recipe, headers: Headers):
    """Of 15 GiB that a quantizer leaves on the host none are missing on the GPU."""
    step = StepNeeds(
        key="quantize/large",
        host_gib=17.0,
        gpu_gib=6.0,
        disk_gib=5.0,
        parts={f"weights bf16{ON_HOST}": 15.0, "layer": 6.0},
    )
    assert fits(step, Memory(20.0, 8.0)) and not fits(step, Memory(16.0, 8.0)) and not fits(step, Memory(20.0, 6.5))
    assert largest_parts(step, on_gpu=False) == "weights bf16 (host) 15.0 GiB, libraries 2.0 GiB"
    assert largest_parts(step, on_gpu=True) == "layer 6.0 GiB"


def test_no_disk_for_the_sum_of_outputs(recipe: Recipe, headers: Headers, tmp_path: Path):
    steps = predict(recipe, headers)
    home = tmp_path / "not" / "made" / "yet"
    assert disk_problem(steps[:2], home) is None
    large = StepNeeds(key="merge/big", host_gib=1, gpu_gib=0, disk_gib=1e9, parts={})
    problem = disk_problem([*steps, large], home)
    assert problem is not None and "merge/big" in problem.why and "QUENCH_HOME" in problem.next


def test_where_gc_makes_the_room_its_command_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Three artifacts of half a GiB (holes: no disk is filled) that nobody reaches; the disk lacks one GiB."""
    store, size = Store(tmp_path), GIB // 2
    lines: list[Planned] = []
    for name in ("a", "b", "c"):
        fingerprint = hashlib.sha256(name.encode()).hexdigest()
        attempt = store.begin("merge", name, fingerprint, inputs={})
        with (attempt.files / "weights").open("wb") as file:
            file.truncate(size)
        (attempt.own / "manifest.json").write_text("{}")
        manifest = {"schema": 1, "stage": "merge", "slug": name, "fingerprint": fingerprint, "inputs": {}}
        manifest |= {"files": {"weights": {"size": size}}, "digest": fingerprint, "finished_at": None}
        (attempt.folder / "manifest.json").write_text(json.dumps(manifest))
        (tmp_path / "store" / "merge").mkdir(parents=True, exist_ok=True)
        attempt.folder.rename(tmp_path / "store" / "merge" / f"{name}-{fingerprint[:12]}")
        lines.append(Planned(key=f"merge/{name}", fingerprint=fingerprint, hit=True, why="hit"))
    free = shutil.disk_usage(tmp_path).free / GIB

    def told(missing: float, hits: list[Planned]) -> str:
        large = StepNeeds(key="merge/big", host_gib=1, gpu_gib=0, disk_gib=free + missing, parts={})
        problem = disk_problem([large], tmp_path, hits=hits)
        assert problem is not None
        return problem.next

    assert told(1.0, []) == "Run quench store gc --yes: it frees 1.5 GiB that no run and no promotion reaches."
    assert "frees 1.5 GiB, which is not enough" in told(100.0, [])
    again = told(0.75, lines[:1])  # what this recipe would have to make again is no room that gc makes
    assert "frees 1.0 GiB" in again and "makes again" in again
    assert "quench store du" in told(0.75, lines) and "gc --yes" not in told(0.75, lines)


def test_this_machines_memory():
    assert 0.05 < available().host_gib < 10_000


# ---- as a whole


def planned(loaded: Loaded, home: Path) -> list[Planned]:
    return plan(loaded.recipe, pin(loaded, home), Store(home))


def test_preflight_of_a_plan(tmp_path: Path):
    loaded = load(write_project(tmp_path / "project"))
    found = preflight(
        loaded,
        planned(loaded, tmp_path / "home"),
        home=tmp_path / "home",
        base=tmp_path / "project" / "base",
        limits=limits(loaded.recipe),
    )
    assert found["steps"]["train/test"]["host_gib"] > 0.5 and found["free"]["host_gib"] > 0


def test_preflight_refuses_batches_that_are_too_large(tmp_path: Path):
    recipe = write_project(tmp_path / "project")
    loaded = load(recipe, sets=["data.max_length=512", "train.batch_size=1000000", "evaluate.batch_size=1000000"])
    with pytest.raises(RecipeError) as caught:
        preflight(
            loaded,
            planned(loaded, tmp_path / "home"),
            home=tmp_path / "home",
            base=tmp_path / "project" / "base",
            limits=limits(loaded.recipe),
        )
    assert {problem.where.split("/")[0] for problem in caught.value.problems} >= {"train", "evaluate"}
