"""What fits a card: the KV cache by hand for known models, the front, the best arm, and `quench choose`."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from flows.cli import main
from flows.report.build import render
from flows.results.card_fit import GIB, Fit, Refused, Workload, allowance_bytes, best, cache_of, fits, front, headers_of
from flows.results.read import Run, read_run
from recipes.models.headers import Headers
from tests.flows.synthetic_run import SHAPES, SyntheticRun

LLAMA_8B = {"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "hidden_size": 4096}
LLAMA_7B = {"num_hidden_layers": 32, "num_attention_heads": 32, "hidden_size": 4096}


def described(**config: Any) -> Headers:
    return Headers(folder=Path(), config=config, text_config=config, tensors={}, linears=())


# ---- the cache, by hand


def test_a_token_of_llama_3_8b_takes_128_kib() -> None:
    cache = cache_of(described(**LLAMA_8B))
    assert cache.per_token("bf16") == 2 * 32 * 8 * 128 * 2 == 131_072
    assert cache.per_token("fp8") == 65_536
    assert cache.per_token("int8") == 65_536 + 2 * 32 * 8 * 4  # and an fp32 scale a token and head
    assert cache.size("bf16", context=8192, batch=8) == 8 * GIB


def test_a_7b_without_grouped_heads_takes_four_times_that() -> None:
    """Llama 2 7B, 4,096 tokens x 32: the 4 GB that are often quoted are 64 GiB."""
    cache = cache_of(described(**LLAMA_7B))
    assert cache.per_token("bf16") == 524_288
    assert cache.size("bf16", context=4096, batch=32) == 64 * GIB


def test_layers_with_a_window_keep_no_more_than_it() -> None:
    gemma = {**LLAMA_8B, "sliding_window": 1024, "layer_types": ["sliding_attention"] * 27 + ["full_attention"] * 5}
    cache = cache_of(described(**gemma))
    layer = 2 * 8 * 128 * 2
    assert cache.size("bf16", context=8192, batch=2) == 2 * layer * (5 * 8192 + 27 * 1024)
    assert cache.size("bf16", context=512, batch=1) == layer * 32 * 512
    mistral = cache_of(described(**LLAMA_8B, sliding_window=4096))
    assert mistral.size("bf16", context=8192, batch=1) == layer * 32 * 4096
    qwen2 = cache_of(described(**LLAMA_8B, sliding_window=4096, use_sliding_window=False))
    assert qwen2.size("bf16", context=8192, batch=1) == layer * 32 * 8192


def test_global_heads_and_shared_layers_are_counted_as_they_are() -> None:
    """Gemma 4 and 3n: full layers have larger heads, the last layers reuse the keys and values of earlier ones."""
    kinds = ["sliding_attention"] * 24 + ["full_attention"] * 8
    gemma = {**LLAMA_8B, "sliding_window": 1024, "layer_types": kinds, "num_kv_shared_layers": 4}
    gemma["per_layer_config"] = {str(number): {"head_dim": 256, "num_key_value_heads": 2} for number in range(24, 32)}
    cache = cache_of(described(**gemma))
    assert cache.per_token("bf16") == 2 * 2 * (24 * 8 * 128 + 4 * 2 * 256)
    assert cache.size("fp8", context=8192, batch=2) == 2 * 2 * (24 * 8 * 128 * 1024 + 4 * 2 * 256 * 8192)
    assert cache.per_token("int8") == cache.per_token("bf16") / 2 + 2 * 4 * (24 * 8 + 4 * 2)
    llama4 = {**LLAMA_8B, "layer_types": ["chunked_attention"] * 24 + ["full_attention"] * 8}
    chunked = cache_of(described(**llama4, attention_chunk_size=1024))
    assert chunked.size("bf16", context=8192, batch=1) == 2 * 2 * 8 * 128 * (24 * 1024 + 8 * 8192)


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ({"kv_lora_rank": 512}, "kv_lora_rank"),
        ({"mamba_d_state": 16}, "mamba_d_state"),
        ({"layer_types": ["linear_attention"] * 24 + ["full_attention"] * 8}, "linear_attention"),
        ({"layer_types": ["sliding_attention"] * 32}, "no sliding_window"),
    ],
)
def test_a_cache_of_another_kind_is_refused(more: dict[str, Any], why: str) -> None:
    with pytest.raises(Refused, match=why):
        cache_of(described(**LLAMA_8B, **more))


# ---- the choice


def arm(name: str, needed: float, kl: float | None, refused: str | None = None) -> Fit:
    return Fit(arm=name, cache="bf16", weights=needed, needed=needed * GIB, task=0.9, kl_mean=kl, refused=refused)


def test_the_best_is_the_closest_that_fits_and_a_tenth_stays_free() -> None:
    every = [arm("bf16", 15, 0.0), arm("g32", 5.2, 1e-3), arm("g128", 5.0, 1e-3), arm("3-bit", 4, 1e-2)]
    every.append(arm("refused", 1, 0.0, "vLLM does not read it"))
    found = {size: (one.arm if (one := best(every, size)) else None) for size in (80, 16, 8, 5, 4)}
    assert found == {80: "bf16", 16: "g128", 8: "g128", 5: "3-bit", 4: None}  # 0.9 x 16 < 15; equal KL: fewer bytes
    assert front(every) == {"bf16", "g128", "3-bit"}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("home")
    folder = SyntheticRun(home, shapes=SHAPES, test=120, general=20, refused={"gptq-w3-g128": "no kernel"}).write()
    (home / "runs" / "latest").symlink_to(folder.name)
    render(folder, home)
    return home


@pytest.fixture
def run(home: Path) -> Run:
    return read_run((home / "runs" / "latest").resolve(), home)


def test_every_arm_that_could_ship_is_listed_with_what_it_needs(run: Run, home: Path) -> None:
    said = json.loads((run.folder / "report.json").read_text())
    headers = headers_of(run)
    assert headers is not None
    listed = {one["arm"]: one for one in said["fit"]["arms"]}
    assert set(listed) == set(SHAPES) - {"base"}
    assert listed["gptq-w3-g128"]["refused"] == "the engine of the recipe does not serve it: no kernel"
    assert "not one artifact" in listed["nf4-adapter"]["refused"]
    work = Workload(context=headers.max_positions or 0, batch=8)
    keys = 8 * work.context * said["fit"]["kv_bytes_per_token"]["bf16"]
    for one in listed.values():
        assert one["needed_bytes"] == pytest.approx(one["weights_bytes"] + keys + allowance_bytes(headers, work))
    closest = min((one for one in listed.values() if one["refused"] is None), key=lambda one: one["kl_mean"])
    assert [one["best"] for one in said["fit"]["examples"]] == [closest["arm"]] * 4  # a tiny model fits anywhere
    assert closest["on_front"]


def test_a_kv_arm_has_the_bytes_of_its_arm_and_half_the_cache(run: Run) -> None:
    plain = next(one for one in run.arms if one.slug == "gptq-w4-g128")
    kv = replace(plain, slug="gptq-w4-g128.kv-fp8", kv="fp8", of=plain.slug)
    figures = {key: {"size_bytes": 5000000.0, "task": 0.9, "kl_mean": 0.001} for key in ("gptq-w4-g128", kv.slug)}
    headers = headers_of(run)
    assert headers is not None
    work = Workload(context=512, batch=8)
    one, other = fits(replace(run, arms=(plain, kv)), figures, work, headers, None)
    cache = cache_of(headers)
    assert one.needed is not None and other.needed is not None and other.refused is None
    assert one.needed - other.needed == cache.size("bf16", context=512, batch=8) / 2
    assert other.cache == "fp8"


def choose(home: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, *words: str) -> tuple[int, str, str]:
    monkeypatch.setenv("QUENCH_HOME", str(home))
    monkeypatch.setenv("COLUMNS", "120")
    code = main(["choose", *words])
    said = capsys.readouterr()
    return code, said.out, said.err


def test_the_command_names_the_best_and_the_front(home: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    words = ("--vram", "24", "--context", "512", "--batch", "8")
    code, out, _ = choose(home, monkeypatch, capsys, *words)
    assert code == 0 and "Best: merged-dequantized" in out and "*" in out
    code, out, _ = choose(home, monkeypatch, capsys, *words, "--json")
    made = json.loads(out)
    assert code == 0 and made["best"] == "merged-dequantized"
    assert {one["arm"] for one in made["arms"]} == set(SHAPES) - {"base"}


def test_another_engine_refuses_other_arms(home: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    words = ("--vram", "24", "--context", "512", "--json")
    refused = {}
    for engine in ("vllm", "exllamav2"):
        _, out, _ = choose(home, monkeypatch, capsys, *words, "--engine", engine)
        refused[engine] = {one["arm"] for one in json.loads(out)["arms"] if one["refused"]}
    assert "awq-w4-g128" in refused["exllamav2"] and "awq-w4-g128" not in refused["vllm"]
    assert "gptq-w3-g128" in refused["vllm"]


def test_where_nothing_fits_the_exit_code_is_1(home: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    code, out, _ = choose(home, monkeypatch, capsys, "--vram", "0.1", "--context", "512")
    assert code == 1 and "No arm of this run fits 1 x 512 tokens on a card of 0.1 GiB" in out


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (("--vram", "0", "--context", "512"), "have to be above zero"),
        (("--vram", "24", "--context", "900000"), "the base ends at"),
    ],
)
def test_numbers_that_mean_nothing_are_refused(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, words: tuple[str, ...], why: str
) -> None:
    code, _, err = choose(home, monkeypatch, capsys, *words)
    assert code == 2 and why in err


# ---- several cards


def test_a_card_of_several_keeps_its_key_value_heads_and_at_least_one() -> None:
    whole = cache_of(described(**LLAMA_8B)).per_token("int8")
    for ranks, eighths in {1: 8, 2: 4, 4: 2, 8: 1, 16: 1}.items():
        assert cache_of(described(**LLAMA_8B), ranks=ranks).per_token("int8") == eighths * whole / 8


def test_cards_are_counted_and_said(home: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    words = ("--vram", "24", "--context", "512", "--batch", "8", "--engine", "vllm")
    told = {}
    for cards in (1, 2):
        code, out, _ = choose(home, monkeypatch, capsys, *words, "--tensor-parallel", str(cards), "--json")
        told[cards] = json.loads(out)
        assert code == 0 and told[cards]["tensor_parallel"] == cards and told[cards]["confirmed_on_gpu"] is False
    one, two = ({arm["arm"]: arm for arm in told[cards]["arms"]} for cards in (1, 2))
    bf16 = "merged-dequantized"
    assert one[bf16]["weights"] / 2 < two[bf16]["weights"] < 0.52 * one[bf16]["weights"]  # the norms are whole
    assert two[bf16]["cache_bytes"] * 2 == one[bf16]["cache_bytes"]  # the quickstart has two key-value heads
    assert told[2]["allowance_bytes"] < told[1]["allowance_bytes"]
    _, out, _ = choose(home, monkeypatch, capsys, *words, "--tensor-parallel", "2")
    said = " ".join(out.split())
    assert "on each of 2 cards of 24 GiB" in said and "no GPU has confirmed it over 2 cards" in said
    _, out, _ = choose(home, monkeypatch, capsys, *words)
    assert "on a card of 24 GiB" in " ".join(out.split()) and "no GPU has confirmed it." in " ".join(out.split())


def test_heads_and_groups_that_do_not_come_apart_are_refused(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """The quickstart has 4 heads of 64, and 768 inputs of down_proj: of 4 cards each gets 1.5 groups of 128."""
    words = ("--vram", "24", "--context", "512", "--engine", "vllm", "--json", "--tensor-parallel")
    refused = {}
    for cards in ("3", "4"):
        _, out, _ = choose(home, monkeypatch, capsys, *words, cards)
        refused[cards] = {arm["arm"]: arm["refused"] for arm in json.loads(out)["arms"]}
    assert "3 ranks do not divide the 4 attention heads" in refused["3"]["merged-dequantized"]
    assert refused["4"]["merged-dequantized"] is None
    assert "is cut apart over 4 ranks" in refused["4"]["gptq-w4-g128"]


def test_only_vllm_splits(home: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    words = ("--vram", "24", "--context", "512", "--tensor-parallel")
    for engine in ((), ("--engine", "exllamav2")):
        code, _, err = choose(home, monkeypatch, capsys, *words, "2", *engine)
        assert code == 2 and "--tensor-parallel 2 --engine vllm" in err
    code, _, err = choose(home, monkeypatch, capsys, *words, "0")
    assert code == 2 and "have to be above zero" in err
