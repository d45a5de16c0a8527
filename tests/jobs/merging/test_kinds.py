"""Every kind of adapter: merged, it is the model that was trained on NF4."""

from __future__ import annotations

import json
import resource
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from tasks.jobs import merge
from tasks.jobs.loading.load import attach, load_arm, load_nf4
from tasks.jobs.merging.rows import PART
from tasks.runtime.process.errors import StageError
from tasks.runtime.process.job import Job
from tests.jobs.architectures import SHAPE, save, tokens, train_adapter, write_architecture
from tests.jobs.build import make_job, notes
from tests.jobs.merging.test_architectures import log_probs
from tests.jobs.quantized import mean_kl
from tests.jobs.test_merge import FAITHFUL

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TOKENS = tokens(seed=2)[0, :4].unique().tolist()  # of those that are trained on
KINDS: dict[str, dict[str, Any]] = {
    "rslora with patterns": {
        "use_rslora": True,
        "rank_pattern": {"q_proj": 4, r"layers\.1\.mlp\.up_proj": 2},
        "alpha_pattern": {"layers.0.self_attn.o_proj": 3},
    },
    "dora": {"use_dora": True},
    "biases": {"bias": "all"},
    "lora bias": {"lora_bias": True, "target_modules": ["q_proj", "k_proj", "v_proj"]},
    "both embeddings saved": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "output layer saved": {"modules_to_save": ["lm_head"]},
    "lora on embeddings": {"target_modules": [*LINEAR, "embed_tokens"]},
    "lora on the output layer": {"target_modules": [*LINEAR, "lm_head"]},
    "some tokens": {"trainable_token_indices": TOKENS},
    "some tokens of the output layer": {"trainable_token_indices": {"lm_head": TOKENS}},
    "other tokens of each side": {"trainable_token_indices": {"embed_tokens": TOKENS[:2], "lm_head": TOKENS[2:]}},
    "some layers": {"target_modules": LINEAR, "layers_to_transform": [1], "layers_pattern": "layers"},
    "all but some modules": {"target_modules": LINEAR, "exclude_modules": r".*\.0\.mlp\..*"},
}
UNTIED = {
    "both embeddings saved",
    "output layer saved",
    "lora on embeddings",
    "lora on the output layer",
    "some tokens of the output layer",
    "other tokens of each side",
}


def job_for(out: Path, base: Path, adapter: Path, *, onto: str = "dequantized", **params: Any) -> Job:
    return make_job("merge", out, params={"onto": onto, **params}, base=base, adapter=adapter)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Qwen2: biases, and tied embeddings."""
    return write_architecture(tmp_path_factory.mktemp("base"), "qwen2", tied=True)


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_adapter(base, tmp_path_factory.mktemp("adapter"))


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_is_the_trained_model(base: Path, tmp_path: Path, kind: str) -> None:
    adapter = train_adapter(base, tmp_path / "adapter", **KINDS[kind])
    job = job_for(tmp_path / "out", base, adapter)
    result = merge.run(job)
    assert result["by"] == "stream" and result["record"] == "exact"
    trained = log_probs(load_arm("nf4", base, adapter=adapter, device="cpu"))
    untrained = mean_kl(trained, log_probs(load_arm("nf4", base, device="cpu")))
    plain = AutoModelForCausalLM.from_pretrained(job.out).eval()
    cost = mean_kl(trained, log_probs(plain))
    # Measured: 6e-6 to 1.5e-5 over the kinds, DoRA 9e-6; the untrained base is at 5e-2 to 3e-1.
    assert cost < FAITHFUL < untrained / 10, (cost, untrained)
    config = json.loads((job.out / "config.json").read_text())
    assert config["tie_word_embeddings"] is (kind not in UNTIED)
    assert (plain.lm_head.weight is plain.model.embed_tokens.weight) is (kind not in UNTIED)
    assert bool(result["untied"]) is (kind in UNTIED)


def test_equal_copies_of_tied_embeddings_stay_tied(base: Path, adapter: Path, tmp_path: Path) -> None:
    """Both saved and equal, or a copy of the base's own: nothing to untie."""
    for changed in (True, False):
        copy = shutil.copytree(adapter, tmp_path / f"adapter-{changed}")
        tensors = load_file(copy / "adapter_model.safetensors")
        table = load_file(base / "model.safetensors")["model.embed_tokens.weight"] * (2 if changed else 1)
        tensors["base_model.model.model.embed_tokens.weight"] = table
        if changed:
            tensors["base_model.model.lm_head.weight"] = table.clone()
        save_file(tensors, copy / "adapter_model.safetensors")
        job = job_for(tmp_path / f"out-{changed}", base, copy)
        assert merge.run(job)["untied"] == []
        stored = load_file(job.out / "model.safetensors")
        assert "lm_head.weight" not in stored and torch.equal(stored["model.embed_tokens.weight"], table)


