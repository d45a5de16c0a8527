"""`python -m tests.bench.gpu`: what a GPU says of the code that tests run on CPUs; writes docs/results/gpu.md.

Two recipes through `quench run`, each in a home of its own: the quickstart's, whose scores stand beside those of a CPU
(docs/results/quickstart.md), and one on random weights in the shape of a Llama 3 8B with fewer layers, which holds
every prediction of memory against what the GPU gave out and times kernels at the sizes that people serve.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tasks.runtime.process.environments import versions
from tasks.runtime.process.launch import CHECKOUT

QUICKSTART = CHECKOUT / "recipes" / "quickstart"
PAGE = CHECKOUT / "docs" / "results" / "gpu.md"
RAW = PAGE.with_suffix(".json")
LAYERS = 8  # of 32: weights of 5.6 GB in bf16, so that all steps fit a few minutes
SHAPE = {  # of a Llama 3 8B
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}
REHEARSED = SHAPE | {"hidden_size": 256, "intermediate_size": 768, "vocab_size": 4096}  # without a GPU
OTHER = {
    "max_position_embeddings": 8192,
    "rope_parameters": {"rope_theta": 500000.0, "rope_type": "default"},
    "pad_token_id": 0,
    "eos_token_id": 2,
    "bos_token_id": None,
}
ROWS, LENGTH = 400, 2048  # tokens a row; the longest ones reach it
# The quickstart without what brings nothing new on another device: its KV-cache and on-base arms, and the speeds of a
# model whose kernels take microseconds.
SHORT = ("evaluate.kv_cache=[]", "evaluate.on_base=[]", "measure.enabled=false")
NO_SPEED = "measure.enabled=false"
TOOLS = ("torch", "transformers", "trl", "peft", "bitsandbytes", "accelerate", "gptqmodel", "numpy")


def write_shape(folder: Path, *, layers: int) -> Path:
    """A base with normal weights and the quickstart's tokenizer, rows of `LENGTH` tokens, and a recipe on them."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    device, sizes = ("cuda", SHAPE) if torch.cuda.is_available() else ("cpu", REHEARSED)
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        model = LlamaForCausalLM(LlamaConfig(**sizes, **OTHER, num_hidden_layers=layers))
    base = folder / "base"
    model.save_pretrained(base)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        shutil.copy(QUICKSTART / "base" / name, base / name)
    texts = (QUICKSTART / "data" / "general.jsonl").read_text(encoding="utf-8").splitlines()
    words = sorted({word for line in texts for word in json.loads(line)["text"].split() if word.isalpha()})
    draw = random.Random(0)
    rows = []
    for number in range(ROWS):
        long = draw.choices((range(60, 120), range(400, 900)))[0]  # words; calibration takes rows of up to 512 tokens
        asked, answer = draw.choices(words, k=draw.choice(long)), draw.choices(words, k=40)
        turns = [("user", f"{number}: {' '.join(asked)}"), ("assistant", " ".join(answer))]
        turns += [("user", "so ?"), ("assistant", "yes")]  # the turn that is answered: random weights never end theirs
        rows.append({"messages": [{"role": role, "content": text} for role, text in turns]})
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    recipe = folder / "recipe.yaml"
    recipe.write_text(
        f"""
name: shape
model: {{base: base}}
data: {{path: rows.jsonl, max_length: {LENGTH}, dev: 0.05, test: 0.05}}
train: {{rank: 64, learning_rate: 1.0e-4, batch_size: 4, max_steps: 4, checkpoint_steps: 2}}
calibrate: {{rows: 128, seq_len: 512}}
quantize: {{schemes: [awq-w4-g128, gptq-w4-g128, rtn-w4-g128]}}
evaluate: {{batch_size: 2, max_new_tokens: 8, reference_gib: 1}}
measure: {{prompt_tokens: 1024, new_tokens: 32}}
run: {{micro_batch: 2}}
""",
        encoding="utf-8",
    )
    return recipe


def started(home: Path, recipe: Path, *sets: str) -> subprocess.Popen[bytes]:
    """`quench run` on its way; its output goes to HOME.log."""
    words = [sys.executable, "-m", "flows.cli", "run", str(recipe), *(word for one in sets for word in ("--set", one))]
    home.mkdir(parents=True, exist_ok=True)
    with home.with_suffix(".log").open("ab") as log:
        return subprocess.Popen(
            words,
            env={**os.environ, "QUENCH_HOME": str(home)},
            cwd=CHECKOUT,
            stdout=log,
            stderr=subprocess.STDOUT,
        )


def found(home: Path) -> dict[str, Any]:
    """What is kept of the latest report; nothing where there is none."""
    path = home / "runs" / "latest" / "report.json"
    if not path.exists():
        return {}
    report = json.loads(path.read_text(encoding="utf-8"))
    made = {one["key"]: home / one["path"] / "manifest.json" for one in report["steps"] if one["path"]}
    for one in report["memory"]:
        if (manifest := made.get(one["step"])) is not None and manifest.exists():
            one["kernel"] = json.loads(manifest.read_text(encoding="utf-8"))["result"].get("kernel")
    keep = ("status", "arms", "memory", "seconds", "speed", "notes", "failures", "hardware", "data")
    return {name: report[name] for name in keep}


