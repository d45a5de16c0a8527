"""Files of the archived backends carry the input's names, and rotary embeddings both spellings."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig

from tasks.jobs.backends.archived import read_config, refuse_overflow, write_checkpoint
from tasks.jobs.merging.rope import older_spelling
from tasks.runtime.process.errors import StageError
from tests.jobs.build import make_job, make_request, notes
from tests.jobs.quantized import make
from tests.tiny import write_base

LAYER = "model.layers.0.mlp.up_proj"


def state_of(base: Path) -> dict[str, Tensor]:
    """What AutoGPTQ's model would have for one quantized layer: fp16, a zero bias, a second name of the embeddings."""
    state = {name: tensor.half() for name, tensor in load_file(base / "model.safetensors").items()}
    del state[f"{LAYER}.weight"]
    parts = {"qweight": torch.ones(16, 256, dtype=torch.int32), "qzeros": torch.ones(4, 32, dtype=torch.int32)}
    state |= {f"{LAYER}.{part}": value for part, value in parts.items()}
    state |= {f"{LAYER}.scales": torch.ones(4, 256).half(), f"{LAYER}.bias": torch.zeros(256).half()}
    return state | {"lm_head.weight": state["model.embed_tokens.weight"]}


def test_files_carry_the_inputs_names_and_what_was_not_changed(base: Path, tmp_path: Path) -> None:
    state = state_of(base)
    norm = "model.layers.0.post_attention_layernorm.weight"
    state[norm] = state[norm] * 1.25
    job = make_job("quantize", tmp_path / "out", params={})
    write_checkpoint(make_request(base, job.out, params={}), state, quantization={"quant_method": "gptq"})
    original, written = load_file(base / "model.safetensors"), load_file(job.out / "model.safetensors")
    parts = {f"{LAYER}.{part}" for part in ("qweight", "qzeros", "scales")}
    assert written.keys() == (original.keys() - {f"{LAYER}.weight"}) | parts
    for name in original.keys() & written.keys() - {norm}:
        assert written[name].dtype == torch.bfloat16 and torch.equal(written[name], original[name])
    assert torch.equal(written[norm], state[norm]) and norm in notes(job)["unquantized tensors"]
    assert json.loads((job.out / "config.json").read_text())["quantization_config"] == {"quant_method": "gptq"}


def test_a_tensor_without_a_place_is_refused(base: Path, tmp_path: Path) -> None:
    state = state_of(base)
    state[f"{LAYER}.bias"][3] = 1
    with pytest.raises(StageError, match=rf"(?s)the input model does not have.*{LAYER}.bias"):
        write_checkpoint(make_request(base, tmp_path, params={}), state, quantization={})


def test_weights_beyond_fp16_are_refused() -> None:
    layer = torch.nn.Linear(2, 2).half()
    refuse_overflow(layer)
    layer.weight.data = torch.tensor([[1.0, 70000.0], [1.0, 1.0]]).half()
    with pytest.raises(StageError, match="does not fit fp16"):
        refuse_overflow(layer)


@pytest.mark.parametrize(
    ("rope", "older"),
    [
        ({"rope_theta": 5e5, "rope_type": "default"}, {"rope_theta": 5e5}),
        (
            {"rope_theta": 5e5, "rope_type": "linear", "factor": 2.0},
            {"rope_theta": 5e5, "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
        ),
        (
            {"rope_theta": 1e4, "rope_type": "default", "partial_rotary_factor": 0.5},
            {"rope_theta": 1e4, "partial_rotary_factor": 0.5},
        ),
        ({"full_attention": {"rope_theta": 1e6}, "sliding_attention": {"rope_theta": 1e4}}, {}),
    ],
)
def test_rope_in_the_words_of_transformers_4(rope: dict[str, object], older: dict[str, object]) -> None:
    assert older_spelling({"rope_parameters": rope}) == older
    assert older_spelling({"rope_parameters": rope, **older, "rope_theta": 7.0}) == {}


def test_a_quantized_model_spells_rope_for_both(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    config["rope_parameters"] = {"rope_theta": 5e5, "rope_type": "linear", "factor": 2.0}
    (base / "config.json").write_text(json.dumps(config))
    make("rtn-w4-g32", base, tmp_path / "out", calibset=tmp_path)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["rope_theta"] == 5e5 and written["rope_scaling"] == {"rope_type": "linear", "factor": 2.0}
    assert AutoConfig.from_pretrained(tmp_path / "out").rope_parameters == read_config(base).rope_parameters
