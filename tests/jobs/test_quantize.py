"""A scheme's folder loads in plain transformers, holds what it says, and comes out the same twice."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tasks.jobs import quantize
from tasks.jobs.backends import equal_lengths
from tasks.jobs.backends.gptqmodel import _warnings
from tasks.runtime.process.errors import StageError
from tasks.runtime.process.events import Events, read_events
from tests.jobs.build import make_job, notes
from tests.jobs.quantized import make, params, write_calibset
from tests.tiny import write_base


@pytest.mark.parametrize("slug", ["rtn-w4-g32", "gptq-w4-g32", "awq-w4-g32"])
def test_the_same_inputs_give_the_same_bytes_and_no_machine_path(
    slug: str, base: Path, calibset: Path, tmp_path: Path
) -> None:
    digests = []
    for name in ("a", "b"):
        make(slug, base, tmp_path / name, calibset=calibset)
        files = sorted(path for path in (tmp_path / name).iterdir() if path.name != "events.jsonl")
        digests.append({path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files})
    assert digests[0] == digests[1]
    for file in ("config.json", "quantize_config.json", "quantize.json", "serve.json", "serve.md"):
        text = (tmp_path / "a" / file).read_text()
        assert str(tmp_path) not in text and "/tmp" not in text and "/home" not in text
    kept = {path.name for path in base.iterdir()} - {"model.safetensors", "config.json"}
    assert kept >= {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"}
    for file in kept:
        assert (tmp_path / "a" / file).read_bytes() == (base / file).read_bytes()
    written = {"model.safetensors", "config.json", "quantize_config.json", "quantize.json", "serve.json", "serve.md"}
    assert set(digests[0]) == kept | written


def test_what_gptqmodel_leaves_out_is_told(base: Path, tmp_path: Path) -> None:
    short = write_calibset(tmp_path / "calibset", lengths=(96, 5, 96))  # it drops rows of up to 10 tokens
    assert "of 197 calibration tokens" in notes(make("gptq-w4-g32", base, tmp_path / "out", calibset=short))["tokens"]
    assert not (Path.cwd() / "logs").exists()  # it makes this folder where it runs


def test_awq_sees_all_tokens_although_lengths_differ(base: Path, calibset: Path, tmp_path: Path) -> None:
    """GPTQModel would search scales on the last sequence only, 61 of 500 tokens."""
    job = make("awq-w4-g32", base, tmp_path / "out", calibset=calibset)
    layers = json.loads((job.out / "quantize.json").read_text())["layers"]
    assert {layer["tokens"] for layer in layers} == {498}  # 500 in six rows of 83
    assert "6 sequences joined" in notes(job)["equal lengths"]


def test_equal_lengths_keeps_the_stream(tmp_path: Path) -> None:
    events = Events(tmp_path / "events.jsonl")
    assert equal_lengths([[1, 2], [3, 4]], events=events) == [[1, 2], [3, 4]]
    assert not events.path.exists()
    assert equal_lengths([[1, 2, 3, 4], [5], [6, 7]], events=events) == [[1, 2], [3, 4], [5, 6]]


def test_a_group_that_is_cut_short_is_refused(base: Path, tmp_path: Path) -> None:
    job = make_job("quantize", tmp_path / "out", params=params("rtn-w4-g32") | {"group_size": 48}, model=base)
    with pytest.raises(StageError, match="48 of test does not divide"):
        quantize.run(job)


def test_a_weight_that_is_not_finite_is_refused(base: Path, tmp_path: Path) -> None:
    broken = write_base(tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    job = make_job("quantize", tmp_path / "out", params=params("rtn-w4-g32"), model=broken)
    with pytest.raises(StageError, match=r"inf or NaN[\s\S]*model.layers.1.mlp.up_proj"):
        quantize.run(job)


def test_its_warnings_become_notes(tmp_path: Path) -> None:
    job = make_job("quantize", tmp_path / "out", params={})
    with _warnings(job.events):
        print("\rWARN  Module `a`: Hessian diagonal floor   \nINFO  fine\nWARN  Python GIL is enabled")
    events = [event for event, _ in read_events(job.out / "events.jsonl")]
    assert [(note["about"], note["text"]) for note in events] == [("gptqmodel", "Module `a`: Hessian diagonal floor")]


def test_awq_takes_scales_and_clipping_from_another_model(base: Path, calibset: Path, tmp_path: Path) -> None:
    """Found on the model itself they give its own bytes; found on another one they give that one's scales."""
    other = write_base(tmp_path / "another", seed=1)
    plain = make("awq-w4-g32", base, tmp_path / "plain", calibset=calibset)
    inputs = {"model": base, "calibset": calibset}
    written = {}
    for name, source in (("same", base), ("other", other)):
        job = make_job("quantize", tmp_path / name, params=params("awq-w4-g32"), **inputs, scales_from=source)
        quantize.run(job)
        written[name] = load_file(tmp_path / name / "model.safetensors")
        assert {path.name for path in job.out.iterdir()} == {path.name for path in plain.out.iterdir()}
        assert "6 scalings and 10 clippings" in notes(job)["scales from another model"]
    own = load_file(plain.out / "model.safetensors")
    assert all(torch.equal(own[name], written["same"][name]) for name in own)
    key = "model.layers.1.post_attention_layernorm.weight"  # divided by the scales of gate_proj and up_proj
    searched = make("awq-w4-g32", other, tmp_path / "searched", calibset=calibset)
    norms = {path: load_file(path / "model.safetensors")[key] for path in (base, other, searched.out)}
    scales = norms[other] / norms[searched.out]
    assert torch.allclose(norms[base] / written["other"][key], scales, rtol=0.02)  # bf16: 2^-8 a division
    assert not torch.allclose(norms[base] / own[key], scales, rtol=0.02)
