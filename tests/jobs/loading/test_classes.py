"""Models with towers are loaded whole; their text decoder alone is 4-bit and gets adapters."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, FalconH1Config, PreTrainedModel, Qwen2MoeConfig, T5Config
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from recipes.checks.train import WITHOUT_SDPA
from recipes.schema import Train
from tasks.jobs.loading.classes import class_of, empty_model, modules_to_skip, text_decoder, text_linears
from tasks.jobs.loading.load import attach, linear4bit, load_bf16, load_int8, load_nf4
from tasks.jobs.merging.skeleton import read_skeleton
from tasks.jobs.training.lora import add_adapter, save_weights
from tasks.jobs.training.targets import adapter_targets
from tasks.jobs.training.unquantized import unquantized
from tasks.runtime.process.errors import StageError
from tests.jobs.whole_models import WHOLE, write_whole
from tests.tiny import write_base

LAYERS = {"gemma4-whole": 18, "qwen3.5-whole": 15}  # the others have seven in each of two layers
SETTINGS = Train(rank=4, alpha=8, dropout=0.0).model_dump()
IDS = torch.randint(4, 290, (2, 24), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every tiny model with towers."""
    folder = tmp_path_factory.mktemp("whole")
    return {name: write_whole(folder / name, name) for name in WHOLE}


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits.float()


@pytest.mark.parametrize("name", WHOLE)
def test_a_model_is_loaded_as_the_class_that_its_folder_names(name: str, bases: dict[str, Path]):
    model = load_bf16(bases[name], device="cpu")
    assert type(model).__name__ == WHOLE[name].architecture
    stored, loaded = load_file(bases[name] / "model.safetensors"), model.state_dict()
    once = {tensor.data_ptr(): tensor.numel() for tensor in loaded.values()}  # tied ones count once
    assert sum(tensor.numel() for tensor in stored.values()) == sum(once.values())
    towers = [key for key in stored if "vision" in key or "visual" in key or "audio" in key]
    assert len(towers) > 10
    for key in towers:  # some checkpoints leave out the "model." in front
        assert torch.equal(stored[key], loaded[next(inside for inside in loaded if inside.endswith(key))])
    with torch.no_grad():
        assert model.base_model(input_ids=IDS).last_hidden_state.shape == (2, 24, 128)  # what the loss is computed from


@pytest.mark.parametrize("name", WHOLE)
def test_the_text_decoder_alone_is_4_bit(name: str, bases: dict[str, Path]):
    empty = empty_model(bases[name])
    decoder = text_linears(empty)
    assert len(decoder) == LAYERS.get(name, 14)
    assert all(layer.startswith(f"{text_decoder(empty)}.layers.") for layer in decoder)
    model = load_nf4(bases[name], device="cpu")
    assert set(linear4bit(model)) == decoder
    tensors = load_file(bases[name] / "model.safetensors")
    assert read_skeleton(bases[name], tensors).four_bit == decoder  # the merge has the same layers dequantized
    bf16 = load_bf16(bases[name], device="cpu").state_dict()
    rest = {key: tensor for key, tensor in model.state_dict().items() if key in bf16 and tensor.is_floating_point()}
    assert all(torch.equal(tensor, bf16[key]) for key, tensor in rest.items())
    assert unquantized(model).towers_gib > 0
    if name != "llama4-whole":  # it has experts
        assert unquantized(model).share < 0.05  # Gemma 4's projection of embeddings for each layer stays


@pytest.mark.parametrize("name", ["gemma3-whole", "llama4-whole"])
def test_int8_leaves_the_towers_alone(name: str, bases: dict[str, Path]):
    model = load_int8(bases[name], device="cpu")
    eight_bit = {key for key, part in model.named_modules() if type(part).__name__ == "Linear8bitLt"}
    assert eight_bit == text_linears(empty_model(bases[name]))


def adapted(model: PreTrainedModel, **changed: object) -> set[str]:
    """Names of the layers that get an adapter."""
    peft = add_adapter(model, SETTINGS | changed)
    return {key.removeprefix("base_model.model.") for key, part in peft.named_modules() if hasattr(part, "lora_A")}


