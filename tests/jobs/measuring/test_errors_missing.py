"""What fails after the quantizer has finished never costs the model; what is a fault of ours still raises."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from recipes.models.headers import read_headers
from recipes.schemes.scheme import Scheme
from tasks.jobs import quantize
from tasks.jobs.backends import LayerRecord, Quantized
from tasks.jobs.loading.load import load_bf16
from tasks.jobs.measuring.block_errors import visiting
from tasks.runtime.process.errors import StageError
from tests.jobs.build import make_job, notes
from tests.jobs.quantized import params
from tests.tiny import write_base

ROWS = [[5, 6, 7, 8] * 16]


def error_of(act: object) -> Exception:
    with pytest.raises((MemoryError, RuntimeError, StageError)) as caught:
        act()  # type: ignore[operator]
    return caught.value


def test_a_lack_of_memory_and_a_model_that_does_not_load_are_reasons() -> None:
    torchs = error_of(lambda: torch.empty(1 << 52, dtype=torch.uint8))
    assert "you tried to allocate 4503599627370496 bytes" in str(quantize._reason(torchs))
    assert quantize._reason(error_of(lambda: bytearray(1 << 62))) == "out of memory (MemoryError)"
    gpu = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.50 GiB.\nmore")
    assert quantize._reason(gpu) == "out of memory (CUDA out of memory. Tried to allocate 1.50 GiB.)"
    refusal = StageError.of(what="3 weights are missing", where="x", why="random numbers", next="-")
    assert quantize._reason(refusal) == "3 weights are missing: random numbers"


def test_any_other_error_is_none() -> None:
    assert quantize._reason(error_of(lambda: torch.ones(2) @ torch.ones(3))) is None


def test_a_quantized_model_that_does_not_load_stays_and_the_record_says_why(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base")
    headers, scheme = read_headers(base), Scheme.of(params("gptq-w4-g32"), slug="gptq-w4-g32")
    job = make_job("quantize", tmp_path / "out", params=params("gptq-w4-g32"), model=base)
    config = json.loads((base / "config.json").read_text())
    stored = {"quant_method": "gptq", "bits": 4, "group_size": 32, "checkpoint_format": "gptq", "sym": True}
    (job.out / "config.json").write_text(json.dumps(config | {"quantization_config": stored}))  # and no weights
    made = Quantized(backend="gptqmodel", packer="-", layers=[LayerRecord(name=headers.linears[0].name)])
    errors = quantize._errors(job, scheme, headers, rows=ROWS, quantized=made)
    assert errors.measured is None and "no *.safetensors" in errors.missing["no_errors"]
    assert len(errors.blocks) == 4 and all(block.weight_std > 0 for block in errors.blocks)
    assert all(block.output_error is None for block in errors.blocks)
    assert "The quantized model is whole" in notes(job)["errors by layer"]


def test_a_fault_of_ours_is_no_reason(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base")
    headers, scheme = read_headers(base), Scheme.of(params("gptq-w4-g32"), slug="gptq-w4-g32")
    job = make_job("quantize", tmp_path / "out", params=params("gptq-w4-g32"), model=base)
    made = Quantized(backend="gptqmodel", packer="-", layers=[])
    with pytest.raises(IndexError):  # a token that the embeddings do not have
        quantize._errors(job, scheme, headers, rows=[[10**6]], quantized=made)


@torch.inference_mode()
def test_weights_that_visit_the_device_give_the_same_outputs(tmp_path: Path) -> None:
    """As the original does on CUDA; here the host visits itself."""
    base = write_base(tmp_path / "base")
    tokens, kept = torch.tensor(ROWS), []
    for away in (False, True):
        model = load_bf16(base, device="cpu")
        if away:
            model = visiting(model, torch.device("cpu"))
            assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
        outputs: list[torch.Tensor] = []
        for layer in model.model.layers:
            layer.mlp.register_forward_hook(lambda _, __, output, into=outputs: into.append(output.cpu()))
        kept.append([*outputs, model(tokens, use_cache=False).logits, *outputs])
    assert len(kept[0]) == len(kept[1]) == 3
    assert all(torch.equal(here, there) for here, there in zip(*kept, strict=True))
