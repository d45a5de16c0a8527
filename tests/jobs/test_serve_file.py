"""serve.json and serve.md beside quantized and merged weights: the command, and Python that really loads them."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from recipes.models.headers import read_headers
from recipes.schemes.serve_file import describe, readable, shell
from recipes.schemes.slugs import parse_scheme
from tasks.jobs import merge, quantize
from tasks.jobs.loading.load import load_arm
from tests.jobs.build import make_job
from tests.jobs.test_merge import plant_adapter
from tests.tiny import write_base

TOKENS = torch.randint(4, 300, (2, 32), generator=torch.Generator().manual_seed(1))


def loaded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Names that the Python of serve.md defines, run in the folder as it says."""
    code, *_ = re.findall(r"```python\n(.*?)```", (folder / "serve.md").read_text(), flags=re.DOTALL)
    monkeypatch.chdir(folder)
    names: dict[str, Any] = {}
    exec(code, names)
    return names


def flags(served: dict[str, Any]) -> list[str]:
    return shlex.split(shell(served["vllm"]["command"]))


def same(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    with torch.no_grad():
        return torch.equal(one(TOKENS).logits, other(TOKENS).logits)


def test_of_a_quantized_model(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    params = parse_scheme("rtn-w4-g32").params() | {"seed": 0}
    out = tmp_path / "out"
    quantize.run(make_job("quantize", out, params=params, model=base))
    served = json.loads((out / "serve.json").read_text())
    words = flags(served)
    assert words[:3] == ["vllm", "serve", "$PWD"] and "--quantization" not in words and "--kv-cache-dtype" not in words
    assert [words[words.index(name) + 1] for name in ("--dtype", "--max-model-len", "--tensor-parallel-size")] == [
        "bfloat16",
        "512",
        "1",
    ]
    assert served["loaders"].keys() == {"transformers", "vllm", "exllamav2", "auto-gptq", "onnxruntime-genai"}
    text = (out / "serve.md").read_text()
    assert "No --chat-template" in text and "ExLlamaV2" in text and str(tmp_path) not in text
    assert same(loaded(out, monkeypatch)["model"], load_arm("quantized", out, device="cpu"))


def test_of_a_merged_model(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    adapter, out = plant_adapter(base, tmp_path / "adapter"), tmp_path / "out"
    merge.run(make_job("merge", out, params={"onto": "dequantized"}, base=base, adapter=adapter))
    served = json.loads((out / "serve.json").read_text())
    assert flags(served)[:2] == ["vllm", "serve"] and served["scheme"] is None and served["form"] == "bf16"
    assert served["vllm"]["tensor_parallel_sizes"] == [1, 2, 4]  # of its 4 heads
    names = loaded(out, monkeypatch)
    assert same(names["model"], load_arm("bf16", out, device="cpu"))
    turns = [{"role": "user", "content": "what colour ?"}]
    assert names["tokenizer"].apply_chat_template(turns, tokenize=False).startswith("<|im_start|>user")


def test_what_vllm_refuses_has_no_command_but_the_alternative(base: Path):
    served = describe(read_headers(base), name="gptq-w3-g32", scheme=parse_scheme("gptq-w3-g32"))
    assert served["vllm"]["command"] is None and served["vllm"]["refused"]
    text = readable(served)
    assert "vllm serve" not in text and "Write ct-gptq-w3-g32: vLLM reads it." in text and "from_pretrained" in text


def test_options_follow_the_scheme_and_the_recipe(base: Path):
    headers = read_headers(base)
    scaled = replace(parse_scheme("ct-gptq-w4-g32"), slug="kv", kv_scales=True)
    text = readable(describe(headers, name="kv", scheme=scaled, tensor_parallel=2, max_model_len=256))
    assert "--max-model-len 256 --tensor-parallel-size 2" in text and "--kv-cache-dtype fp8 uses them" in text
    assert "compressed-tensors" in text
    nf4 = describe(headers, name="nf4", scheme=parse_scheme("nf4"))
    assert nf4["vllm"]["tensor_parallel_sizes"] == [1] and "vllm-bnb-plugin" in readable(nf4)
    assert "of 1, 2, 4 and 8 GPUs 1 can share it" in readable(nf4)


def test_arguments_and_the_day_of_a_template_are_in_the_command(base: Path, tmp_path: Path):
    adapter = plant_adapter(base, tmp_path / "adapter")
    said = {"template_args": {"enable_thinking": False}, "template_date": "2026-01-31"}
    (adapter / "tokenizer" / "chat_template_args.json").write_text(json.dumps(said))
    merged = tmp_path / "merged"
    merge.run(make_job("merge", merged, params={"onto": "original"}, base=base, adapter=adapter))
    out = tmp_path / "out"
    params = parse_scheme("rtn-w4-g32").params() | {"seed": 0}
    quantize.run(make_job("quantize", out, params=params, model=merged))
    for folder in (merged, out):
        served = json.loads((folder / "serve.json").read_text())
        words = flags(served)
        assert json.loads(words[words.index("--default-chat-template-kwargs") + 1]) == {"enable_thinking": False}
        text = (folder / "serve.md").read_text()
        assert """--default-chat-template-kwargs '{"enable_thinking": false}'""" in text
        assert "apply_chat_template(..., enable_thinking=False)" in text
        assert "It was 2026-01-31 in training and evaluation; an engine prints its own day" in text
    plain = describe(read_headers(base), name="base", scheme=None)
    assert "--default-chat-template-kwargs" not in flags(plain)
    assert "apply_chat_template" not in readable(plain)


def test_the_builder_of_onnxruntime_leaves_what_is_not_quantized_as_it_is(base: Path):
    headers = read_headers(base)
    served = describe(headers, name="gptq-w4-g32", scheme=parse_scheme("gptq-w4-g32"))
    words = served["onnxruntime-genai"]["convert"]
    assert words[words.index("-p") + 1] == "int4" and "accuracy_level=1" in words
    assert "nodes_to_exclude=/lm_head/MatMul,/model/embed_tokens/Gather" in words
    assert '-i "$PWD" -o "$OUT"' in readable(served)
    merged = describe(headers, name="merged", scheme=None)["onnxruntime-genai"]["convert"]
    assert merged[merged.index("-p") + 1] == "fp32"
    refused = describe(headers, name="nf4", scheme=parse_scheme("nf4"))
    assert refused["onnxruntime-genai"]["convert"] is None and "ONNX" not in readable(refused)


def test_a_base_without_a_template_is_told_so(tmp_path: Path):
    headers = read_headers(write_base(tmp_path, chat_template=False))
    assert "name one by --chat-template" in readable(describe(headers, name="x", scheme=None))
