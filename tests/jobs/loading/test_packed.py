"""A GPTQ checkpoint of a model with towers: its text decoder is packed, and transformers takes nothing else for it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tasks.jobs.loading.classes import empty_model, text_decoder, text_linears
from tasks.jobs.loading.kernels import kernel_of
from tasks.jobs.loading.load import load_arm, load_bf16
from tasks.runtime.process.errors import StageError
from tests.jobs.quantized import make, mean_kl
from tests.jobs.whole_models import write_whole

PREFIX = {"mistral3": "language_model.model.", "smolvlm": "model.text_model."}  # of the decoder in the checkpoint
IDS = torch.randint(4, 290, (4, 48), generator=torch.Generator().manual_seed(1))


def quantize_decoder(name: str, base: Path, folder: Path) -> Path:
    """The base with its text decoder's layers rounded to 4 bits, as a file that names the towers' in no list."""
    whole = load_bf16(base, device="cpu")
    stem = text_decoder(whole)
    text = AutoModelForCausalLM.from_config(whole.config.get_text_config(), dtype=torch.bfloat16)
    inside = {key.replace(f"{stem}.", "model."): tensor for key, tensor in whole.state_dict().items() if stem in key}
    text.load_state_dict(inside | {"lm_head.weight": whole.get_output_embeddings().weight})
    text.save_pretrained(folder / "text")
    for path in [*base.glob("*.json*"), *base.glob("*.jinja")]:
        if path.name != "config.json":
            (folder / "text" / path.name).write_bytes(path.read_bytes())
    rounded = make("rtn-w4-g32", folder / "text", folder / "rounded", calibset=folder).out
    files = load_file(rounded / "model.safetensors")
    packed = {key.replace("model.", PREFIX[name], 1): files[key] for key in files if "layers" in key and "proj" in key}
    stored = load_file(base / "model.safetensors")
    gone = {f"{key.replace(f'{stem}.', PREFIX[name], 1)}.weight" for key in text_linears(whole)}
    kept = {key: tensor for key, tensor in stored.items() if key not in gone}
    assert len(kept) == len(stored) - 14
    out = folder / "out"
    out.mkdir()
    save_file(packed | kept, out / "model.safetensors", metadata={"format": "pt"})
    quantization = json.loads((rounded / "config.json").read_text())["quantization_config"]
    config = json.loads((base / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
    return out


@pytest.mark.parametrize("name", PREFIX)
def test_towers_are_not_taken_for_packed(name: str, tmp_path: Path):
    base = write_whole(tmp_path / "base", name)
    folder = quantize_decoder(name, base, tmp_path)
    loaded = load_arm("quantized", folder, device="cpu")
    packed = {key for key, part in loaded.named_modules() if hasattr(part, "qweight")}
    assert packed == text_linears(empty_model(base)) and "Linear" in kernel_of(loaded)
    with torch.no_grad():
        found, expected = (
            model(input_ids=IDS).logits.float().log_softmax(-1).flatten(0, 1)
            for model in (loaded, load_bf16(base, device="cpu"))
        )
    assert 0 < mean_kl(found, expected) < 0.02  # what 4 bits cost a random model of this size


def test_what_is_missing_is_still_refused(tmp_path: Path):
    folder = quantize_decoder("mistral3", write_whole(tmp_path / "base", "mistral3"), tmp_path)
    tensors = load_file(folder / "model.safetensors")
    some = next(key for key in tensors if key.endswith("q_proj.qweight"))
    del tensors[some]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(StageError, match="not in the checkpoint"):
        load_arm("quantized", folder, device="cpu")
