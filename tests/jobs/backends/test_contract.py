"""The contract of every backend of this environment, on tiny models of the architectures that it claims.

What it writes loads by each declared loader, means what it claims, computes what it means, and comes out equal twice.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from recipes.models.headers import read_headers
from recipes.schemes.limits import LIMITS, Limit, limit_problems
from recipes.schemes.slugs import parse_scheme
from tasks.jobs import quantize
from tasks.jobs.loading.environment import tame_gptqmodel
from tasks.jobs.loading.kernels import kernel_of
from tasks.jobs.loading.load import load_arm, load_bf16
from tasks.runtime.process.errors import StageError
from tests.bench import architectures
from tests.jobs.architectures import write_architecture
from tests.jobs.build import make_job, make_request
from tests.jobs.quantized import (
    COST,
    NOISE,
    NOISE_INT8,
    codes,
    fake_quantized,
    log_probs,
    make,
    mean_kl,
    meant,
    params,
)

ARCHITECTURES = ("llama", "qwen3", "mistral", "gemma2", "gemma3", "qwen2")
PLAIN = ("rtn-w4-g32", "gptq-w4-g32", "awq-w4-g32", "nf4", "int8")
# 192 inputs of down_proj are no multiple of 128, and PyTorch's int4 kernel reads no group of 192: per channel shows it.
OPTIONS = (
    *("rtn-w2-g32", "rtn-w3-g64", "rtn-w8", "rtn-w4", "rtn-w3", "gptq-w2-g32", "gptq-w3-g64", "gptq-w8-g32", "gptq-w4"),
    *("gptq-w2", "gptq-w3", "gptq-w8", "gptq-w4-asym", "gptq-w4-g32-asym", "gptq-w3-g32-asym", "gptq-w8-g64-asym"),
    *("gptq-w4-g32-actorder", "gptq-w4-actorder", "gptq-w8-g32-actorder", "gptq-w4-g64-asym-actorder", "awq-w4-g64"),
)
FAST = {("llama", slug) for slug in ("rtn-w4", "gptq-w4-asym", "gptq-w4-g32-actorder", "awq-w4-g32", "nf4", "int8")}


def cells() -> list[object]:
    """Architecture and slug: all architectures plain, Llama with every option; most are slow."""
    pairs = [(name, slug) for name in ARCHITECTURES for slug in PLAIN] + [("llama", slug) for slug in OPTIONS]
    pairs.remove(("gemma3", "awq-w4-g32"))  # recipes/schemes/limits.py
    return [pytest.param(*pair, marks=() if pair in FAST else pytest.mark.slow, id="-".join(pair)) for pair in pairs]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A tiny model by its architecture, written once."""
    root = tmp_path_factory.mktemp("bases")

    def write(name: str) -> Path:
        return root / name if (root / name).exists() else write_architecture(root / name, name)

    return write


def by_gptqmodel(folder: Path, *, slug: str) -> nn.Module:
    """The second declared loader of GPTQ and AWQ files, with plain torch kernels in fp16: they round nothing more."""
    tame_gptqmodel()
    from gptqmodel import BACKEND, GPTQModel

    backend = BACKEND.AWQ_TORCH if slug.startswith("awq") else BACKEND.GPTQ_TORCH
    return GPTQModel.load(str(folder), device="cpu", backend=backend, dtype=torch.float16).model.eval()


@torch.inference_mode()
def weight_of(layer: nn.Module, inputs: int, *, dtype: torch.dtype) -> torch.Tensor:
    """[out, in]: what a loaded layer does to the identity, so no reader's own arithmetic is trusted."""
    out = layer(torch.eye(inputs, dtype=dtype))
    return (out - layer.bias if getattr(layer, "bias", None) is not None else out).t()


def differing(model: nn.Module, base: Path, written: Path, *, slug: str) -> dict[str, int]:
    """Weights that the loaded layers have otherwise than `written` means, by layer."""
    tensors = load_file(written / "model.safetensors")
    dtype = torch.bfloat16 if slug == "nf4" else torch.float16
    differences = {}
    for layer in read_headers(base).linears:
        loaded = weight_of(model.get_submodule(layer.name), layer.in_features, dtype=dtype)
        number = int((loaded != meant(tensors, layer.name, slug).to(dtype)).sum())
        if number:
            differences[layer.name] = number
    return differences


@pytest.mark.parametrize(("name", "slug"), cells())
def test_contract(name: str, slug: str, base: Callable[[str], Path], calibset: Path, tmp_path: Path) -> None:
    model, scheme = base(name), parse_scheme(slug)
    digests = []
    for folder in ("out", "again"):
        make(slug, model, tmp_path / folder, calibset=calibset)
        files = sorted(path for path in (tmp_path / folder).iterdir() if path.name != "events.jsonl")
        digests.append({path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files})
    assert digests[0] == digests[1]
    out = tmp_path / "out"
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        assert (out / file).read_bytes() == (model / file).read_bytes()

    original, stood_for = log_probs(load_bf16(model, device="cpu")), log_probs(fake_quantized(model, out, slug))
    loaded = load_arm("quantized", out, device="cpu")
    cost, noise = mean_kl(original, stood_for), mean_kl(stood_for, log_probs(loaded))
    assert 1e-7 < cost < COST[scheme.bits]
    assert noise < (NOISE_INT8 if slug == "int8" else NOISE)
    if scheme.form != "bitsandbytes":
        assert mean_kl(stood_for, log_probs(by_gptqmodel(out, slug=slug))) < NOISE

    record = json.loads((out / "quantize.json").read_text())
    assert [layer["name"] for layer in record["layers"]] == [layer.name for layer in read_headers(model).linears]
    errors = [
        block["output_error"] if scheme.needs_calibration else block["weight_error"] for block in record["blocks"]
    ]
    assert len(errors) == 4 and all(0.001 < error < 0.9 for error in errors)  # two layers; 1 would be a zero output
    assert record["kernel"] == (kernel_of(loaded) if scheme.needs_calibration else None)


