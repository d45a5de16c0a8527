"""`python -m tests.bench.cards`: which model fits which card, by prediction; writes docs/results/cards.md.

Bases stand in as config.json and safetensors headers of the published shapes: weights are never read. The same figures
go into the comments of the two recipes that are a worked example of a card.
"""

from __future__ import annotations

import argparse
import functools
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from flows.plan.fit import Fitting, enough_tokens, fits, fitting, gpu_fits, leaving_free, on_card
from flows.plan.machine import Memory
from flows.plan.memory import StepNeeds, predict
from flows.plan.preflight import largest_parts
from recipes.models.headers import Headers, read_headers
from recipes.read.load import load
from recipes.schema import Recipe
from recipes.schemes.limits import limit_problems
from recipes.schemes.slugs import parse_scheme
from tasks.runtime.process.launch import CHECKOUT
from tests.bench.shapes import SHAPES, Shape, write_shape

PAGE = CHECKOUT / "docs" / "results" / "cards.md"
CARDS = (8, 12, 16, 24, 48, 80)  # GiB
MODELS = ("0.6B", "4B", "8B", "14B", "32B", "70B", "30B-A3B")
HOST = float("inf")  # is said beside, not compared
STEPS = {  # title -> keys of its steps
    "Train (NF4 QLoRA, rank 16)": ("train/",),
    "Evaluate in bf16 (base and merged models)": ("evaluate/base", "evaluate/merged-dequantized"),
    "Evaluate in 4 bits (NF4 with the adapter, GPTQ)": ("evaluate/nf4-adapter", "evaluate/gptq", "evaluate/ct-gptq"),
    "GPTQ, 4 bits, group 128": ("quantize/gptq", "quantize/ct-gptq"),
    "AWQ, 4 bits, group 128": ("quantize/awq", "quantize/ct-awq"),
}
NAMES = {
    "run.micro_batch": "micro",
    "train.gradient_checkpointing": "recompute",
    "evaluate.batch_size": "batch",
    "data.max_length": "rows of",
    "calibrate.rows": "calibrate",
    "calibrate.seq_len": "x",
}
EXAMPLES = {"llama-8b-24gb": ("Llama-8B", 24.0), "qwen3-moe-30b-80gb": ("30B-A3B", 80.0)}
BEGIN, END = "# ---- predicted\n", "# ---- end\n"


@dataclass(frozen=True, kw_only=True)
class Model:
    """A shape with its headers, and its predictions, which are asked for again and again."""

    shape: Shape
    headers: Headers
    recipe: Recipe
    steps: Callable[[Recipe], list[StepNeeds]]

    @classmethod
    def of(cls, shape: Shape, folder: Path, recipe: Recipe | None = None) -> Model:
        """With every row counted as long as data.max_length."""
        headers = read_headers(write_shape(folder, shape))

        @functools.cache
        def predicted(text: str) -> list[StepNeeds]:
            return predict(Recipe.model_validate_json(text), headers, device="cuda")

        return cls(
            shape=shape,
            headers=headers,
            recipe=recipe or recipe_of(shape),
            steps=lambda recipe: predicted(recipe.model_dump_json()),
        )


def recipe_of(shape: Shape) -> Recipe:
    """Defaults, on rows of 2,048 tokens; a mixture's schemes are those of llm-compressor."""
    family = "ct-" if shape.experts else ""
    train = {"accept_unquantized": True, "targets": ["q_proj", "k_proj", "v_proj", "o_proj"]} if shape.experts else {}
    return Recipe.model_validate(
        {
            "name": "card",
            "model": {"base": shape.model},
            "data": {"path": "rows.jsonl", "max_length": 2048},
            "train": train,
            "calibrate": {"rows": 512, "seq_len": 512},
            "quantize": {"schemes": [f"{family}gptq-w4-g128", f"{family}awq-w4-g128"]},
            "measure": {"enabled": False},
        }
    )


def cell(model: Model, keys: Sequence[str], gib: float) -> str:
    """`fits: 11.2`, `micro 4: 20.3`, or what is in the way; GiB of the card with these settings."""
    memory = leaving_free(Memory(HOST, float(gib)))

    def steps(recipe: Recipe) -> list[StepNeeds]:
        return [step for step in model.steps(recipe) if step.key.startswith(keys)]

    if refusals(model, keys):
        return "refused"
    stage = keys[0].partition("/")[0]
    fit = fitting(
        stage,
        model.recipe,
        memory=memory,
        steps=steps,
        allows=lambda smaller: enough_tokens(smaller, model.headers, None),
    )
    if fit.never or fit.setting is None:
        return _in_the_way(steps(fit.smallest.applied(model.recipe)), fit, memory)
    needed = max(map(on_card, steps(fit.setting.applied(model.recipe))))
    return f"{_words(fit.setting.values) or 'fits'}: {needed:.1f}"


def refusals(model: Model, keys: Sequence[str]) -> list[str]:
    """What `quench check` says against the schemes of these steps."""
    slugs = [
        step.key.partition("/")[2]
        for step in model.steps(model.recipe)
        if step.stage == "quantize" and step.key.startswith(tuple(keys))
    ]
    problems = [
        problem
        for scheme in map(parse_scheme, slugs)
        for problem in (*scheme.check(model.headers.linears), *limit_problems(scheme, model.headers))
    ]
    return [f"{problem.what} {problem.why}" for problem in problems]


def _in_the_way(steps: Sequence[StepNeeds], fit: Fitting, memory: Memory) -> str:
    worst = max((step for step in steps if step.key in fit.never), key=on_card)
    return f"no: {largest_parts(worst, on_gpu=not gpu_fits(worst, memory)).split(', ')[0]}"