@pytest.mark.parametrize("tied", [True, False])
def test_added_tokens_make_the_vocabulary_longer(tmp_path: Path, tied: bool) -> None:
    base = write_architecture(tmp_path / "base", "llama", tied=tied)
    rows = json.loads((base / "config.json").read_text())["vocab_size"] + 5

    def longer(model: PreTrainedModel) -> None:
        model.resize_token_embeddings(rows, pad_to_multiple_of=64)

    lora = {"modules_to_save": None if tied else ["embed_tokens", "lm_head"]}
    adapter = train_adapter(base, tmp_path / "adapter", prepare=longer, **lora)
    job = job_for(tmp_path / "out", base, adapter)
    padded = -(-rows // 64) * 64
    assert merge.run(job)["vocabulary"] == padded
    plain = AutoModelForCausalLM.from_pretrained(job.out).eval()
    assert plain.config.vocab_size == plain.get_output_embeddings().weight.shape[0] == padded
    model = load_nf4(base, device="cpu")
    longer(model)
    assert mean_kl(log_probs(attach(model, adapter)), log_probs(plain)) < FAITHFUL
    assert json.loads((job.out / "config.json").read_text())["tie_word_embeddings"] is tied


def test_what_the_stream_cannot_do_is_pefts_and_said(base: Path, tmp_path: Path) -> None:
    model = get_peft_model(
        load_nf4(base, device="cpu"),
        IA3Config(target_modules=["down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM"),
    )
    for name, parameter in model.named_parameters():
        if "ia3_" in name:
            parameter.data += 0.3 * torch.randn(parameter.shape)
    adapter = tmp_path / "adapter"
    save(model, adapter, base)
    job = job_for(tmp_path / "out", base, adapter)
    result = merge.run(job)
    assert result["by"] == "peft" and "by PEFT" in notes(job)["merge"]
    plain = AutoModelForCausalLM.from_pretrained(job.out).eval()
    with torch.autocast("cpu", dtype=torch.bfloat16):  # IA3's fp32 factors meet a bf16 output layer without
        trained = log_probs(load_arm("nf4", base, adapter=adapter, device="cpu"))
    assert mean_kl(trained, log_probs(plain)) < FAITHFUL


def test_pefts_merge_parts_tied_embeddings_where_one_side_was_trained(base: Path, tmp_path: Path) -> None:
    """PEFT itself adds what was trained of the input embeddings to the output layer, too."""
    adapter = train_adapter(base, tmp_path / "adapter", target_modules=[*LINEAR, "embed_tokens"], use_dora=True)
    job = job_for(tmp_path / "out", base, adapter)
    result = merge.run(job)
    assert (result["by"], result["record"]) == ("peft", "exact")
    plain = AutoModelForCausalLM.from_pretrained(job.out).eval()
    table = load_file(base / "model.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(plain.lm_head.weight, table) and not torch.equal(plain.model.embed_tokens.weight, table)
    assert json.loads((job.out / "config.json").read_text())["tie_word_embeddings"] is False
    trained = log_probs(load_arm("nf4", base, adapter=adapter, device="cpu"))
    untrained = mean_kl(trained, log_probs(load_arm("nf4", base, device="cpu")))
    assert mean_kl(trained, log_probs(plain)) < untrained / 10  # PEFT's DoRA rounds the norms of rows to bf16


def test_training_left_where_it_trained_on_bf16(base: Path, tmp_path: Path) -> None:
    """On a bf16 base the record names no module, and the original base is the trained one."""
    adapter = train_adapter(base, tmp_path / "adapter", on="bf16")
    job = job_for(tmp_path / "out", base, adapter, onto="original")
    assert merge.run(job)["base_type"] == "bf16"
    trained = log_probs(load_arm("bf16", base, adapter=adapter, device="cpu"))
    assert mean_kl(trained, log_probs(AutoModelForCausalLM.from_pretrained(job.out).eval())) < FAITHFUL


# ---- records


def edited(adapter: Path, folder: Path, change: Any) -> Path:
    copy = shutil.copytree(adapter, folder)
    record = json.loads((copy / "nf4.json").read_text())
    change(record["modules"])
    (copy / "nf4.json").write_text(json.dumps(record))
    return copy


def test_scales_that_differ_in_the_last_bit_are_reported(base: Path, adapter: Path, tmp_path: Path) -> None:
    name = "model.layers.1.mlp.up_proj"

    def change(modules: dict[str, Any]) -> None:
        modules[name]["scales"] = "0" * 64
        value = torch.tensor(modules[name]["values"][3], dtype=torch.bfloat16)
        modules[name]["values"][3] = float((value.view(torch.int16) + 1).view(torch.bfloat16))

    job = job_for(tmp_path / "out", base, edited(adapter, tmp_path / "edited", change))
    result = merge.run(job)
    assert (result["record"], result["modules_close"], result["modules_exact"]) == ("close", 1, 13)
    assert 0 < result["largest_difference"] < 1e-3
    assert "differ" in notes(job)["base"]


def test_two_steps_of_bf16_are_another_arithmetic(base: Path, adapter: Path, tmp_path: Path) -> None:
    name = "model.layers.0.mlp.up_proj"

    def change(modules: dict[str, Any]) -> None:
        modules[name]["scales"] = "0" * 64
        value = torch.tensor(modules[name]["values"][3], dtype=torch.bfloat16)
        modules[name]["values"][3] = float((value.view(torch.int16) + 2).view(torch.bfloat16))

    with pytest.raises(StageError, match="1 of 14 NF4 modules") as refused:
        merge.run(job_for(tmp_path / "out", base, edited(adapter, tmp_path / "edited", change)))
    assert refused.value.problem.where == name


def test_widths_that_cut_blocks_merge_as_they_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In bitsandbytes' kernel for AVX-512 such a layer has other scales than anywhere else."""
    for name, size in {"hidden_size": 96, "intermediate_size": 160}.items():
        monkeypatch.setitem(SHAPE, name, size)
    monkeypatch.setitem(PART, "cpu", 1 << 12)  # several parts a matrix, as large ones have
    base = write_architecture(tmp_path / "base", "llama")
    adapter = train_adapter(base, tmp_path / "adapter")
    job = job_for(tmp_path / "out", base, adapter)
    assert merge.run(job)["record"] == "exact"
    trained = log_probs(load_arm("nf4", base, adapter=adapter, device="cpu"))
    assert mean_kl(trained, log_probs(AutoModelForCausalLM.from_pretrained(job.out).eval())) < FAITHFUL


def test_other_values_of_the_same_codes_and_scales_are_refused(base: Path, adapter: Path, tmp_path: Path) -> None:
    name = "model.layers.0.mlp.up_proj"

    def change(modules: dict[str, Any]) -> None:
        modules[name]["values"][3] += 0.01

    with pytest.raises(StageError, match="1 of 14 NF4 modules") as refused:
        merge.run(job_for(tmp_path / "out", base, edited(adapter, tmp_path / "edited", change)))
    assert refused.value.problem.where == name


def test_another_base_is_refused_by_its_record(base: Path, adapter: Path, tmp_path: Path) -> None:
    other = shutil.copytree(base, tmp_path / "other")
    tensors = load_file(other / "model.safetensors")
    name = "model.layers.1.self_attn.k_proj"
    tensors[f"{name}.weight"] += 0.01
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(StageError, match="1 of 14 NF4 modules") as refused:
        merge.run(job_for(tmp_path / "out", other, adapter))
    assert refused.value.problem.where == name and "accept_other_base" in refused.value.problem.next
    job = job_for(tmp_path / "accepted", other, adapter, accept_other_base=True)
    result = merge.run(job)
    assert (result["record"], result["modules_other"]) == ("other", [name])
    assert name in notes(job)["base"]


def test_without_a_record_the_result_says_so(base: Path, adapter: Path, tmp_path: Path) -> None:
    foreign = shutil.copytree(adapter, tmp_path / "foreign")
    (foreign / "nf4.json").unlink()
    job = job_for(tmp_path / "out", base, foreign)
    result = merge.run(job)
    assert (result["record"], result["base_type"]) == ("none", "unknown")
    assert "no record" in notes(job)["base"]


# ---- bad input


def test_a_quantized_base_is_refused(base: Path, adapter: Path, tmp_path: Path) -> None:
    other = shutil.copytree(base, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(StageError, match="quantized already"):
        merge.run(job_for(tmp_path / "out", other, adapter))


def test_a_base_without_all_its_tensors_is_refused(base: Path, adapter: Path, tmp_path: Path) -> None:
    other = shutil.copytree(base, tmp_path / "other")
    tensors = load_file(other / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, other / "model.safetensors")
    with pytest.raises(StageError, match="missing") as refused:
        merge.run(job_for(tmp_path / "out", other, adapter))
    assert refused.value.problem.where == "model.norm.weight"


def test_an_adapter_of_another_shape_is_refused_with_every_name(base: Path, adapter: Path, tmp_path: Path) -> None:
    other = write_architecture(tmp_path / "gpt2", "gpt2")
    with pytest.raises(StageError, match="fit nothing") as refused:
        merge.run(job_for(tmp_path / "out", other, adapter, onto="original"))
    assert refused.value.problem.where.count("is not in the base") == 14


def test_loftq_is_refused_with_what_to_do(base: Path, adapter: Path, tmp_path: Path) -> None:
    loftq = shutil.copytree(adapter, tmp_path / "loftq")
    config = json.loads((loftq / "adapter_config.json").read_text())
    (loftq / "adapter_config.json").write_text(json.dumps(config | {"init_lora_weights": "loftq"}))
    with pytest.raises(StageError, match="loftq") as refused:
        merge.run(job_for(tmp_path / "out", base, loftq))
    assert "sed -i" in refused.value.problem.next


def test_a_full_disk_is_said(base: Path, adapter: Path, tmp_path: Path) -> None:
    """A limit on the size of a file ends a write like a full disk: with an errno, in the middle."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
    try:
        with pytest.raises(StageError, match="the disk is full"):
            merge.run(job_for(tmp_path / "out", base, adapter))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