def shift_zero_point(tensors: dict[str, torch.Tensor], layer: str) -> None:
    tensors[f"{layer}.qzeros"][0, 0] += 1  # of the first group of output 0, whose code is in the low bits


def double_a_group(tensors: dict[str, torch.Tensor], layer: str) -> None:
    tensors[f"{layer}.scales"][1, 5] *= 2


@pytest.mark.parametrize("slug", ["rtn-w4-g32", pytest.param("gptq-w4-g32-asym", marks=pytest.mark.slow), "awq-w4-g32"])
@pytest.mark.parametrize("damage", [shift_zero_point, double_a_group])
def test_planted_damage_is_found(
    slug: str,
    damage: Callable[[dict[str, torch.Tensor], str], None],
    base: Callable[[str], Path],
    calibset: Path,
    tmp_path: Path,
) -> None:
    model, layer = base("llama"), "model.layers.1.mlp.up_proj"
    make(slug, model, tmp_path / "out", calibset=calibset)
    assert differing(by_gptqmodel(tmp_path / "out", slug=slug), model, tmp_path / "out", slug=slug) == {}
    shutil.copytree(tmp_path / "out", tmp_path / "damaged")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    damage(tensors, layer)
    save_file(tensors, tmp_path / "damaged" / "model.safetensors", metadata={"format": "pt"})
    differences = differing(by_gptqmodel(tmp_path / "damaged", slug=slug), model, tmp_path / "out", slug=slug)
    zeros = codes(load_file(tmp_path / "out" / "model.safetensors")[f"{layer}.qzeros"], 4)
    assert differences.keys() == {layer}
    assert 20 < differences[layer] <= 32, zeros  # one group of one output; a doubled scale leaves zeros where they are


def test_what_is_saved_is_what_was_made(base: Callable[[str], Path], calibset: Path, tmp_path: Path) -> None:
    """NF4: the loaded layers' weights are the file's after a forward pass, too, in which AVX512-BF16 would repack."""
    make("nf4", base("llama"), tmp_path / "out", calibset=calibset)
    loaded = load_arm("quantized", tmp_path / "out", device="cpu")
    log_probs(loaded)
    assert differing(loaded, base("llama"), tmp_path / "out", slug="nf4") == {}


# Architectures of the bench of models, by the first `model_type` of a limit.
OF_BENCH = {
    "starcoder2": "starcoder2",
    "gpt_oss": "gpt-oss",
    "nemotron_h": "nemotron-h",
    "gemma4_text": "gemma4",
}


@pytest.mark.parametrize("limit", LIMITS, ids=lambda one: f"{'-'.join(one.methods)}-{one.model_types[0]}")
def test_a_cell_that_cannot_be_is_refused_before_it_starts(
    limit: Limit, base: Callable[[str], Path], tmp_path: Path
) -> None:
    name = limit.model_types[0]
    model = architectures.write_architecture(tmp_path / "base", OF_BENCH[name]) if name in OF_BENCH else base(name)
    slugs = {"rtn": "rtn-w4-g32", "gptq": "gptq-w4-g32", "awq": "awq-w4-g32"}
    if limit.backends == ("llm-compressor",):
        slugs = {"gptq": "ct-gptq-w4-g32", "awq": "ct-awq-w4-g32"}
    for method in limit.methods:
        slug = slugs.get(method, method)
        (problem,) = limit_problems(parse_scheme(slug), read_headers(model))
        assert problem.why == limit.why and slug in problem.what
        job = make_job("quantize", tmp_path / slug, params=params(slug), model=model)
        with pytest.raises(StageError, match="cannot make"):
            quantize.run(job)
    assert limit_problems(parse_scheme("gptq-w4-g32"), read_headers(base("llama"))) == []


def test_packed_experts_are_refused_because_they_would_load_as_random_numbers(
    base: Callable[[str], Path], tmp_path: Path
) -> None:
    model = base("qwen3-moe")
    for slug in ("rtn-w4-g32", "gptq-w4-g32", "awq-w4-g32"):
        (problem,) = limit_problems(parse_scheme(slug), read_headers(model))
        assert "experts" in problem.what
    assert limit_problems(parse_scheme("nf4"), read_headers(model)) == []
    rtn = importlib.import_module("tasks.jobs.backends.quench_rtn")  # the backend alone, past the check
    rtn.quantize(make_request(model, tmp_path / "out", params=params("rtn-w4-g32")))
    with pytest.raises(StageError, match=r"not in the checkpoint: model\.layers\.0\.mlp\.experts"):
        load_arm("quantized", tmp_path / "out", device="cpu")