def _words(values: dict[str, object]) -> str:
    shown = {name: value for name, value in values.items() if not (name == "calibrate.seq_len" and value == 512)}
    return ", ".join(NAMES[name] if value is True else f"{NAMES[name]} {value}" for name, value in shown.items())


def table(models: dict[str, Model], keys: Sequence[str]) -> str:
    """One row a model, one column a card, and what the host needs."""
    head = [f"| model | {' | '.join(f'{gib} GiB' for gib in CARDS)} | host |", f"| --- |{' --- |' * len(CARDS)} ---: |"]
    rows = []
    for name, model in models.items():
        host = max(step.needed_gib for step in model.steps(model.recipe) if step.key.startswith(tuple(keys)))
        cells = " | ".join(cell(model, tuple(keys), gib) for gib in CARDS)
        rows.append(f"| {name} | {cells} | {host:.0f} GiB |")
    notes = [f"\n{name}: {text}" for name, model in models.items() for text in refusals(model, keys)]
    return "\n".join([*head, *rows, *notes])


def example(name: str, model: Model, gib: float) -> str:
    """The comment of a recipe: what each kind of step takes of its card."""
    steps = model.steps(model.recipe)
    kinds = {
        "train": ("train/",),
        "merge, each": ("merge/",),
        "reference": ("reference/",),
        **{step.key.replace("/", " "): (step.key,) for step in steps if step.stage == "quantize"},
        "evaluate in bf16": ("evaluate/base", "evaluate/merged"),
        "evaluate in NF4": ("evaluate/nf4-adapter",),
        "evaluate in 4 bits": tuple(f"evaluate/{entry}" for entry in model.recipe.quantize.schemes),
    }
    lines = [
        f"# Predicted by `python -m tests.bench.cards`, every row as long as {model.recipe.data.max_length:,} tokens,",
        "# GiB at the peak (~ by a formula that no GPU has confirmed):",
        "#",
        f"#   {'step':<24}{f'GPU of {gib:g}':>10}{'host':>8}{'disk':>8}",
    ]
    for kind, keys in kinds.items():
        of_kind = [step for step in steps if step.key.startswith(keys)]
        mark = "" if all(step.confirmed for step in of_kind) else "~"
        gpu = max(map(on_card, of_kind))
        host, disk = max(step.needed_gib for step in of_kind), max(step.disk_gib for step in of_kind)
        lines.append(f"#   {kind:<24}{f'{mark}{gpu:.1f}' if gpu else '-':>10}{host:>8.1f}{disk:>8.1f}")
    total = sum(step.disk_gib for step in steps)
    card = leaving_free(Memory(HOST, gib))
    verdict = "Every step fits" if all(fits(step, card) for step in steps) else "NOT every step fits"
    lines += [
        "#",
        f"# {verdict}; the steps leave {total:.0f} GiB on disk. How long it takes is unknown: nobody has run it",
        "# on such a card, and Quench guesses no seconds.",
    ]
    return "\n".join(lines) + "\n"


def page(models: dict[str, Model], examples: dict[str, str]) -> str:
    """docs/results/cards.md."""
    sections = "\n\n".join(f"## {title}\n\n{table(models, keys)}" for title, keys in STEPS.items())
    sizes = ", ".join(f"{name} {model.headers.parameters / 1e9:.2f}" for name, model in models.items())
    worked = "\n\n".join(f"### recipes/{name}.yaml\n\n```\n{text}```" for name, text in examples.items())
    return f"""<!-- Written by `python -m tests.bench.cards`. -->
# Which model on which card, by prediction

Arithmetic of flows/plan on the headers of published shapes, the same that `quench plan RECIPE --gpu-gib N` does. **No
run on such cards has confirmed it**: training and evaluation were held against one H200, at four layers of an 8B
([docs/gpu.md](../gpu.md)); quantizers against their sources. Billions of parameters: {sizes}.

Every row counts as 2,048 tokens, with batches of 16, calibration of 512 rows of up to 512 tokens; most rows are
shorter, and then more fits. 5 % of a card are left free, and 0.6 GiB are CUDA's own. A cell has the GiB of the card,
behind the setting that makes it fit: `micro` is run.micro_batch, `recompute` is train.gradient_checkpointing, `batch`
is evaluate.batch_size, `rows of` is data.max_length, `calibrate` is calibrate.rows (`x` calibrate.seq_len). Settings
that keep the result are tried first, shorter rows last. The last column is what the host needs beside, without files
that it can drop. The mixture, 30B-A3B, is trained on its attention and quantized by llm-compressor
(`ct-gptq-w4-g128`); training keeps its experts in bf16.

{sections}

## Two recipes as worked examples

{worked}
"""


def main() -> None:
    """Predict, write the page and the comments of the recipes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=PAGE)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        models = {name: Model.of(SHAPES[name], Path(folder, name)) for name in MODELS}
        examples: dict[str, str] = {}
        for name, (shape, gib) in EXAMPLES.items():
            file = CHECKOUT / "recipes" / f"{name}.yaml"
            model = Model.of(SHAPES[shape], Path(folder, f"example-{shape}"), load(file).recipe)
            examples[name] = example(name, model, gib)
            before, rest = file.read_text(encoding="utf-8").split(BEGIN)
            file.write_text(f"{before}{BEGIN}{examples[name]}{END}{rest.split(END)[1]}", encoding="utf-8")
        text = page(models, examples)
    given.out.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
