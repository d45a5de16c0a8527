"""Loaders: what is 4-bit and what is not, the kernel switch, refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import has_avx512bf16
from transformers import AwqConfig
from transformers.quantizers.auto import AutoHfQuantizer
from transformers.quantizers.quantizer_awq import AwqQuantizer

from tasks.jobs.loading import kernels
from tasks.jobs.loading.environment import tame_gptqmodel
from tasks.jobs.loading.kernels import kernel_of
from tasks.jobs.loading.load import attach, awq_in_bf16, linear4bit, load_arm, load_bf16, load_nf4
from tasks.runtime.process.errors import StageError
from tests.tiny import write_base

TOKENS = torch.arange(4, 44).view(2, 20)
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"}
ON_CUDA = [
    (GPTQ, "gptq_marlin"),
    (GPTQ | {"bits": 8, "group_size": -1}, "gptq_marlin"),
    (GPTQ | {"bits": 3}, "gptq_torch"),
    (GPTQ | {"sym": False}, "gptq_torch"),  # Marlin's GPTQ layers read no zero points
    (GPTQ | {"group_size": 16}, "gptq_torch"),
    (AWQ, "marlin"),
]


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


@pytest.mark.parametrize(("stored", "kernel"), ON_CUDA)
def test_on_cuda_no_kernel_is_taken_that_would_fetch_its_source(
    monkeypatch: pytest.MonkeyPatch, stored: dict[str, Any], kernel: str
) -> None:
    """And the one that is named reads the scheme, by what GPTQModel declares of it."""
    monkeypatch.setattr(kernels, "_no_marlin", lambda: None)
    assert kernels.choose_kernel(stored, device="cuda", note=pytest.fail) == kernel
    tame_gptqmodel()
    from gptqmodel.models._const import DEVICE
    from gptqmodel.quantization import FORMAT, METHOD
    from gptqmodel.utils.backend import BACKEND
    from gptqmodel.utils.importer import get_kernel_for_backend

    method = METHOD(stored["quant_method"])
    layer = get_kernel_for_backend(BACKEND(kernel), method, FORMAT.GEMM if method == METHOD.AWQ else FORMAT.GPTQ)
    assert stored["bits"] in layer.SUPPORTS_BITS and stored["group_size"] in layer.SUPPORTS_GROUP_SIZE
    assert stored.get("sym", False) in layer.SUPPORTS_SYM and torch.bfloat16 in layer.SUPPORTS_DTYPES
    assert {DEVICE.CUDA, DEVICE.ALL} & set(layer.SUPPORTS_DEVICES)


@pytest.mark.parametrize(("stored", "kernel"), [(GPTQ, "gptq_torch"), (AWQ, "torch_awq")])
def test_without_marlin_torch_takes_over_and_the_reason_is_told(
    monkeypatch: pytest.MonkeyPatch, stored: dict[str, Any], kernel: str
) -> None:
    notes: list[tuple[str, str]] = []
    monkeypatch.setattr(kernels, "_no_marlin", lambda: "no nvcc here")
    assert kernels.choose_kernel(stored, device="cuda", note=lambda *note: notes.append(note)) == kernel
    assert notes == [("kernel", "no nvcc here, so these layers run in plain torch, and slower")]


def test_layouts_of_awq_with_one_kernel_each_are_left_to_transformers() -> None:
    assert kernels.choose_kernel(AWQ | {"version": "gemv"}, device="cuda", note=pytest.fail) is None


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
def test_of_the_config_that_is_passed_the_kernel_alone_counts() -> None:
    merged: Any = AutoHfQuantizer.merge_quantization_configs(AWQ, AwqConfig(bits=8, backend="marlin"))
    assert (merged.backend, merged.bits, merged.group_size) == ("marlin", 4, 128)


def test_awq_stays_in_bf16_where_cuda_is(monkeypatch: pytest.MonkeyPatch) -> None:
    quantizer = AwqQuantizer(AwqConfig(bits=4), pre_quantized=True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with awq_in_bf16():
        assert quantizer.update_dtype(torch.bfloat16) == torch.bfloat16
    assert quantizer.update_dtype(torch.bfloat16) == torch.float16  # so the switch is still needed
