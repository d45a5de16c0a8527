"""Mixtures: experts that nothing trains are copied whatever their layout, trained ones are merged by PEFT."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tasks.jobs import merge
from tasks.jobs.loading.load import load_arm
from tasks.runtime.process.errors import StageError
from tests.jobs.architectures import MOE_TARGETS, train_adapter, write_architecture
from tests.jobs.build import make_job, notes
from tests.jobs.merging.test_architectures import BOUNDS, log_probs
from tests.jobs.quantized import mean_kl
from tests.jobs.test_merge import FAITHFUL

EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


@pytest.mark.parametrize("name", ["qwen3-moe", "gpt-oss"])
def test_untouched_experts_of_a_base_in_fp32_are_rounded_like_the_rest(name: str, tmp_path: Path) -> None:
    """The model's own types hold for them: bf16, and fp32 where transformers keeps it."""
    base = write_architecture(tmp_path / "base", name)
    adapter = train_adapter(base, tmp_path / "adapter", target_modules=MOE_TARGETS)
    wide = shutil.copytree(base, tmp_path / "wide")
    tensors = {key: tensor.float() for key, tensor in load_file(base / "model.safetensors").items()}
    save_file(tensors, wide / "model.safetensors", metadata={"format": "pt"})
    stored = {}
    for source in (base, wide):
        job = make_job(
            "merge", tmp_path / source.name / "out", params={"onto": "original"}, base=source, adapter=adapter
        )
        assert merge.run(job)["by"] == "stream"
        stored[source.name] = load_file(job.out / "model.safetensors")
    before = load_file(base / "model.safetensors")
    assert stored["base"].keys() == stored["wide"].keys() == before.keys()
    for key, tensor in stored["wide"].items():
        assert tensor.dtype == stored["base"][key].dtype and torch.equal(tensor, stored["base"][key]), key
        assert "experts" not in key or torch.equal(tensor, before[key])


@pytest.mark.parametrize("name", ["qwen3-moe", "gpt-oss"])
@pytest.mark.parametrize("parameters", [EXPERTS, EXPERTS[1:]], ids=["both", "down"])
def test_trained_experts_are_the_trained_model(name: str, parameters: list[str], tmp_path: Path) -> None:
    base = write_architecture(tmp_path / "base", name)
    lora: dict[str, Any] = {"target_parameters": parameters, "target_modules": MOE_TARGETS}
    adapter = train_adapter(base, tmp_path / "adapter", **lora)
    job = make_job("merge", tmp_path / "out", params={"onto": "dequantized"}, base=base, adapter=adapter)
    result = merge.run(job)
    assert (result["by"], result["record"]) == ("peft", "exact") and "target_parameters" in notes(job)["merge"]
    trained = log_probs(load_arm("nf4", base, adapter=adapter, device="cpu"))
    plain = log_probs(AutoModelForCausalLM.from_pretrained(job.out).eval())
    untrained = mean_kl(trained, log_probs(load_arm("nf4", base, device="cpu")))
    assert mean_kl(trained, plain) < BOUNDS.get(name, FAITHFUL) < untrained / 10
    before, after = load_file(base / "model.safetensors"), load_file(job.out / "model.safetensors")
    assert before.keys() == after.keys()
    config = json.loads((base / "config.json").read_text())
    assert json.loads((job.out / "config.json").read_text())["architectures"] == config["architectures"]


def test_a_part_that_fits_nothing_is_refused_by_pefts_merge_too(tmp_path: Path) -> None:
    base = write_architecture(tmp_path / "base", "qwen3-moe")
    adapter = train_adapter(base, tmp_path / "adapter", target_parameters=EXPERTS, target_modules=["q_proj"])
    tensors = load_file(adapter / "adapter_model.safetensors")
    tensors["base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight"] = torch.ones(8, 128)
    save_file(tensors, adapter / "adapter_model.safetensors")
    job = make_job("merge", tmp_path / "out", params={"onto": "original"}, base=base, adapter=adapter)
    with pytest.raises(StageError, match="does not fit this base") as refused:
        merge.run(job)
    assert "layers.9.self_attn.q_proj" in refused.value.problem.where
    assert not list(job.out.glob("*.safetensors"))


def write_one_by_one(folder: Path, base: Path) -> Path:
    """An adapter as PEFT saved it with transformers 4, where every expert of Qwen3-MoE was three linear layers."""
    folder.mkdir()
    generator, tensors = torch.Generator().manual_seed(0), {}
    for name, weight in load_file(base / "model.safetensors").items():
        if ".experts." in name or "q_proj" in name:
            for part, shape in (("lora_A", (4, weight.shape[1])), ("lora_B", (weight.shape[0], 4))):
                key = f"base_model.model.{name.removesuffix('.weight')}.{part}.weight"
                tensors[key] = 0.05 * torch.randn(shape, generator=generator)
    save_file(tensors, folder / "adapter_model.safetensors")
    lora = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8}
    config = lora | {"target_modules": ["q_proj", "gate_proj", "up_proj", "down_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def test_experts_one_by_one_of_transformers_4(tmp_path: Path) -> None:
    base = write_architecture(tmp_path / "base", "qwen3-moe")
    adapter = write_one_by_one(tmp_path / "adapter", base)
    outs = {}
    for onto in ("original", "dequantized"):
        job = make_job("merge", tmp_path / onto, params={"onto": onto}, base=base, adapter=adapter)
        assert merge.run(job)["by"] == "stream"
        outs[onto] = load_file(job.out / "model.safetensors")
    trained = log_probs(load_arm("bf16", base, adapter=adapter, device="cpu"))  # PEFT stacks the parts of the adapter
    plain = log_probs(AutoModelForCausalLM.from_pretrained(tmp_path / "original").eval())
    untrained = mean_kl(trained, log_probs(load_arm("bf16", base, device="cpu")))
    assert mean_kl(trained, plain) < FAITHFUL < untrained / 10
    before = load_file(base / "model.safetensors")
    lost = {name for name in before if not torch.equal(outs["original"][name], outs["dequantized"][name])}
    quantized = {name for name in before if "_proj" in name or name.endswith("mlp.gate.weight")}
    assert lost == quantized  # as bitsandbytes has them in transformers 4