def gpu() -> dict[str, str]:
    """Name, memory and driver of the first GPU."""
    names = ("name", "memory", "driver")
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        said = subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0]
    except FileNotFoundError:
        return dict.fromkeys(names, "none: a rehearsal on a CPU")
    return dict(zip(names, (one.strip() for one in said.split(",")), strict=True))


def measured(folder: Path, *, layers: int, extra: list[str], keep: Path) -> dict[str, Any]:
    """Both recipes at once without speeds; then the larger again with them, alone. Kept after each."""
    raw: dict[str, Any] = {"gpu": gpu(), "layers": layers, "versions": versions(TOOLS)}
    shape = folder / "shape"
    shape.mkdir(parents=True, exist_ok=True)
    if not (recipe := shape / "recipe.yaml").exists():
        recipe = write_shape(shape, layers=layers)
    homes = {"quickstart": folder / "quickstart", "shape": folder / "home"}
    both = [
        started(homes["quickstart"], QUICKSTART / "recipe.yaml", *SHORT, *extra),
        started(homes["shape"], recipe, NO_SPEED),
    ]
    raw["codes"] = [one.wait() for one in both]
    for again in (False, True):
        if again:
            raw["codes"].append(started(homes["shape"], recipe).wait())
        raw |= {name: found(home) for name, home in homes.items()}
        keep.write_text(json.dumps(raw, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    return raw


def page(raw: dict[str, Any]) -> str:
    """docs/results/gpu.md."""
    card, tools = raw["gpu"], ", ".join(f"{name} {version}" for name, version in raw["versions"].items())
    shape, quickstart = raw["shape"], raw["quickstart"]
    machine = shape["hardware"]
    return f"""<!-- Written by `python -m tests.bench.gpu`. -->
# What a GPU says

{card["name"]} ({card["memory"]}, driver {card["driver"]}); {machine["cpu"]}, {machine["cores"]} cores;
{tools}. One run, seed 0. Both recipes ran at once, so no wall time is given.

## Memory: an 8B's layers, {raw["layers"]} of 32, random weights, rows of up to {LENGTH} tokens

{_memory(shape["memory"])}

## Speed there, alone

{_speeds(shape)}

## The quickstart's scores

{_scores(quickstart)}

## What failed

{_failures(shape, quickstart)}
"""


def _memory(lines: list[dict[str, Any]]) -> str:
    head = "| step | GPU, predicted | measured | host, predicted | measured | kernel |\n"
    head += "| --- | ---: | ---: | ---: | ---: | --- |\n"
    names = ("predicted_gpu_gib", "measured_gpu_gib", "predicted_host_gib", "measured_host_gib")
    rows = [[one["step"], *(_number(one[name]) for name in names), one.get("kernel") or ""] for one in lines]
    return head + "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n\nGiB."


def _speeds(report: dict[str, Any]) -> str:
    names = ("prefill_tokens_per_s", "decode_tokens_per_s")
    rows = [
        f"| {slug} | {' | '.join(_number(_value(report['arms'][slug], name)) for name in names)} | {one['kernel']} |"
        for slug, one in report["speed"].items()
    ]
    return "| arm | prefill, tokens/s | decode, tokens/s | kernel |\n| --- | ---: | ---: | --- |\n" + "\n".join(rows)


def _scores(report: dict[str, Any]) -> str:
    names = ("task", "ppl_test", "kl_mean")
    kernels = {one["step"]: one.get("kernel") or "" for one in report["memory"]}
    rows = [
        f"| {slug} | {' | '.join(_number(_value(arm, name), 4) for name in names)} | {kernels[f'evaluate/{slug}']} |"
        for slug, arm in report["arms"].items()
    ]
    head = f"| arm | {' | '.join(names)} | kernel |\n| --- | ---: | ---: | ---: | --- |\n"
    test = report["data"]["test"]
    return (
        head + "\n".join(rows) + f"\n\n{test['rows']} rows, {test['tokens']:,} tokens of test. A CPU's: quickstart.md."
    )


def _failures(*reports: dict[str, Any]) -> str:
    lines = [f"- `{one['step']}`: {one['problem']['what']}" for report in reports for one in report["failures"]]
    return "\n".join(lines) or "Nothing."


def _value(arm: dict[str, Any], metric: str) -> float | None:
    return (arm["metrics"].get(metric) or {}).get("value")


def _number(value: float | None, digits: int = 2) -> str:
    return "" if value is None else f"{value:,.{digits}f}"


def main() -> None:
    """Measure here and write the page, or write it from what was measured elsewhere."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, help="homes lie here and stay; default: a new one that goes")
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--set", action="append", default=[], help="more of the quickstart's recipe")
    parser.add_argument("--raw", type=Path, default=RAW, help="where what was measured is kept")
    parser.add_argument("--from-raw", action="store_true", help="measure nothing: the page of --raw")
    parser.add_argument("--out", type=Path, default=PAGE)
    args = parser.parse_args()
    if args.from_raw:
        raw = json.loads(args.raw.read_text(encoding="utf-8"))
    else:
        folder = args.folder or Path(tempfile.mkdtemp(prefix="quench-gpu-"))
        raw = measured(folder, layers=args.layers, extra=args.set, keep=args.raw)
        if args.folder is None:
            shutil.rmtree(folder)
    args.out.write_text(page(raw), encoding="utf-8")


if __name__ == "__main__":
    main()
