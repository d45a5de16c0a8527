"""What one writes by hand for each library: load, quantize, save. Imports nothing of Quench's.

Run as a script by the Python of the library's environment: SLUG MODEL ROWS.json OUT [PEAK]. Settings are those of
Quench's backends, rows are lists of token ids. PEAK gets the peak RSS in GiB.
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

Rows = Sequence[Sequence[int]]
DAMP = 0.05


def gptqmodel(slug: str, model: str, rows: Rows, out: Path) -> None:
    """GPTQ, AWQ and RTN; its log at the level of warnings, as ours has it."""
    import logbar

    logbar.LogBar.shared().setLevel("WARN")
    from gptqmodel import BACKEND, GPTQModel
    from gptqmodel.quantization import AWQConfig, GPTQConfig, RTNConfig

    os.chdir(out)
    common: dict[str, Any] = {"bits": 4, "group_size": 128, "offload_to_disk": False}
    config, more = GPTQConfig(**common, damp_percent=DAMP), {}
    if slug.startswith("awq"):
        rows = equal_lengths(rows)
        config, more = AWQConfig(**common, sym=False), {"backend": BACKEND.AWQ_TORCH}
    samples: Any = masked(rows)
    if slug.startswith("rtn"):
        config, samples, more = RTNConfig(**common), None, {}
    loaded: Any = GPTQModel.load(model, config, device="cpu")
    loaded.quantize(samples, **({"batch_size": 1, **more} if samples else {}))
    loaded.save(str(out))


def bitsandbytes(slug: str, model: str, rows: Rows, out: Path) -> None:
    """NF4 and LLM.int8(), which look at no rows."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    nf4: dict[str, Any] = {
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": torch.bfloat16,
    }
    config = BitsAndBytesConfig(load_in_4bit=True, **nf4) if slug == "nf4" else BitsAndBytesConfig(load_in_8bit=True)
    settings: dict[str, Any] = {"quantization_config": config, "device_map": {"": "cpu"}}
    AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16, **settings).save_pretrained(out)


def llm_compressor(slug: str, model: str, rows: Rows, out: Path) -> None:
    """GPTQ and AWQ into compressed-tensors."""
    os.environ["LLM_COMPRESSOR_LOG_LEVEL"] = "ERROR"  # as ours has it
    oneshot: Any = importlib.import_module("llmcompressor").oneshot
    modifiers: Any = importlib.import_module("llmcompressor.modifiers")
    from torch.utils.data import DataLoader
    from transformers import AutoModelForCausalLM

    target: dict[str, Any] = {"targets": "Linear", "ignore": ["lm_head"]}
    if "awq" in slug:
        scales = importlib.import_module("llmcompressor.modifiers.transform.awq").AWQModifier()
        recipe = [scales, modifiers.quantization.QuantizationModifier(**target, scheme="W4A16_ASYM")]
        cache: Any = importlib.import_module("llmcompressor.pipelines.cache")
        cache.IntermediatesCache.pin_memory = lambda *_: None  # raises on a machine without an accelerator
    else:
        gptq = importlib.import_module("llmcompressor.modifiers.gptq")
        recipe = [gptq.GPTQModifier(**target, scheme="W4A16", dampening_frac=DAMP, actorder="static")]
    loaded: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    samples: Any = [{"input_ids": torch.tensor([list(row)])} for row in rows]
    oneshot(model=loaded, dataset=DataLoader(samples, batch_size=None), recipe=recipe)
    loaded.save_pretrained(out, save_compressed=True)


def autoawq(slug: str, model: str, rows: Rows, out: Path) -> None:
    """AutoAWQ, in fp32: in fp16 a layer of the quickstart takes 65 s on a CPU."""
    awq: Any = importlib.import_module("awq")
    blocks = equal_lengths(rows)
    loaded = awq.AutoAWQForCausalLM.from_pretrained(model, torch_dtype=torch.float32)
    loaded.quantize(
        quant_config={"w_bit": 4, "q_group_size": 128, "zero_point": True},
        calib_data=blocks,
        max_calib_samples=len(blocks),
        max_calib_seq_len=len(blocks[0]),
    )
    loaded.save_quantized(str(out))


def auto_gptq(slug: str, model: str, rows: Rows, out: Path) -> None:
    """AutoGPTQ on a CPU: its question for CUDA passed over, and layers left where they are."""
    library: Any = importlib.import_module("auto_gptq")
    modeling: Any = importlib.import_module("auto_gptq.modeling")
    modeling._base.CUDA_0 = torch.device("cpu")
    torch.cuda.synchronize = lambda device=None: None
    auto: Any = importlib.import_module("transformers").AutoModelForCausalLM
    asked = library.BaseQuantizeConfig(bits=4, group_size=128, sym=True, desc_act=False, damp_percent=DAMP)
    loaded = auto.from_pretrained(model, torch_dtype=torch.float16).eval()
    wrapped = modeling.GPTQ_CAUSAL_LM_MODEL_MAP[loaded.config.model_type](loaded, False, asked)
    wrapped.quantize(masked(rows), batch_size=1)
    wrapped.save_quantized(str(out), use_safetensors=True)


def equal_lengths(rows: Rows) -> list[list[int]]:
    """The same tokens in as many rows of one length, which both AWQs ask for."""
    stream = [token for row in rows for token in row]
    length = len(stream) // len(rows)
    return [stream[i * length : (i + 1) * length] for i in range(len(rows))]


def masked(rows: Rows) -> list[dict[str, list[int]]]:
    """As both GPTQs take them."""
    return [{"input_ids": list(row), "attention_mask": [1] * len(row)} for row in rows]


def main(slug: str, model: str, rows: Path, out: Path, peak: Path | None = None) -> None:
    """Quantize by the library that the slug names."""
    torch.set_num_threads(1)
    method, _, backend = slug.partition(".")
    if not backend:
        backend = "bitsandbytes" if slug in ("nf4", "int8") else "gptqmodel"
        backend = "llm_compressor" if method.startswith("ct-") else backend
    calls = {call.__name__: call for call in (gptqmodel, bitsandbytes, llm_compressor, autoawq, auto_gptq)}
    calls[backend.replace("-", "_")](slug, model, json.loads(rows.read_text(encoding="utf-8")), out)
    if peak is not None:
        peak.write_text(str(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 20)), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], *map(Path, sys.argv[3:]))
    sys.stdout.flush()
    os._exit(0)  # as ours ends: shutting the interpreter down with torch loaded costs seconds
