"""Loaders: what is 4-bit and what is not, the kernel switch, refusals."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from bitsandbytes.functional import has_avx512bf16

from tasks.jobs.backends.load import attach, kernel_of, linear4bit, load_arm, load_bf16, load_nf4
from tasks.runtime.errors import StageError
from tests.tiny import write_base

TOKENS = torch.arange(4, 44).view(2, 20)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("base"), tied=False)


def test_nf4_quantizes_every_linear_layer_but_lm_head(base: Path) -> None:
    model = load_nf4(base, device="cpu")
    assert len(linear4bit(model)) == 2 * 7  # two decoder layers of q k v o gate up down
    assert type(model.lm_head) is torch.nn.Linear
    assert model.lm_head.weight.dtype == model.get_input_embeddings().weight.dtype == torch.bfloat16
    assert all(layer.weight.quant_state.nested for layer in linear4bit(model).values())
    assert kernel_of(model) == "Linear4bit"
    assert not model.training


def test_bf16_has_no_quantized_layer(base: Path) -> None:
    model = load_bf16(base, device="cpu")
    assert kernel_of(model) == "Linear"
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


@torch.no_grad()
def test_nf4_weights_survive_an_evaluation(base: Path) -> None:
    """Without the switch the first forward repacks each layer: 25 % of the dequantized weights change."""
    evaluated, untouched = load_nf4(base, device="cpu"), load_nf4(base, device="cpu")
    evaluated(TOKENS)
    pairs = zip(evaluated.dequantize().parameters(), untouched.dequantize().parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


@torch.no_grad()
@pytest.mark.skipif(not has_avx512bf16(), reason="this CPU lacks AVX512-BF16, so bitsandbytes never repacks")
def test_the_switch_is_what_keeps_them(base: Path) -> None:
    model = load_nf4(base, device="cpu")
    for layer in linear4bit(model).values():
        layer.support_avx512bf16_for_cpu = True
    model(TOKENS)
    assert all(layer.weight.quant_state.packing_format_for_cpu for layer in linear4bit(model).values())


def test_a_pickle_only_folder_is_refused(tmp_path: Path, base: Path) -> None:
    (tmp_path / "config.json").write_text((base / "config.json").read_text())
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(StageError, match="safetensors"):
        load_bf16(tmp_path, device="cpu")


def test_an_adapter_without_safetensors_is_refused(tmp_path: Path, base: Path) -> None:
    torch.save({}, tmp_path / "adapter_model.bin")
    with pytest.raises(StageError, match=r"adapter_model\.safetensors"):
        attach(load_bf16(base, device="cpu"), tmp_path)


def test_an_unquantized_model_is_not_taken_for_a_quantized_one(base: Path) -> None:
    with pytest.raises(StageError, match="quantization_config"):
        load_arm("quantized", base, device="cpu")
