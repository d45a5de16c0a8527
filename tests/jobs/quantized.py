"""Quantized folders for tests, and what their files mean by the definition of their format, in code of its own."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from recipes.models.headers import read_headers
from recipes.schemes.scheme import PER_CHANNEL
from recipes.schemes.slugs import parse_scheme
from tasks.jobs import quantize
from tasks.jobs.calibrate import CALIBSET
from tasks.jobs.loading.load import load_bf16
from tasks.runtime.process.job import Job
from tests.jobs.build import make_job

# Mean KL in nats on random models. COST, of rounding: four times what was measured at these bits.
COST = {2: 0.4, 3: 0.1, 4: 0.02, 8: 3e-4}
# NOISE, between the loaded kernel and a bf16 matmul with the weights that the file means: 1e-5 was measured (0 for 2
# bits); int8 rounds the inputs of every layer to 8 bits, too, and its codes x scales are bf16 here: 7e-5.
NOISE, NOISE_INT8 = 2e-5, 2e-4
AWQ_ORDER = [0, 4, 1, 5, 2, 6, 3, 7]  # where the gemm layout puts the n-th of eight outputs
# The 16 levels of NF4 (Dettmers et al. 2023, appendix E).
NF4 = [
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
    *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
]


def params(slug: str) -> dict[str, object]:
    """Of the quantize job, as tasks/quantize.py makes them."""
    scheme = parse_scheme(slug)
    return scheme.params() | {"seed": 0} | ({"damp": 0.05} if scheme.method == "gptq" else {})


def write_calibset(folder: Path, *, lengths: tuple[int, ...] = (96, 80, 96, 61, 90, 77)) -> Path:
    """Random sequences of these lengths."""
    generator = torch.Generator().manual_seed(1)
    lines = [
        {"sequence": i, "rows": [], "input_ids": torch.randint(4, 300, (n,), generator=generator).tolist()}
        for i, n in enumerate(lengths)
    ]
    folder.mkdir()
    pq.write_table(pa.Table.from_pylist(lines, schema=CALIBSET), folder / "calibset.parquet")
    return folder


def make(slug: str, model: Path, out: Path, *, calibset: Path) -> Job:
    """Run the quantize job in this process."""
    inputs = {"model": model} | ({"calibset": calibset} if parse_scheme(slug).needs_calibration else {})
    job = make_job("quantize", out, params=params(slug), **inputs)
    quantize.run(job)
    return job


def codes(packed: Tensor, bits: int) -> Tensor:
    """Undo the packing along the last dimension: a stream of bits, low ones first."""
    stream = np.unpackbits(packed.contiguous().numpy().view(np.uint8), axis=1, bitorder="little")
    return torch.from_numpy(np.packbits(stream.reshape(len(packed), -1, bits), axis=-1, bitorder="little")[..., 0])


def meant(tensors: dict[str, Tensor], name: str, slug: str) -> Tensor:
    """[out, in] fp32 of a layer, by the format's definition."""
    scheme = parse_scheme(slug)
    if scheme.method == "nf4":
        return _nf4(tensors, f"{name}.weight")
    if scheme.method == "int8":
        return tensors[f"{name}.weight"].float() * (tensors[f"{name}.SCB"] / 127).unsqueeze(-1)
    packed, zeros, scales = (tensors[f"{name}.{part}"] for part in ("qweight", "qzeros", "scales"))
    if scheme.form == "awq":  # packed along the outputs, in its own order; zeros as they are
        weight, zero = (codes(one, 4).view(len(one), -1, 8)[..., AWQ_ORDER].flatten(1) for one in (packed, zeros))
        group = torch.arange(len(weight)) // scheme.group_size
    else:  # packed along the inputs; zeros less one
        weight, zero = codes(packed.t(), scheme.bits).t(), codes(zeros, scheme.bits).int() + 1
        group = tensors[f"{name}.g_idx"]
    return ((weight.float() - zero.float()[group]) * scales.float()[group]).t()


def _nf4(tensors: dict[str, Tensor], name: str) -> Tensor:
    """Level x absmax of 64 weights; absmax = 8-bit level x absmax of 256 of them + offset."""
    state = tensors[f"{name}.quant_state.bitsandbytes__nf4"].numpy().tobytes()
    quant_state = json.loads(state)
    nested = tensors[f"{name}.nested_quant_map"][tensors[f"{name}.absmax"].int()]
    of_256 = tensors[f"{name}.nested_absmax"].repeat_interleave(quant_state["nested_blocksize"])[: len(nested)]
    absmax = nested * of_256 + quant_state["nested_offset"]
    packed = tensors[name].flatten().int()  # two codes a byte, the first one in its high half
    levels = torch.tensor(NF4)[torch.stack([packed >> 4, packed & 15], dim=1).flatten()]
    return (levels.view(-1, quant_state["blocksize"]) * absmax.unsqueeze(-1)).view(quant_state["shape"])


def on_the_grid(tensors: dict[str, Tensor], name: str, slug: str) -> None:
    """The stored scales, zero points and groups are those that the scheme claims."""
    scheme = parse_scheme(slug)
    if scheme.form == "bitsandbytes":
        return
    scales, zeros = tensors[f"{name}.scales"], codes(tensors[f"{name}.qzeros"], scheme.bits)
    inputs = tensors[f"{name}.qweight"].shape[0] * (1 if scheme.form == "awq" else 32 / scheme.bits)
    size = inputs if scheme.group_size == PER_CHANNEL else scheme.group_size
    kept = torch.bfloat16 if scheme.form == "awq" else torch.float16  # GPTQModel's AWQ keeps the model's type: a note
    assert scales.dtype == kept and (scales > 0).all(), name
    assert len(scales) == len(zeros) == inputs / size, name
    if scheme.grid.symmetric:
        assert (zeros == 2 ** (scheme.bits - 1) - 1).all(), name
    if scheme.form == "gptq":
        group = tensors[f"{name}.g_idx"]
        assert group.bincount().tolist() == [size] * len(scales), name
        assert scheme.desc_act or torch.equal(group, group.sort().values), name


def fake_quantized(base: Path, out: Path, slug: str) -> nn.Module:
    """The base in bf16 with the weights that the quantized files mean."""
    model, tensors = load_bf16(base, device="cpu"), load_file(out / "model.safetensors")
    layers = [layer.name for layer in read_headers(base).linears]
    state = {name: one for name, one in tensors.items() if name in read_headers(base).tensors}
    for name in layers:
        on_the_grid(tensors, name, slug)
        state[f"{name}.weight"] = meant(tensors, name, slug)
    assert not model.load_state_dict(state, strict=False).unexpected_keys
    return model


@torch.inference_mode()
def log_probs(model: nn.Module) -> Tensor:
    """[4, 48, vocabulary] fp64 of random tokens."""
    tokens = torch.randint(4, 300, (4, 48), generator=torch.Generator().manual_seed(2))
    return model(tokens).logits.double().log_softmax(-1)


def mean_kl(p: Tensor, q: Tensor) -> float:
    """KL(p || q) in nats a token."""
    return (p.exp() * (p - q)).sum(-1).mean().item()
