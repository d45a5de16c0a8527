"""A scheme's folder loads in plain transformers, holds what it says, and comes out the same twice."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from recipes.slugs import parse_scheme
from tasks.jobs import quantize
from tasks.jobs.backends.gptqmodel import _warnings, equal_lengths
from tasks.jobs.backends.load import kernel_of, load_arm, load_bf16
from tasks.jobs.calibrate import CALIBSET
from tasks.runtime.errors import StageError
from tasks.runtime.events import Events, read_events
from tasks.runtime.job import Job
from tests.jobs.build import make_job, notes
from tests.tiny import write_base

SCHEMES = ("rtn-w4-g32", "rtn-w3-g32", "gptq-w4-g32", "gptq-w3-g32", "gptq-w2-g32", "gptq-w8-g64", "awq-w4-g32")
# Mean KL in nats on this random model. COST, of rounding: four times what was measured. NOISE, between loaded kernel
# and a bf16 matmul with the weights that the file means: 9e-6 was measured, 0 for 2 bits.
COST, NOISE = {2: 0.4, 3: 0.1, 4: 0.02, 8: 1e-4}, 2e-5
AWQ_ORDER = [0, 4, 1, 5, 2, 6, 3, 7]  # where the gemm layout puts the n-th of eight outputs


def params(slug: str) -> dict[str, object]:
    return parse_scheme(slug).params() | {"seed": 0} | ({"damp": 0.05} if slug.startswith("gptq") else {})


def write_calibset(folder: Path, *, lengths: tuple[int, ...] = (96, 80, 96, 61, 90, 77)) -> Path:
    generator = torch.Generator().manual_seed(1)
    lines = [
        {"sequence": i, "rows": [], "input_ids": torch.randint(4, 300, (n,), generator=generator).tolist()}
        for i, n in enumerate(lengths)
    ]
    folder.mkdir()
    pq.write_table(pa.Table.from_pylist(lines, schema=CALIBSET), folder / "calibset.parquet")
    return folder


def make(slug: str, model: Path, out: Path, *, calibset: Path) -> Job:
    inputs = {"model": model} | ({} if slug.startswith("rtn") else {"calibset": calibset})
    job = make_job("quantize", out, params=params(slug), **inputs)
    quantize.run(job)
    return job


def codes(packed: Tensor, bits: int) -> Tensor:
    """Undo the packing along the last dimension: a stream of bits, low ones first."""
    stream = np.unpackbits(packed.contiguous().numpy().view(np.uint8), axis=1, bitorder="little")
    return torch.from_numpy(np.packbits(stream.reshape(len(packed), -1, bits), axis=-1, bitorder="little")[..., 0])


def dequantized(tensors: dict[str, Tensor], name: str, slug: str) -> Tensor:
    """[out, in] fp32 of a layer, by the format's definition: (code - zero) * scale."""
    bits = params(slug)["bits"]
    packed, zeros, scales = (tensors[f"{name}.{part}"] for part in ("qweight", "qzeros", "scales"))
    if slug.startswith("awq"):  # packed along the outputs, in its own order; zeros as they are
        weight, zero = (codes(one, 4).view(len(one), -1, 8)[..., AWQ_ORDER].flatten(1) for one in (packed, zeros))
        group = torch.arange(len(weight)) // params(slug)["group_size"]
    else:  # packed along the inputs; zeros less one
        weight, zero = codes(packed.t(), bits).t(), codes(zeros, bits).int() + 1
        group = tensors[f"{name}.g_idx"]
    return ((weight.float() - zero.float()[group]) * scales.float()[group]).t()


def fake_quantized(base: Path, out: Path, slug: str) -> torch.nn.Module:
    """The base in bf16 with the weights that the quantized file means."""
    model, tensors = load_bf16(base, device="cpu"), load_file(out / "model.safetensors")
    state = {name: tensor for name, tensor in tensors.items() if name.endswith(("norm.weight", "embed_tokens.weight"))}
    for name in {key.removesuffix(".qweight") for key in tensors if key.endswith(".qweight")}:
        state[f"{name}.weight"] = dequantized(tensors, name, slug)
    assert sum(name.endswith("proj.weight") for name in state) == 14  # seven in each of two layers
    assert not model.load_state_dict(state, strict=False).unexpected_keys
    return model


@torch.inference_mode()
def log_probs(model: torch.nn.Module) -> Tensor:
    tokens = torch.randint(4, 300, (4, 48), generator=torch.Generator().manual_seed(2))
    return model(tokens).logits.double().log_softmax(-1)


def mean_kl(p: Tensor, q: Tensor) -> float:
    return (p.exp() * (p - q)).sum(-1).mean().item()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("quantize") / "base")


@pytest.fixture(scope="module")
def calibset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_calibset(tmp_path_factory.mktemp("calibset") / "calibset")


@pytest.mark.parametrize("slug", SCHEMES)
def test_it_loads_in_plain_transformers_as_the_weights_it_stands_for(
    slug: str, base: Path, calibset: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    job = make(slug, base, out, calibset=calibset)
    loaded = load_arm("quantized", out, device="cpu")
    assert "Linear" in kernel_of(loaded) and kernel_of(loaded) != "Linear"
    original, meant = log_probs(load_bf16(base, device="cpu")), log_probs(fake_quantized(base, out, slug))
    cost, deviation = mean_kl(original, meant), mean_kl(meant, log_probs(loaded))
    assert 1e-6 < cost < COST[params(slug)["bits"]]
    assert deviation < NOISE
    losses = [layer["loss"] for layer in json.loads((out / "quantize.json").read_text())["layers"]]
    assert len(losses) == 14
    progress = [event for event, _ in read_events(job.out / "events.jsonl") if event["kind"] == "progress"]
    assert progress[-1]["done"] == progress[-1]["total"]


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
    for file in ("config.json", "quantize_config.json", "quantize.json"):
        text = (tmp_path / "a" / file).read_text()
        assert str(tmp_path) not in text and "/tmp" not in text and "/home" not in text
    kept = {path.name for path in base.iterdir()} - {"model.safetensors", "config.json"}
    assert kept >= {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"}
    for file in kept:
        assert (tmp_path / "a" / file).read_bytes() == (base / file).read_bytes()
    assert set(digests[0]) == kept | {"model.safetensors", "config.json", "quantize_config.json", "quantize.json"}


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


@pytest.mark.parametrize(
    ("slug", "symmetric", "what"),
    [
        ("gptq-w4-g48", True, "asks for groups of 48"),
        ("awq-w3-g32", False, "asks for 3 bits"),
        ("rtn-w4-g32", False, "rtn-w4-g32 with zero points is not built"),
    ],
)
def test_what_cannot_be_is_refused(slug: str, symmetric: bool, what: str, base: Path, tmp_path: Path) -> None:
    job = make_job("quantize", tmp_path / "out", params=params(slug) | {"symmetric": symmetric}, model=base)
    with pytest.raises(StageError, match=what):
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
    told = [event for event, _ in read_events(job.out / "events.jsonl")]
    assert [(note["about"], note["text"]) for note in told] == [("gptqmodel", "Module `a`: Hessian diagonal floor")]
