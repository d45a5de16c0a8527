"""What a quantized folder holds is counted from its files: the right figures of every format, and what is not right."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from recipes.models.headers import read_headers
from recipes.schemes import on_disk
from recipes.schemes.scheme import Grid, Rule, Scheme
from recipes.schemes.slugs import parse_scheme
from tasks.jobs import quantize
from tasks.jobs.backends import LayerRecord, Quantized
from tasks.jobs.loading.cpu_nf4 import ABOUT
from tasks.jobs.quantize import _counted
from tasks.runtime.process.errors import StageError
from tests.jobs.architectures import write_architecture
from tests.jobs.backends import compressed
from tests.jobs.build import make_job, notes
from tests.jobs.quantized import AWQ_ORDER, codes, params
from tests.tiny import write_base

LAYER = "model.layers.1.mlp.up_proj"


def counted(slug: str, base: Path, out: Path, *, calibset: Path | None = None) -> dict[str, Any]:
    """`on_disk` of the job's result."""
    inputs = {"model": base} | ({"calibset": calibset} if calibset and parse_scheme(slug).needs_calibration else {})
    return quantize.run(make_job("quantize", out, params=params(slug), **inputs))["on_disk"]


def stored_codes(tensors: dict[str, Tensor], name: str, scheme: Scheme) -> Tensor:
    """By the formats' definitions, in the tests' own code."""
    if scheme.form == "bitsandbytes":
        weight = tensors[f"{name}.weight"]
        return weight if scheme.method == "int8" else torch.cat([weight >> 4, weight & 15])
    packed = tensors[f"{name}.qweight"]
    if scheme.form == "awq":
        return codes(packed, 4).view(len(packed), -1, 8)[..., AWQ_ORDER]
    return codes(packed.t(), scheme.bits)


SLUGS = (
    *("rtn-w4-g32", "rtn-w3-g64", "rtn-w8", "rtn-w2-g32", "nf4", "int8", "gptq-w4-g32-asym", "awq-w4-g32"),
    *(pytest.param(slug, marks=pytest.mark.slow) for slug in ("gptq-w3-g64", "gptq-w8-g32-actorder", "gptq-w4")),
)


@pytest.mark.parametrize("slug", SLUGS)
def test_the_figures_are_those_of_the_file(slug: str, base: Path, calibset: Path, tmp_path: Path) -> None:
    scheme, out = parse_scheme(slug), tmp_path / "out"
    said = counted(slug, base, out, calibset=calibset)
    before, after = load_file(base / "model.safetensors"), load_file(out / "model.safetensors")
    names = [layer.name for layer in read_headers(base).linears]
    weights = sum(before[f"{name}.weight"].numel() for name in names)
    beside = {name for name in before if not any(name == f"{layer}.weight" for layer in names)}
    n_bytes = sum(tensor.nbytes for name, tensor in after.items() if name not in beside)
    used = [set(stored_codes(after, name, scheme).flatten().tolist()) for name in names]
    assert said["layers"] == said["packed_layers"] == 14 and said["packed_share"] == 1
    assert said["bits_a_weight"] == pytest.approx(8 * n_bytes / weights, abs=1e-4)
    # bitsandbytes: its tables, 1.3 KB a layer, which are 0.5 bits a weight in layers of 8,192
    slack = 0.6 if scheme.form == "bitsandbytes" else 0.0001
    assert 0 <= said["bits_a_weight"] - said["promised_bits_a_weight"] < slack
    assert said["codes"] == {
        str(scheme.bits): {
            "levels": 255 if slug == "int8" else 2**scheme.bits,
            "fewest_used": min(map(len, used)),
            "widest": max(abs(code) for own in used for code in own),
        }
    }
    assert said["codes"][str(scheme.bits)]["fewest_used"] > 2**scheme.bits / 2
    manifest = json.loads((out / "quantize.json").read_text())
    assert "on_disk" not in manifest  # the artifact's bytes are as they were


MIXED = Scheme(
    slug="mixed",
    method="gptq",
    grid=Grid(4, 64, True),
    backend="llm-compressor",
    form="compressed-tensors",
    rules=(
        Rule(r"layers\.0\.mlp\.down_proj", None),
        Rule("self_attn", Grid(8, -1, True)),
        Rule(r"layers\.1\.mlp\.(gate|up)_proj", Grid(3, 32, False)),
    ),
)


