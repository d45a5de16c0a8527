"""compressed-tensors files load in plain transformers as the weights that they stand for, mixed grids among them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

from recipes.models.headers import read_headers
from recipes.schemes.scheme import Grid, Rule, Scheme
from recipes.schemes.serve_file import describe, readable
from recipes.schemes.slugs import parse_scheme
from tasks.jobs.backends.llm_compressor import targets
from tasks.jobs.loading.kernels import kernel_of
from tasks.jobs.loading.load import attach, load_arm, load_bf16
from tests.jobs.backends import compressed
from tests.jobs.quantized import log_probs, mean_kl
from tests.tiny import write_base

NAMES = [
    f"model.layers.{layer}.{part}"
    for layer in range(2)
    for part in (
        *(f"self_attn.{one}_proj" for one in "qkvo"),
        *(f"mlp.{one}_proj" for one in ("gate", "up", "down")),
    )
]


def ruled(*rules: Rule) -> Scheme:
    return Scheme(
        slug="ruled",
        method="gptq",
        grid=Grid(4, 64, True),
        backend="llm-compressor",
        form="compressed-tensors",
        rules=rules,
    )


MIXED = ruled(  # bits, groups and zero points differ, one layer stays as it is
    Rule(r"layers\.0\.mlp\.down_proj", None),
    Rule("self_attn", Grid(8, -1, True)),
    Rule(r"layers\.1\.mlp\.(gate|up)_proj", Grid(3, 32, False)),
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("compressed") / "base", tied=False)


@pytest.mark.parametrize(
    "scheme",
    [
        *map(parse_scheme, ("ct-gptq-w4-g128", "ct-gptq-w3-g128", "ct-gptq-w8", "ct-awq-w4-g32")),
        parse_scheme("ct-gptq-w4-attn32-ffn128"),
        MIXED,
    ],
    ids=lambda scheme: scheme.slug,
)
def test_what_is_loaded_is_what_the_file_says_bit_for_bit(scheme: Scheme, base: Path, tmp_path: Path) -> None:
    compressed.write(base, tmp_path / "out", scheme)
    loaded, meant = load_arm("quantized", tmp_path / "out", device="cpu"), load_bf16(base, device="cpu")
    assert kernel_of(loaded) == "Linear (unpacked from compressed-tensors)"
    expected = compressed.layers(tmp_path / "out", scheme)
    assert set(expected) == {name for name in NAMES if scheme.grid_of(name)}
    assert all(torch.equal(loaded.get_submodule(name).weight, weight) for name, weight in expected.items())
    original = log_probs(meant)
    meant.load_state_dict({f"{name}.weight": weight for name, weight in expected.items()}, strict=False)
    assert torch.equal(log_probs(loaded), log_probs(meant))
    assert mean_kl(original, log_probs(loaded)) > 1e-7  # and rounding was done at all


def plain(folder: Path, **extra: object) -> torch.nn.Module:
    """As anybody loads it."""
    return AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.bfloat16, **extra).eval()


def test_transformers_alone_reads_symmetric_files_of_mixed_grids(base: Path, tmp_path: Path) -> None:
    compressed.write(base, tmp_path / "out", parse_scheme("ct-gptq-w4-attn32-ffn128"))
    assert torch.equal(
        log_probs(plain(tmp_path / "out")), log_probs(load_arm("quantized", tmp_path / "out", device="cpu"))
    )


def test_why_loading_is_not_left_to_transformers_alone(base: Path, tmp_path: Path) -> None:
    """transformers 5.23 and compressed-tensors 0.20; the day this fails, tasks/jobs/loading/compressed.py shrinks."""
    for slug in ("ct-awq-w4-g128", "ct-gptq-w4-attn32-ffn128"):
        compressed.write(base, tmp_path / slug, parse_scheme(slug))
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        plain(tmp_path / "ct-awq-w4-g128")
    dense = CompressedTensorsConfig(dequantize=True)  # reads zero points, but one group for all
    ours = log_probs(load_arm("quantized", tmp_path / "ct-awq-w4-g128", device="cpu"))
    assert torch.equal(log_probs(plain(tmp_path / "ct-awq-w4-g128", quantization_config=dense)), ours)
    with pytest.raises(RuntimeError):
        plain(tmp_path / "ct-gptq-w4-attn32-ffn128", quantization_config=dense)


@pytest.mark.parametrize("slug", ["ct-awq-w4-g32", "ct-gptq-w4-attn32-ffn128"])
def test_the_serve_file_s_python_loads_it(
    slug: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, scheme = tmp_path / "out", parse_scheme(slug)
    compressed.write(base, out, scheme)
    (code,) = re.findall(r"```python\n(.*?)```", readable(describe(read_headers(base), name="x", scheme=scheme)), re.S)
    monkeypatch.chdir(out)
    names: dict[str, Any] = {}
    exec(code, names)
    assert torch.equal(log_probs(names["model"]), log_probs(load_arm("quantized", out, device="cpu")))


def test_an_adapter_goes_on_top(base: Path, tmp_path: Path) -> None:
    """As arms `ct-....on-base` are loaded."""
    scheme, adapter = parse_scheme("ct-gptq-w4-attn32-ffn128"), tmp_path / "adapter"
    settings = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(load_bf16(base, device="cpu"), settings).save_pretrained(adapter)
    compressed.write(base, tmp_path / "out", scheme)
    loaded = log_probs(load_arm("quantized", tmp_path / "out", device="cpu", adapter=adapter))
    meant = load_bf16(base, device="cpu")
    state = {f"{name}.weight": weight for name, weight in compressed.layers(tmp_path / "out", scheme).items()}
    meant.load_state_dict(state, strict=False)
    without = log_probs(meant)
    assert torch.equal(loaded, log_probs(attach(meant, adapter))) and mean_kl(without, loaded) > 1e-3


def test_scales_of_the_kv_cache_enter_the_logits(base: Path, tmp_path: Path) -> None:
    """So what an FP8 cache costs is measured with everything else. 448 is the largest number of FP8 E4M3."""
    scheme = parse_scheme("ct-gptq-w4-g128")
    for name, scale in (("plain", None), ("good", 0.05), ("bad", 1e-4)):  # bad: |k| and |v| above 0.0448 are cut off
        compressed.write(base, tmp_path / name, scheme, kv_scale=scale)
    plain, good, bad = (
        log_probs(load_arm("quantized", tmp_path / one, device="cpu")) for one in ("plain", "good", "bad")
    )
    assert 0 < mean_kl(plain, good) < mean_kl(plain, bad) / 10


def test_targets_cover_each_layer_once_and_fused_names_too() -> None:
    assert targets(parse_scheme("ct-gptq-w4-g128"), NAMES) == {Grid(4, 128, True): ["Linear"]}
    assert targets(parse_scheme("ct-gptq-w4-attn32-ffn128"), NAMES) == {
        Grid(4, 32, True): [r"re:model\.layers\.\d+\.self_attn\.(q_proj|k_proj|v_proj|o_proj|qkv_proj)$"],
        Grid(4, 128, True): [r"re:model\.layers\.\d+\.mlp\.(gate_proj|up_proj|down_proj|gate_up_proj)$"],
    }
    by_grid = targets(MIXED, NAMES)
    for name in NAMES:
        grids = [grid for grid, patterns in by_grid.items() if any(re.match(one[3:], name) for one in patterns)]
        assert grids == ([] if MIXED.grid_of(name) is None else [MIXED.grid_of(name)])
    fused = "model.layers.1.mlp.gate_up_proj"
    assert [g for g, patterns in by_grid.items() if any(re.match(p[3:], fused) for p in patterns)] == [
        Grid(3, 32, False)
    ]