@pytest.mark.parametrize("name", WHOLE)
def test_adapters_are_on_the_text_decoder_alone(name: str, bases: dict[str, Path]):
    model = load_nf4(bases[name], device="cpu")
    assert adapted(model) == text_linears(empty_model(bases[name]))
    named = adapted(load_nf4(bases[name], device="cpu"), targets=["q_proj", "v_proj"])
    assert {key.rpartition(".")[2] for key in named} == {"q_proj", "v_proj"}
    assert named < text_linears(empty_model(bases[name]))  # towers have layers of these names


@pytest.mark.parametrize("name", ["gemma3-whole", "qwen3.5-whole", "llama4-whole"])
def test_plain_peft_loads_what_was_saved(name: str, bases: dict[str, Path], tmp_path: Path):
    peft = add_adapter(load_nf4(bases[name], device="cpu"), SETTINGS | {"modules_to_save": ["norm"]})
    torch.manual_seed(0)
    for key, parameter in peft.named_parameters():
        if "lora_B" in key:
            parameter.data.normal_(std=0.05)
    save_weights(peft, tmp_path)
    targets = json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"]
    assert not [key for key in targets if "vision" in key or "visual" in key]
    saved = {key for key in load_file(tmp_path / "adapter_model.safetensors") if "lora" not in key}
    assert saved and not [key for key in saved if "vision" in key or "visual" in key]
    loaded = attach(load_nf4(bases[name], device="cpu"), tmp_path)
    assert torch.equal(logits(loaded), logits(peft.eval()))
    with loaded.disable_adapter():
        assert not torch.allclose(logits(loaded), logits(peft))


def test_a_text_model_keeps_transformers_own_choice(tmp_path: Path):
    model = empty_model(write_base(tmp_path / "base"))
    assert modules_to_skip(model) is None and text_decoder(model) == "model"
    assert len(text_linears(model)) == 14


def test_gates_of_shared_experts_stay(tmp_path: Path):
    shape = {"hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 32, "num_experts": 4}
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 300}
    config = Qwen2MoeConfig(**shape, **sizes, shared_expert_intermediate_size=64, num_experts_per_tok=2)
    AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(tmp_path)
    gates = {f"model.layers.{number}.mlp.shared_expert_gate" for number in (0, 1)}
    assert set(modules_to_skip(empty_model(tmp_path)) or ()) == {*gates, "lm_head"}
    assert len(linear4bit(load_nf4(tmp_path, device="cpu"))) == 14  # four of the attention, three of the shared expert


def test_text_alone_of_a_model_with_towers_stays_text(bases: dict[str, Path], tmp_path: Path):
    """What AutoModelForCausalLM made of Qwen3.5 and saved is a text model, and is loaded as one."""
    AutoModelForCausalLM.from_pretrained(bases["qwen3.5-whole"], dtype=torch.bfloat16).save_pretrained(tmp_path)
    assert type(load_bf16(tmp_path, device="cpu")).__name__ == "Qwen3_5ForCausalLM"


def test_a_model_that_makes_no_text_is_refused():
    with pytest.raises(StageError, match="makes text") as refused:
        class_of(T5Config(), where="base")
    assert "t5" in refused.value.problem.what


def test_the_list_of_architectures_without_sdpa_is_that_of_transformers() -> None:
    """Of the text models that anybody would train; encoders and state spaces are refused for other reasons."""
    names = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    classes = {
        name: getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[name]) for name in WITHOUT_SDPA if name in names
    }
    assert len(classes) >= 15 and not any(cls._supports_sdpa for cls in classes.values())
    for name in (
        "llama",
        "qwen2",
        "qwen3",
        "qwen3_moe",
        "gemma",
        "gemma3_text",
        "gemma4_text",
        "mistral",
        "phi3",
        "glm4",
    ):
        assert getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[name])._supports_sdpa, name


def test_layers_that_state_spaces_read_themselves_get_no_adapter() -> None:
    config = FalconH1Config(
        hidden_size=128,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=300,
        mamba_d_ssm=128,
        mamba_n_heads=4,
        mamba_d_state=16,
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    targets = adapter_targets(model, "all-linear")
    assert {"q_proj", "in_proj", "down_proj"} <= set(targets) and not {"out_proj", "conv1d"} & set(targets)
    assert any(name.endswith("out_proj") for name in text_linears(model))
