"""Adapters of every kind that train writes load by plain PEFT and give the trained model's logits; what stays bf16."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from tasks.jobs import train
from tasks.jobs.loading.load import load_arm, load_nf4
from tasks.jobs.training.unquantized import unquantized
from tasks.runtime.process.errors import StageError
from tests.jobs.build import notes
from tests.jobs.test_train import job_for

KINDS: dict[str, dict[str, Any]] = {
    "rslora": {"rslora": True},
    "dora": {"dora": True},
    "patterns": {"rank_pattern": {"q_proj": 2, "layers.1.mlp.down_proj": 8}, "alpha_pattern": {"q_proj": 1.0}},
    "saved": {"modules_to_save": ["lm_head", "norm"]},
    "targets": {"targets": ["q_proj", "v_proj"]},
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_adapter_loads_by_plain_peft_with_the_trained_logits(
    kind: str,
    base: Path,
    dataset: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    job = job_for(tmp_path / "out", base, dataset, max_steps=4, dropout=0.0, **KINDS[kind])
    trained: dict[str, Any] = {}
    add = train.add_adapter

    def remember(*args: Any) -> Any:
        trained["model"] = add(*args)
        return trained["model"]

    monkeypatch.setattr(train, "add_adapter", remember)  # to look at the model that `run` trained
    train.run(job)
    loaded = load_arm("nf4", base, adapter=job.out, device="cpu")
    ids = torch.arange(4, 200)[None]
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        expected, got = (model.eval()(ids).logits.float() for model in (trained["model"], loaded))
        with loaded.disable_adapter():
            without = loaded(ids).logits.float()
    # PEFT loads A and B as fp32 (equal to 0.001), but modules_to_save as the base's bf16: 0.0101 here.
    assert (got - expected).norm() < 0.02 * expected.norm()
    assert (got - without).norm() > 0.05 * expected.norm()  # four steps of the smallest move it by 0.078


def test_the_config_carries_what_the_recipe_asked_for(base: Path, dataset: Path, tmp_path: Path):
    settings: dict[str, Any] = {name: value for kind in KINDS.values() for name, value in kind.items()}
    settings |= {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 1.0}}
    job = job_for(tmp_path / "out", base, dataset, max_steps=1, **settings)
    train.run(job)
    config = json.loads((job.out / "adapter_config.json").read_text())
    assert config["use_rslora"] and config["use_dora"]
    assert config["rank_pattern"] == {"q_proj": 2} and config["alpha_pattern"] == {"q_proj": 1.0}
    assert config["modules_to_save"] == ["lm_head", "norm"] and config["target_modules"] == ["q_proj", "v_proj"]
    weights = load_file(job.out / "adapter_model.safetensors")
    ranks = {name.split(".")[-3]: len(kind) for name, kind in weights.items() if name.endswith("lora_A.weight")}
    assert ranks == {"q_proj": 2, "v_proj": 4}
    saved = {name.split(".")[-2] for name in weights if "lora" not in name}
    assert saved == {"lm_head", "norm", "input_layernorm", "post_attention_layernorm"}  # every name that ends in norm


def write_mixture(folder: Path, base: Path) -> Path:
    """A tiny Qwen3-MoE with the tokenizer of `base`."""
    for path in base.iterdir():
        if path.suffix != ".safetensors" and path.name != "config.json":
            (folder / path.name).write_bytes(path.read_bytes())
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 128, "moe_intermediate_size": 32, "num_experts": 8}
    heads = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    config = Qwen3MoeConfig(vocab_size=300, num_experts_per_tok=2, max_position_embeddings=512, **shape, **heads)
    Qwen3MoeForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


def test_experts_that_stay_bf16_are_refused_unless_accepted(base: Path, dataset: Path, tmp_path: Path):
    (tmp_path / "mixture").mkdir()
    mixture = write_mixture(tmp_path / "mixture", base)
    rest = unquantized(load_nf4(mixture, device="cpu"))
    experts = 2 * 8 * 3 * 64 * 32  # layers, experts, matrices
    assert rest.gib * (1 << 30) == pytest.approx(2 * (experts + 2 * 8 * 64))  # bf16; a router a layer stays, too
    assert rest.share > 0.8 and "experts" in rest.largest
    with pytest.raises(StageError, match="stay bf16") as refused:
        train.run(job_for(tmp_path / "refused", mixture, dataset))
    assert "accept_unquantized" in refused.value.problem.next
    job = job_for(tmp_path / "accepted", mixture, dataset, max_steps=1, dropout=0.0, accept_unquantized=True)
    assert train.run(job)["steps"] == 1
    assert "GiB" in notes(job)["unquantized"]
    assert unquantized(load_nf4(base, device="cpu")).share == 0