@pytest.mark.parametrize("tied", [True, False])
def test_mixed_grids_and_a_layer_that_a_rule_keeps(tied: bool, tmp_path: Path) -> None:
    base, out = write_base(tmp_path / "base", tied=tied), tmp_path / "out"
    compressed.write(base, out, MIXED)
    stored = on_disk.read(out, MIXED, read_headers(base))
    assert stored.problem() is None and list(stored.notes(stored.codes_used())) == []
    record = stored.record(stored.codes_used())
    kept = 128 * 256  # down_proj; the output layer counts in neither case
    assert record["packed_layers"] == 13 and record["layers"] == 14
    assert record["packed_share"] == pytest.approx(1 - kept / read_headers(base).linear_parameters, abs=1e-6)
    tensors = load_file(out / "model.safetensors")
    n_bytes = sum(one.nbytes for name, one in tensors.items() if ".weight_" in name)
    assert record["bits_a_weight"] == pytest.approx(8 * n_bytes / (stored.weights - kept), abs=1e-4)
    assert record["bits_a_weight"] == pytest.approx(record["promised_bits_a_weight"], abs=0.02)  # weight_shape: 16 B
    assert {bits: own["levels"] for bits, own in record["codes"].items()} == {"3": 8, "4": 16, "8": 256}
    assert record["codes"]["3"] == {"levels": 8, "fewest_used": 8, "widest": 7}


@pytest.mark.parametrize(("name", "slug"), [("gpt-oss", "rtn-w4-g32"), ("gpt-oss", "nf4"), ("qwen3-moe", "int8")])
def test_experts_that_stay_in_bf16_count_and_are_no_failure(name: str, slug: str, tmp_path: Path) -> None:
    """Accepted by `quantize.accept_unquantized` before the job starts."""
    base = write_architecture(tmp_path / "base", name)
    headers, said = read_headers(base), counted(slug, base, tmp_path / "out")
    dense = headers.dense_linear_parameters
    assert said["packed_layers"] == len(headers.dense_linears) > 0
    assert said["packed_share"] == pytest.approx(dense / (dense + headers.expert_parameters), abs=1e-6)
    assert said["packed_share"] < 0.5


WITH_TOWERS = ("gemma3-whole", "mistral3", "gemma4-whole", "qwen3.5-whole")  # the last two: shapes that rtn cannot pack


@pytest.mark.parametrize(("name", "slug"), [*((name, "nf4") for name in WITH_TOWERS), ("mistral3", "rtn-w4-g32")])
def test_towers_count_for_nothing_whatever_savers_call_the_decoder(name: str, slug: str, tmp_path: Path) -> None:
    """Gemma 3 and Mistral 3 are stored under other names than they are loaded: the backend's own record knows both."""
    base, out = write_architecture(tmp_path / "base", name), tmp_path / "out"
    headers = read_headers(base)
    job = make_job("quantize", out, params=params(slug), model=base)
    said = quantize.run(job)["on_disk"]
    assert headers.towers and "skipped layers" not in notes(job)
    assert said["packed_layers"] == said["layers"] == len(headers.linears) and said["packed_share"] == 1
    record = json.loads((out / "quantize.json").read_text())
    assert [layer["name"] for layer in record["layers"]] == [layer.name for layer in headers.linears]
    # 4 bits of random weights: some 0.1; where bitsandbytes takes other blocks' scales, which it says, up to 0.5.
    limit = 0.5 if ABOUT in notes(job) else 0.2
    assert all(0 < layer["weight_error"] < limit for layer in record["layers"])


def test_layers_of_another_name_are_found(base: Path, tmp_path: Path) -> None:
    """As a saver may call them that goes by the loaded model's names."""
    counted("rtn-w4-g32", base, tmp_path / "out")
    path = tmp_path / "out" / "model.safetensors"
    tensors = load_file(path)
    renamed = {name.replace("model.layers.", "model.language_model.layers."): one for name, one in tensors.items()}
    save_file(renamed, path, metadata={"format": "pt"})
    stored = on_disk.read(tmp_path / "out", parse_scheme("rtn-w4-g32"), read_headers(base))
    assert stored.packed_share == 1 and stored.problem() is None and stored.beyond == ()


# ---- what is not right


