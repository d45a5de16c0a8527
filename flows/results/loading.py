"""How each arm is loaded and served from the store: Python, vLLM's command, or why there is none."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from flows.results.read import Run, RunArm, RunStep
from recipes.plain import json_object
from recipes.schemes.serve_file import auto_class, shell

NOT_SHIPPED = ("control", "kv-cache", "null", "external")  # KV and null arms load another arm's files
NEEDS_EXPORT = "an adapter on a base is served from an export, which puts both side by side"


def loading_of(run: Run) -> dict[str, Any]:
    """What report.json holds under `loading`: arm -> python, vllm, needs, refused; paths relative to QUENCH_HOME."""
    return {arm.slug: _arm(arm, run) for arm in run.arms if arm.role not in NOT_SHIPPED and _whole(arm, run)}


def _whole(arm: RunArm, run: Run) -> bool:
    """It was evaluated, and everything that is loaded is in the store or is the base itself."""
    keys = [key for key in (arm.model, arm.adapter) if key]
    scored = run.step(arm.evaluate)
    return (scored is not None and scored.ok) and all((step := run.step(key)) is not None and step.ok for key in keys)


def _arm(arm: RunArm, run: Run) -> dict[str, Any]:
    model, adapter = run.step(arm.model), run.step(arm.adapter)
    served = _serve_file(model)
    vllm: Mapping[str, Any] = served.get("vllm") or {}
    refused = [f"{one['what']} {one['why']}" for one in vllm.get("refused", [])]
    if adapter is not None:
        refused = [NEEDS_EXPORT]
    command = vllm.get("command") if adapter is None else None
    return {
        "python": "\n".join(_python(arm, model, adapter, served=served or _base_class(run))),
        "vllm": f"cd {model.path}/files && {shell(command)}" if command and model is not None else None,
        "needs": served.get("loaders", {}),
        "refused": refused,
        "export": f"quench export {run.raw['id']} {arm.slug} {arm.slug}" if _exported(arm) else None,
    }


def _exported(arm: RunArm) -> bool:
    """There is something to export; the untouched base is where it was."""
    return bool(arm.model or arm.adapter)


def _serve_file(model: RunStep | None) -> dict[str, Any]:
    path = model.files / "serve.json" if model is not None and model.files else None
    return json.loads(path.read_text(encoding="utf-8")) if path is not None and path.exists() else {}


def _base_class(run: Run) -> dict[str, Any]:
    """The class of the base, as serve.json would name it."""
    return dict(auto_class(json_object(run.base / "config.json") or {})) if run.base is not None else {}


def _python(arm: RunArm, model: RunStep | None, adapter: RunStep | None, *, served: Mapping[str, Any]) -> Iterator[str]:
    place = repr(f"{model.path}/files") if model is not None else "BASE"
    nf4, dequantize = arm.kind == "nf4", bool(served.get("dequantize"))
    auto = served.get("auto_class", "AutoModelForCausalLM")
    more = ", BitsAndBytesConfig" if nf4 else ", CompressedTensorsConfig" if dequantize else ""
    yield "import torch"
    if adapter is not None:
        yield "from peft import PeftModel"
    yield f"from transformers import {auto}, AutoTokenizer{more}"
    yield ""
    settings = 'dtype=torch.bfloat16, device_map="auto"'
    if nf4:
        yield 'nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4",'
        yield "    bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16)"
        settings += ", quantization_config=nf4"
    if dequantize:  # without it, transformers 5.23 raises at the zero points
        settings += ", quantization_config=CompressedTensorsConfig(dequantize=True)"
    yield f"model = {auto}.from_pretrained({place}, {settings})"
    if adapter is not None:
        yield f"model = PeftModel.from_pretrained(model, '{adapter.path}/files')"
    words = f"'{adapter.path}/files/tokenizer'" if adapter is not None else place
    yield f"tokenizer = AutoTokenizer.from_pretrained({words})"
