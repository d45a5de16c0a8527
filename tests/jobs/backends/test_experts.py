"""A mixture through llm-compressor: experts are quantized one by one, and load here as the stack that they are."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from recipes.models.headers import read_headers
from recipes.schemes.slugs import parse_scheme
from tasks.jobs.loading.load import load_arm, load_bf16
from tasks.runtime.process.environments import environment_problem, interpreter
from tasks.runtime.process.launch import child_env
from tests.jobs.architectures import write_architecture
from tests.jobs.backends import compressed
from tests.jobs.quantized import COST, log_probs, mean_kl

NAME = "llmcompressor"
problem = environment_problem(NAME)
pytestmark = [pytest.mark.slow, pytest.mark.skipif(problem is not None, reason=str(problem and problem.next))]
LENGTH, ROWS = 96, 6
CODE = """
import json, sys
from pathlib import Path
from tasks.jobs.backends import Request, llm_compressor
from tasks.runtime.process.events import Events
asked = json.loads(sys.argv[1])
out = Path(asked["out"])
made = llm_compressor.quantize(Request(model=Path(asked["model"]), out=out, rows=asked["rows"], params=asked["params"],
    device="cpu", events=Events(out / "events.jsonl")))
(out / "made.json").write_text(json.dumps(made.as_dict()))
"""


@pytest.mark.parametrize("slug", ["ct-gptq-w4-g32", "ct-gptq-w4-g64"])  # no zero points: ct-awq does not load
def test_experts_are_quantized_and_load_as_what_their_codes_mean(slug: str, tmp_path: Path) -> None:
    base, out, scheme = write_architecture(tmp_path / "base", "qwen3-moe"), tmp_path / "out", parse_scheme(slug)
    out.mkdir()
    rows = torch.randint(4, 240, (ROWS, LENGTH), generator=torch.Generator().manual_seed(1)).tolist()
    params = scheme.params() | {"damp": 0.05, "seed": 0}
    asked = {"model": str(base), "out": str(out), "rows": rows, "params": params}
    argv = [str(interpreter(NAME)), "-P", "-c", CODE, json.dumps(asked)]
    done = subprocess.run(argv, env=child_env(), cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    layers = json.loads((out / "made.json").read_text())["layers"]
    experts = [layer for layer in layers if ".experts." in layer["name"]]
    assert [layer["name"] for layer in layers] == [layer.name for layer in read_headers(base).linears]
    assert len(experts) == 2 * 4 * 3
    if scheme.method == "gptq":
        assert {layer["tokens"] for layer in experts} == {ROWS * LENGTH}  # every expert sees every token
    loaded, original = load_arm("quantized", out, device="cpu"), load_bf16(base, device="cpu")
    meant = compressed.layers(out, scheme)
    for number in range(2):
        stacked, name = loaded.model.layers[number].mlp.experts, f"model.layers.{number}.mlp.experts"
        for expert in range(4):
            parts = [meant[f"{name}.{expert}.{part}"] for part in ("gate_proj", "up_proj")]
            assert torch.equal(stacked.gate_up_proj[expert], torch.cat(parts))
            assert torch.equal(stacked.down_proj[expert], meant[f"{name}.{expert}.down_proj"])
    assert 1e-7 < mean_kl(log_probs(original), log_probs(loaded)) < 2 * COST[4]
    routers = [name for name in load_file(out / "model.safetensors") if name.endswith("mlp.gate.weight")]
    assert len(routers) == 2  # in bf16, as they were