@pytest.fixture(scope="module")
def rounded(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A good rtn-w4-g32."""
    folder = tmp_path_factory.mktemp("rounded") / "out"
    counted("rtn-w4-g32", base, folder)
    return folder


def planted(folder: Path, out: Path, change: dict[str, Tensor | None]) -> Path:
    """A copy with tensors changed; None takes one away."""
    shutil.copytree(folder, out)
    tensors = {**load_file(folder / "model.safetensors"), **change}
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(kept, out / "model.safetensors", metadata={"format": "pt"})
    return out


def without_codes(layer: str) -> dict[str, Tensor | None]:
    return dict.fromkeys(f"{layer}.{part}" for part in ("qweight", "qzeros", "scales", "g_idx"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_layer_in_bf16_fails_the_step_and_is_named(
    dtype: torch.dtype, rounded: Path, base: Path, tmp_path: Path
) -> None:
    weight = load_file(base / "model.safetensors")[f"{LAYER}.weight"].to(dtype)
    out = planted(rounded, tmp_path / "out", without_codes(LAYER) | {f"{LAYER}.weight": weight})
    job = make_job("quantize", out, params=params("rtn-w4-g32"), model=base)
    layers = [LayerRecord(name=layer.name) for layer in read_headers(base).linears]
    with pytest.raises(StageError) as caught:
        _counted(job, parse_scheme("rtn-w4-g32"), read_headers(base), Quantized(backend="x", packer="x", layers=layers))
    problem = caught.value.problem
    stored = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}[dtype]
    assert f"1 of 14 linear layers are stored as {stored}" in problem.what and LAYER in problem.what
    assert "11% of the linear weights" in problem.why and "quench schemes" in problem.next  # 32,768 of 294,912


def test_what_a_backend_says_that_it_left_may_be_a_twentieth(rounded: Path, base: Path, tmp_path: Path) -> None:
    """Qwen3.5's in_proj_a and in_proj_b, 1 % of it, GPTQModel leaves in bf16, says so and names them in config.json."""
    weights, scheme, headers = load_file(base / "model.safetensors"), parse_scheme("rtn-w4-g32"), read_headers(base)
    claimed = {layer.name for layer in headers.linears}
    for name, share, fails in (("self_attn.k_proj", 1 / 36, False), ("self_attn.q_proj", 1 / 18, True)):
        layer = f"model.layers.0.{name}"
        change = without_codes(layer) | {f"{layer}.weight": weights[f"{layer}.weight"]}
        stored = on_disk.read(planted(rounded, tmp_path / name, change), scheme, headers)
        assert 1 - stored.packed_share == pytest.approx(share)
        assert (stored.problem(claimed=claimed - {layer}) is not None) == fails
        assert stored.problem(claimed=claimed) is not None  # said to be quantized, and is not: always


def test_all_in_bf16_under_a_quantization_config(rounded: Path, base: Path, tmp_path: Path) -> None:
    """What a merge does that forgets to quantize."""
    out = shutil.copytree(rounded, tmp_path / "out")
    shutil.copyfile(base / "model.safetensors", out / "model.safetensors")
    stored = on_disk.read(out, parse_scheme("rtn-w4-g32"), read_headers(base))
    problem = stored.problem()
    assert problem is not None and "14 of 14" in problem.what and "model.layers.*.mlp.down_proj (2)" in problem.what
    assert stored.packed_share == stored.bits_a_weight == 0 and stored.record({})["codes"] == {}


def test_a_layer_that_is_lost(rounded: Path, base: Path, tmp_path: Path) -> None:
    out = planted(rounded, tmp_path / "out", without_codes(LAYER))
    problem = on_disk.read(out, parse_scheme("rtn-w4-g32"), read_headers(base)).problem()
    assert problem is not None and "not in the quantized files" in problem.what and LAYER in problem.what


@pytest.mark.parametrize(("slug", "says"), [("rtn-w8-g32", "holds 4-bit codes"), ("rtn-w4-g64", "4 scales an output")])
def test_another_grid_than_promised(slug: str, says: str, rounded: Path, base: Path) -> None:
    problem = on_disk.read(rounded, parse_scheme(slug), read_headers(base)).problem()
    assert problem is not None and "14 of 14" in problem.what and says in problem.why


@pytest.mark.parametrize(("shown", "noted"), [(1, True), (8, True), (9, False)])
def test_right_scales_and_constant_codes_are_noted(
    shown: int, noted: bool, rounded: Path, base: Path, tmp_path: Path
) -> None:
    """More than half of sixteen levels need all four bits."""
    nibbles = torch.arange(16 * 256 * 8) % shown  # [128 / 8, 256] words of eight codes
    words = (nibbles[0::2] << 4 | nibbles[1::2]).to(torch.uint8).numpy().view("<i4").reshape(16, 256)
    out = planted(rounded, tmp_path / "out", {f"{LAYER}.qweight": torch.from_numpy(words)})
    job = make_job("quantize", out, params=params("rtn-w4-g32"), model=base)
    made = Quantized(backend="x", packer="x", layers=[LayerRecord(name=LAYER)])
    record = _counted(job, parse_scheme("rtn-w4-g32"), read_headers(base), made)
    assert record["codes"]["4"]["fewest_used"] == shown
    said = notes(job).get("on disk", "")
    assert (f"least {LAYER}, {shown} of 16" in said) == noted and bool(said) == noted


def test_more_bytes_than_promised_and_what_should_not_be_packed_are_noted(
    rounded: Path, base: Path, tmp_path: Path
) -> None:
    tensors = load_file(rounded / "model.safetensors")
    wide = {name: one.double() for name, one in tensors.items() if name.endswith(".scales")}
    head = {"lm_head.qweight": torch.zeros(16, 300, dtype=torch.int32)}
    out = planted(rounded, tmp_path / "out", wide | head)
    stored = on_disk.read(out, parse_scheme("rtn-w4-g32"), read_headers(base))
    assert stored.problem() is None
    size, beyond = stored.notes(stored.codes_used())
    assert "bits a weight on disk" in size and "promised" in size
    assert "lm_head" in beyond and stored.beyond == ("lm_head",)
