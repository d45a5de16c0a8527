"""The jobs that touch weights, on CUDA: the same code, other kernels. `make test-gpu`; docs/gpu.md has what passed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from recipes.schema import Train
from tasks.jobs import merge, prepare, quantize, train
from tasks.jobs.loading.kernels import kernel_of
from tasks.jobs.loading.load import load_arm
from tests.jobs.build import make_job, write_jsonl
from tests.jobs.quantized import COST, mean_kl, params, write_calibset
from tests.jobs.test_merge import FAITHFUL, log_probs
from tests.jobs.test_prepare import PARAMS, questions

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU here")]
SETTINGS = Train(rank=4, learning_rate=5e-3, batch_size=8, max_steps=12).model_dump()


def on_gpu(model: torch.nn.Module) -> torch.Tensor:
    """log_probs feeds CPU tokens: let the model take them to its device."""
    model.register_forward_pre_hook(lambda _, args: tuple(one.cuda() for one in args))
    return log_probs(model).cpu()


def test_a_gpu_adapter_merges_faithfully(base: Path, tmp_path: Path):
    data = write_jsonl(tmp_path / "rows.jsonl", questions(80))
    dataset, adapter, merged = tmp_path / "dataset", tmp_path / "adapter", tmp_path / "merged"
    prepare.run(make_job("prepare", dataset, params=PARAMS, data=data, tokenizer=base))
    result = train.run(make_job("train", adapter, params=SETTINGS, base=base, dataset=dataset, device="cuda"))
    assert result["gradient_cosine"] > 0.999
    onto = {"onto": "dequantized"}
    merge.run(make_job("merge", merged, params=onto, base=base, adapter=adapter, device="cuda"))
    reference = on_gpu(load_arm("nf4", base, adapter=adapter, device="cuda"))
    assert mean_kl(reference, on_gpu(load_arm("bf16", merged, device="cuda"))) < FAITHFUL


# Groups of 32 are not Machete's, GPTQModel's first choice on Hopper; those of 64 and one a channel are.
@pytest.mark.parametrize(
    "slug", ["gptq-w4-g32", "gptq-w4-g64", "rtn-w4", "gptq-w3-g32", "awq-w4-g32", "rtn-w4-g32", "gptq-w4-g32-asym"]
)
def test_schemes_made_and_loaded_on_a_gpu(base: Path, tmp_path: Path, slug: str):
    calibset, out = write_calibset(tmp_path / "calibset"), tmp_path / "out"
    quantize.run(make_job("quantize", out, params=params(slug), model=base, calibset=calibset, device="cuda"))
    loaded = load_arm("quantized", out, device="cuda")
    assert "Machete" not in kernel_of(loaded) and loaded.dtype == torch.bfloat16
    reference = on_gpu(load_arm("bf16", base, device="cuda"))
    assert 0 < mean_kl(reference, on_gpu(loaded)) < COST[params(slug)["bits"]]
