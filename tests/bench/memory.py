"""`python -m tests.bench.memory`: what the 70B recipe needs, by prediction; writes docs/results/memory-70b.md.

The base stands in as config.json and safetensors headers of the published shapes: weights are never read.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

from flows.plan.memory import CUDA_CONTEXT, StepNeeds, predict
from recipes.models.headers import Headers, read_headers
from recipes.read.load import load
from recipes.schema import Recipe
from tasks.runtime.process.launch import CHECKOUT
from tests.recipes.folders import llama_shapes, write_base, write_safetensors

RECIPE = CHECKOUT / "recipes" / "llama-70b-8gpu.yaml"
PAGE = CHECKOUT / "docs" / "results" / "memory-70b.md"
PROCESSES = (1, 2, 4, 8)
CARDS = (24, 48, 80, 141, 180, 288)  # GB as sold; a GiB is 7 % more
SHAPE = {"hidden": 8192, "intermediate": 28672, "kv": 1024, "layers": 80, "vocabulary": 128256}  # Llama 3.1 and 3.3 70B
HEADS = {"num_attention_heads": 64, "num_key_value_heads": 8, "max_position_embeddings": 131072}
SHAPE_8B = {"hidden": 4096, "intermediate": 14336, "kv": 1024, "layers": 32, "vocabulary": 128256}
DEFAULTS = ("quantize.schemes=[awq-w4-g128, gptq-w4-g128]", "evaluate.reference_gib=4")


def headers(folder: Path, shape: dict[str, int] = SHAPE) -> Headers:
    """Of a Llama 3, output layer untied; the 70B has 70.55 billion parameters."""
    write_base(folder, **shape, config=HEADS)
    shapes = llama_shapes(**shape)
    output = {"lm_head.weight": [shape["vocabulary"], shape["hidden"]]}
    write_safetensors(folder / "model.safetensors", {**shapes, **output})
    return read_headers(folder)


def with_processes(recipe: Recipe, processes: int) -> Recipe:
    """The recipe on as many GPUs."""
    return recipe.model_copy(update={"run": recipe.run.model_copy(update={"processes": processes})})


def training(recipe: Recipe, base: Headers) -> dict[int, StepNeeds]:
    """The train step by number of processes."""
    return {
        count: next(one for one in predict(with_processes(recipe, count), base, device="cuda") if one.stage == "train")
        for count in PROCESSES
    }


def needed(step: StepNeeds) -> float:
    """GiB of one GPU, with what no allocator counts: what preflight compares with free memory."""
    return step.gpu_gib + CUDA_CONTEXT


def card(gib: float) -> str:
    """The smallest of the usual cards that holds it."""
    return next((f"{size} GB" for size in CARDS if size * 1e9 / 2**30 >= gib), "none of these")


def page(recipe: Recipe, base: Headers, small: Headers) -> str:
    """docs/results/memory-70b.md."""
    by_count = training(recipe, base)
    names = list(dict.fromkeys(name for one in by_count.values() for name in one.parts if name != "file of weights"))
    parts = "\n".join(
        f"| {name} | {' | '.join(f'{one.parts.get(name, 0):.2f}' for one in by_count.values())} |" for name in names
    )
    total = " | ".join(f"**{needed(one):.1f}**" for one in by_count.values())
    cards = " | ".join(card(needed(one)) for one in by_count.values())
    run = [one for one in predict(load(RECIPE, sets=DEFAULTS).recipe, small, device="cuda") if one.disk_gib > 0.1]
    disk = ", ".join(f"{one.stage} {one.disk_gib:.1f}" for one in run)
    awq = _awq(recipe, base)
    steps = "\n".join(_row(one) for one in _largest(predict(recipe, base, device="cuda")))
    return f"""<!-- Written by `python -m tests.bench.memory`. -->
# A 70B, by prediction

`recipes/{RECIPE.name}`, every row counted as {recipe.data.max_length} tokens, one row per forward pass, on the
headers of a Llama 3 70B ({base.parameters / 1e9:.2f} billion parameters). Arithmetic of flows/plan/memory.py, held
against measured peaks on a CPU, and of single steps on one GPU at four layers of an 8B
([docs/gpu.md](../gpu.md)): **no 70B and no FSDP run has confirmed it**. `quench run` does the same sum in preflight
and refuses what does not fit.

## Training, GiB per GPU

| processes | {" | ".join(map(str, by_count))} |
| --- | {" | ".join(["---:"] * len(by_count))} |
{parts}
| needed | {total} |
| smallest card | {cards} |

`weights nf4` is its share of the base, `gathered` what FSDP gives every GPU whole beside it: embeddings and output
layer during a step (bf16), two decoder layers for a moment. `process` is what the driver and CUDA take.

## The other steps, one GPU each

The largest of each stage.

| step | GiB of GPU | smallest card | GiB of disk |
| --- | ---: | --- | ---: |
{steps}

The merge is a stream. Quantizers bring one decoder layer at a time to the GPU: AWQ in `quantize.schemes` would need
{needed(awq):.0f} GiB there and {awq.needed_gib:.0f} GiB of the host. No step but training is cut over GPUs yet: bf16
arms of a 70B need a card that holds the whole model, or `run.device: cpu` and patience.

## What a run of an 8B leaves in the store

With AWQ and GPTQ, 4 GiB of reference, adapters of rank 64: {sum(one.disk_gib for one in run):.1f} GiB ({disk}).
"""


def _largest(steps: Sequence[StepNeeds]) -> list[StepNeeds]:
    """Of each stage but train, the step that needs the GPU most; and what the trained model itself needs."""
    found: dict[str, StepNeeds] = {}
    for one in steps:
        if one.stage != "train" and one.gpu_gib and (one.stage not in found or needed(one) > needed(found[one.stage])):
            found[one.stage] = one
    nf4 = next(one for one in steps if one.key == "evaluate/nf4-adapter")
    return [*found.values(), nf4]


def _awq(recipe: Recipe, base: Headers) -> StepNeeds:
    asked = recipe.model_copy(update={"quantize": recipe.quantize.model_copy(update={"schemes": ["awq-w4-g128"]})})
    return next(one for one in predict(asked, base, device="cuda") if one.stage == "quantize")


def _row(one: StepNeeds) -> str:
    return f"| {one.key} | {needed(one):.1f} | {card(needed(one))} | {one.disk_gib:.1f} |"


def main() -> None:
    """Predict, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=PAGE)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        bases = headers(Path(folder, "70b")), headers(Path(folder, "8b"), SHAPE_8B)
        text = page(load(RECIPE).recipe, *bases)
    asked.out.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
