"""Quantized KV caches: identity changes no bit, formats are what they say, forcing and decoding read the same."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor
from transformers import DeepseekV3Config, DynamicCache, GenerationConfig, PreTrainedModel

from recipes.arms import KV, KV_CACHES
from tasks.jobs.loading.load import load_arm, load_bf16
from tasks.jobs.measuring.decoding import greedy_answers
from tasks.jobs.measuring.kv_cache import KVCache, Scales, StoredCache, calibrated, e4m3, int8
from tasks.jobs.measuring.teacher_forcing import TokenRow, forced
from tasks.runtime.process.errors import StageError
from tests.jobs.architectures import write_architecture
from tests.jobs.build import make_job, notes
from tests.jobs.quantized import write_calibset
from tests.jobs.test_evaluate import lines, score, world

__all__ = ["world"]  # the fixture
ARCHITECTURES = ("llama", "qwen3", "gemma3")
WINDOW = 16  # of gemma3's sliding layer; rows are longer
END = GenerationConfig(max_new_tokens=24, do_sample=False, eos_token_id=[2, 0], pad_token_id=0)


def rows() -> list[TokenRow]:
    """Three of different lengths, so that a batch is padded."""
    draw = torch.Generator().manual_seed(3)
    rows = []
    for number, length in enumerate((48, 37, 20)):
        ids = torch.randint(4, 300, (length,), generator=draw).tolist()
        rows.append(
            TokenRow(
                row=str(number),
                group=str(number),
                split="test",
                ids=ids,
                counted=[False] * 8 + [True] * (length - 8),
                prompt_ids=ids[:-10],
            )
        )
    return rows


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], PreTrainedModel]:
    """A tiny model by its architecture; gemma3 with one sliding and one full layer."""
    root = tmp_path_factory.mktemp("kv")
    loaded: dict[str, PreTrainedModel] = {}

    def read(name: str) -> PreTrainedModel:
        if name not in loaded:
            folder = write_architecture(root / name, name)
            if name == "gemma3":
                config = json.loads((folder / "config.json").read_text())
                config |= {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
                (folder / "config.json").write_text(json.dumps(config))
            loaded[name] = load_bf16(folder, device="cpu")
        return loaded[name]

    return read


def quantized(model: PreTrainedModel, kind: KV, tmp_path: Path) -> KVCache:
    calibset = tmp_path / "calibset"
    scales = {}
    if kind == "fp8-calibrated":
        scales = calibrated(model, calibset if calibset.exists() else write_calibset(calibset))
    return KVCache(config=model.config, kind=kind, scales=scales)


def logits(model: Any, caches: Any = None, *, batch: list[TokenRow] | None = None) -> list[Tensor]:
    """[T - 1, vocabulary] of every row."""
    return [torch.cat(parts) for parts in forced(model, batch or rows(), lambda part: part.every.clone(), caches)]


# ---- the formats


def test_e4m3_is_the_nearest_number_of_its_table() -> None:
    """The 253 numbers of the format, written down from its definition: bias 7, 3 bits of fraction, no infinity."""
    table = [(1 + m / 8) * 2.0 ** (e - 7) for e in range(1, 16) for m in range(8) if (e, m) != (15, 7)]
    table += [m / 8 * 2.0**-6 for m in range(8)]
    numbers = torch.tensor(sorted({*table, *(-one for one in table)}), dtype=torch.float64)
    assert len(numbers) == 253 and numbers.max() == 448
    drawn = torch.randn(4000, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 40
    for scale in (1.0, 0.37):
        rounded = e4m3(drawn.float(), scale).double() / torch.tensor(scale, dtype=torch.float32).double()
        nearest = (drawn.float().double() / scale - numbers[:, None]).abs().min(0).values
        error = (drawn.float().double() / scale - rounded).abs()
        assert (error - nearest).abs().max() < 1e-4  # fp32 division and product


def test_e4m3_saturates_and_keeps_nan_visible() -> None:
    rounded = e4m3(torch.tensor([1e6, -1e6, float("inf"), 460.0]), 1.0)
    assert rounded.tolist() == [448.0, -448.0, 448.0, 448.0]
    assert e4m3(torch.tensor([1e6]), 0.5).item() == 224
    assert e4m3(torch.tensor([float("nan")]), 1.0).isnan().all()


def test_int8_is_off_by_half_a_step_of_its_token_and_head() -> None:
    draw = torch.Generator().manual_seed(0)
    numbers = torch.randn(2, 3, 5, 32, generator=draw) * torch.logspace(-3, 3, 5).view(1, 1, 5, 1)  # tokens differ
    numbers[0, 1] *= 1e3  # so does a head
    half = numbers.abs().amax(-1, keepdim=True) / 127 / 2
    error = (int8(numbers) - numbers).abs()
    assert (error <= half * 1.0001).all()
    assert (error > half / 2).float().mean() > 0.3  # half of them, if errors are uniform
    rounded = numbers.bfloat16()
    bound = half * 1.01 + rounded.abs() * 2.0**-8  # bf16 has 8 bits
    assert ((int8(rounded) - rounded).abs() <= bound).all()
    assert torch.equal(int8(torch.zeros(1, 1, 1, 32)), torch.zeros(1, 1, 1, 32))


# ---- inside attention


def identity(model: PreTrainedModel) -> Callable[[], StoredCache]:
    return lambda: StoredCache(model.config, lambda new, layer: new)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_an_identity_changes_no_bit(name: str, load: Callable[[str], PreTrainedModel]) -> None:
    model = load(name)
    for plain, through in zip(logits(model), logits(model, identity(model)), strict=True):
        assert torch.equal(plain, through)
    assert greedy_answers(model, rows(), END) == greedy_answers(model, rows(), END, identity(model))


@pytest.mark.parametrize("kind", KV_CACHES)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_format_changes_logits_a_little(
    name: str, kind: KV, load: Callable[[str], PreTrainedModel], tmp_path: Path
) -> None:
    model = load(name)
    caches = quantized(model, kind, tmp_path)
    for plain, through in zip(logits(model), logits(model, caches), strict=True):
        change = (plain.float() - through.float()).norm() / plain.float().norm()
        assert torch.isfinite(through).all() and not torch.equal(plain, through)
        assert change < 0.2, change  # 3 bits of fraction: 6 % of a key or value at most
        assert not torch.equal(plain[0], through[0])  # the first token attends to its own stored value
    assert caches.layers == {0, 1}


@pytest.mark.parametrize("kind", KV_CACHES)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_teacher_forcing_equals_decoding_token_by_token(
    name: str, kind: KV, load: Callable[[str], PreTrainedModel], tmp_path: Path
) -> None:
    """In fp64, so that shapes of products decide no rounding: what is left is the last bit of fp32 inside attention."""
    model = load(name).double()
    try:
        caches, row = quantized(model, kind, tmp_path), rows()[0]
        (whole,), (plain,) = logits(model, caches, batch=[row]), logits(model, batch=[row])
        cache, steps = caches(), []
        with torch.inference_mode():
            for token in row.ids[:-1]:
                line = torch.tensor([[token]])
                steps.append(model(input_ids=line, past_key_values=cache, use_cache=True).logits[0, -1])
        apart, changed = (torch.stack(steps) - whole).abs().max(), (plain - whole).abs().max()
        assert changed > 1e-3
        assert apart < changed / 1000
        assert torch.equal(torch.stack(steps).argmax(-1), whole.argmax(-1))
    finally:
        model.bfloat16()


def test_generate_decodes_what_forcing_predicts(load: Callable[[str], PreTrainedModel], tmp_path: Path) -> None:
    """generate() with a cache of ours, against a loop of whole forward passes through a fresh one."""
    model = load("llama").double()
    try:
        caches, row = quantized(model, "fp8-calibrated", tmp_path), rows()[0]
        (decoded,) = greedy_answers(model, [row], END, caches)
        ids = list(row.prompt_ids)
        for token in decoded.tokens:
            with torch.inference_mode():
                out = model(input_ids=torch.tensor([ids]), past_key_values=caches(), use_cache=True).logits[0, -1]
            assert out.argmax().item() == token
            ids.append(token)
        assert len(decoded.tokens) > 3
    finally:
        model.bfloat16()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_calibrated_scales_put_the_largest_entry_on_448(
    name: str, load: Callable[[str], PreTrainedModel], tmp_path: Path
) -> None:
    """Against transformers' own cache, which holds keys behind the rotary embedding; the window's layer keeps fewer."""
    model = load(name)
    scales = calibrated(model, write_calibset(tmp_path / "calibset"))
    largest: dict[int, list[float]] = {0: [0.0, 0.0], 1: [0.0, 0.0]}
    for ids in pq.read_table(tmp_path / "calibset" / "calibset.parquet")["input_ids"].to_pylist():
        cache = DynamicCache()  # without a config every layer keeps all
        with torch.inference_mode():
            model(input_ids=torch.tensor([ids]), past_key_values=cache, use_cache=True)
        for number, layer in enumerate(cache.layers):
            for which, entries in enumerate((layer.keys, layer.values)):
                largest[number][which] = max(largest[number][which], entries.abs().max().item())
    assert scales == {layer: Scales(keys=k / 448, values=v / 448) for layer, (k, v) in largest.items()}
    edge = torch.tensor([largest[0][0]])
    assert e4m3(edge, scales[0].keys).item() == pytest.approx(edge.item(), rel=1e-6)  # on the grid, not cut off


def test_scales_belong_to_their_layer_and_side(load: Callable[[str], PreTrainedModel]) -> None:
    scales = {0: Scales(), 1: Scales(keys=2.0, values=0.5)}
    cache = KVCache(config=load("llama").config, kind="fp8-calibrated", scales=scales)()
    huge = torch.full((1, 2, 1, 32), 1e9)
    assert [one.max().item() for layer in (0, 1) for one in cache.update(huge, huge, layer)] == [448, 448, 896, 224]


def test_models_that_store_something_else_are_refused() -> None:
    with pytest.raises(StageError, match="latent vector"):
        KVCache(config=DeepseekV3Config(), kind="fp8")


def test_a_cache_that_no_layer_uses_is_no_result(load: Callable[[str], PreTrainedModel]) -> None:
    with pytest.raises(StageError, match="no layer"):
        KVCache(config=load("llama").config, kind="int8").record()


# ---- the job


@pytest.mark.parametrize("kind", KV_CACHES)
def test_the_job_scores_the_same_rows_and_says_what_was_simulated(world: Path, tmp_path: Path, kind: KV) -> None:
    more = {"calibset": write_calibset(tmp_path / "calibset")} if kind == "fp8-calibrated" else {}
    plain = score(world, tmp_path / "plain")
    means = score(world, tmp_path / "out", kv=kind, **more)
    same = ("row", "group", "split", "domain", "metric", "n")
    keys = [[tuple(line[name] for name in same) for line in lines(tmp_path / arm)] for arm in ("plain", "out")]
    assert keys[0] == keys[1]
    for metric in ("nll/test", "nll_all/test", "nll_general/general", "kl/test"):
        assert means[metric] != plain[metric]
        assert means[metric] == pytest.approx(plain[metric], rel=0.5)
    assert means["kv_cache"] == {"kind": kind, "label": "storage only", "layers": 2}
    record = json.loads((tmp_path / "out" / "kv_cache.json").read_text())
    assert record["layers"] == [0, 1] and record["label"] == "storage only"
    assert set(record["scales"]) == ({"0", "1"} if more else set())
    note = notes(make_job("evaluate", tmp_path / "out", params={}))["kv cache"]
    assert note.startswith("simulated, storage only: keys after rotary embedding") and "2 layers" in note
    assert not (tmp_path / "plain" / "kv_cache.json").exists()


def test_an_adapter_on_top_goes_through_the_cache_too(world: Path, tmp_path: Path) -> None:
    model = load_arm("nf4", world / "base", adapter=world / "adapter", device="cpu")
    caches = KVCache(config=model.config, kind="fp8")
    (plain,), (through,) = logits(model, batch=rows()[:1]), logits(model, caches, batch=rows()[:1])
    assert not torch.equal(plain, through) and caches.layers == {0, 1}
    assert greedy_answers(model, rows()[:1], END, caches)
