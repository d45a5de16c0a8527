"""The largest activations of the bf16 model, and the warning where fp16 would end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import silu

from recipes.models.headers import read_headers
from tasks.jobs.loading.load import load_bf16
from tasks.jobs.measuring.block_errors import FP16_MAX, MARGIN, Measured, measure
from tests.jobs.build import notes
from tests.jobs.quantized import make, write_calibset
from tests.tiny import write_base

ROWS = [torch.randint(4, 300, (96,), generator=torch.Generator().manual_seed(5)).tolist()]


@pytest.fixture(scope="module")
def loud(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base whose second FFN works with numbers that fp16 does not have, and is fine in bf16."""
    base = write_base(tmp_path_factory.mktemp("loud") / "base")
    tensors = load_file(base / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"] *= 2**18
    tensors["model.layers.1.mlp.down_proj.weight"] *= 2**-8
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    return base


def test_maxima_are_those_of_the_model(loud: Path, tmp_path: Path) -> None:
    make("rtn-w4-g32", loud, tmp_path / "out", calibset=tmp_path)
    seen = measure(read_headers(loud), tmp_path / "out", rows=ROWS, device="cpu")
    model, given = load_bf16(loud, device="cpu"), {}
    layers = model.model.layers
    for module in (layers[1].mlp, layers[1].self_attn.o_proj, model.model.norm):
        module.register_forward_hook(lambda module, args, output: given.update({module: (args, output)}))
    with torch.inference_mode():
        states = model(torch.tensor(ROWS), output_hidden_states=True).hidden_states
        mlp = layers[1].mlp
        (inside,), outside = given[mlp]
        gate, up = mlp.gate_proj(inside), mlp.up_proj(inside)
        parts = [inside, gate, silu(gate), up, silu(gate) * up, outside]
        assert seen.maxima[1, "mlp"] == max(part.abs().max().item() for part in parts) > FP16_MAX
        assert seen.maxima[1, "self_attn"] >= max(
            one.abs().max().item() for one in (*given[layers[1].self_attn.o_proj][0],)
        )
        (last,), _ = given[model.model.norm]
        assert seen.stream_max == max(states[1].abs().max().item(), last.abs().max().item()) < FP16_MAX
        assert states[-1].isfinite().all()
        assert not model.half()(torch.tensor(ROWS)).logits.isfinite().all()  # what the warning is about
    assert set(seen.maxima) == {(layer, part) for layer in (0, 1) for part in ("self_attn", "mlp")}


def test_the_warning_stands_in_notes_and_the_maxima_in_the_record(loud: Path, tmp_path: Path) -> None:
    calibset = write_calibset(tmp_path / "calibset")
    job = make("gptq-w4-g32", loud, tmp_path / "out", calibset=calibset)
    assert "in mlp of layer 1" in notes(job)["activations"] and "bfloat16" in notes(job)["activations"]
    record = json.loads((job.out / "quantize.json").read_text())
    largest = {(block["layer"], block["part"]): block["activation_max"] for block in record["blocks"]}
    assert max(largest, key=largest.__getitem__) == (1, "mlp") and largest[1, "mlp"] > FP16_MAX
    assert 0 < record["stream_max"] < FP16_MAX
    assert "--dtype bfloat16" in (job.out / "serve.md").read_text()
    quiet = make("gptq-w4-g32", write_base(tmp_path / "base"), tmp_path / "quiet", calibset=calibset)
    assert "activations" not in notes(quiet)


def test_the_warning_begins_at_a_quarter_of_fp16() -> None:
    def warned(ffn: float, stream: float) -> str | None:
        return Measured({}, "TorchLinear", 512, {(0, "self_attn"): 1.0, (3, "mlp"): ffn}, stream).fp16_warning()

    edge = FP16_MAX / MARGIN
    assert warned(edge, edge) is None
    assert "up to 16,377 in mlp of layer 3" in str(warned(edge + 1, 10))
    assert "70,000 in the residual stream" in str(warned(edge + 1, 7e4))
