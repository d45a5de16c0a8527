"""Each architecture, really trained on NF4: the stream gives PEFT's merge, and the model that was trained."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from tasks.jobs import merge
from tasks.jobs.loading.load import attach, load_arm
from tasks.jobs.merging.peft_merge import load_dequantized
from tests.jobs.architectures import MOE_TARGETS, tokens, train_adapter, write_architecture
from tests.jobs.build import make_job
from tests.jobs.quantized import mean_kl
from tests.jobs.test_merge import FAITHFUL

FAST = ("llama", "gpt2", "phi3", "gpt-oss")
ALL = ("llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3", "phi3", "gpt2", "qwen3-moe", "gpt-oss")
# gpt-oss: measured 1.3e-4 to 2.8e-4 where the weights are PEFT's within a bf16 step; perhaps a rounding chooses other
# experts, which was not looked into. The untrained base is at 6e-2.
BOUNDS = {"gpt-oss": 1e-3}
NAMES = [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in ALL]


def steps_apart(a: Tensor, b: Tensor) -> Tensor:
    """Distance in bf16 steps, where it is more than what two orders of summation in fp32 make of weights below 1."""

    def order(tensor: Tensor) -> Tensor:
        bits = tensor.view(torch.int16).int()
        return torch.where(bits < 0, -(bits & 0x7FFF), bits)

    apart = (order(a) - order(b)).abs()
    return torch.where((a.float() - b.float()).abs() < 2e-7, 0, apart)


def log_probs(model: torch.nn.Module) -> Tensor:
    """[rows * tokens, vocab] in fp32."""
    with torch.no_grad():
        return model(tokens(8)).logits.float().log_softmax(-1).flatten(0, 1)


@pytest.mark.parametrize("name", NAMES)
def test_the_stream_is_pefts_merge_and_the_trained_model(name: str, tmp_path: Path) -> None:
    base = write_architecture(tmp_path / "base", name, shard="200KB")  # several shards
    lora = {"target_modules": MOE_TARGETS} if name in ("qwen3-moe", "gpt-oss") else {}
    adapter = train_adapter(base, tmp_path / "adapter", **lora)
    job = make_job("merge", tmp_path / "out", params={"onto": "dequantized"}, base=base, adapter=adapter)
    result = merge.run(job)
    assert (result["by"], result["record"], result["base_type"]) == ("stream", "exact", "nf4")
    assert result["modules_exact"] == result["four_bit"] >= result["layers"] > 0

    plain = AutoModelForCausalLM.from_pretrained(job.out)
    assert plain.dtype == torch.bfloat16
    expected = attach(load_dequantized(base, device="cpu"), adapter).merge_and_unload().state_dict()
    actual = plain.state_dict()
    assert actual.keys() == expected.keys()
    for key, tensor in expected.items():
        assert int(steps_apart(actual[key], tensor).max()) <= 1, key

    trained = log_probs(load_arm("nf4", base, adapter=adapter, device="cpu"))
    untrained = mean_kl(trained, log_probs(load_arm("nf4", base, device="cpu")))
    cost = mean_kl(trained, log_probs(plain.eval()))
    # Measured: 7e-6 (GPT-2) to 1.9e-5 (Qwen3-MoE); the untrained base is at 3e-2 to 9e-2.
    assert cost < BOUNDS.get(name, FAITHFUL) < untrained / 10, (cost, untrained)

    stored = {key for path in base.glob("*.safetensors") for key in load_file(path)}
    assert {key for path in job.out.glob("*.safetensors") for key in load_file(path)} == stored
