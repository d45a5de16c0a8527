"""The steps that `make models` puts one tiny base through: the job bodies of a run, on its own recipe, in this process.

Each step is a function of `Bench` that returns its figures. What it raises is what the page shows. torch is imported
here; tests/bench/models.py forks a process for each group of steps after that.
"""

from __future__ import annotations

import importlib
import json
import random
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
import transformers
import yaml

from recipes.checks.check import check
from recipes.models.headers import read_headers
from recipes.problem import Problem, RecipeError
from recipes.read.load import Loaded, load
from recipes.schemes.slugs import parse_scheme
from tasks import calibrate, evaluate, merge, prepare, quantize, reference, reload, train
from tasks.jobs.quantize import _checked
from tasks.runtime.process.environments import environment_problem, interpreter
from tasks.runtime.process.errors import StageError
from tasks.runtime.process.launch import CHECKOUT, child_env
from tasks.runtime.step import External, Step
from tests.bench.architectures import write_architecture
from tests.bench.model_figures import bf16_share, cost, jittered, rounded
from tests.bench.models_page import SCHEMES, SEED
from tests.jobs.build import make_job

ROWS = 64  # of which some 46 train, and 9 each are dev and test
# Answers to what check may ask for by the name of the field.
ANSWERS = {
    "train.accept_unquantized": "true",
    "train.attention": "eager",
    "quantize.accept_unquantized": "true",
}
WORDS = "amber basil cedar delta ember fjord grape hazel ivory jolly kayak lemon mango noble ocean pearl quart river"
# KL of the merged model to base + adapter, in nats: at most 2e-4, or ten times what another rounding of every weight to
# bf16 costs the merged model. A plain decoder has 3e-6 to 2e-5; base + adapter rounds some five times a layer where the
# merged one rounds once, and a token on the border of two experts changes sides. Onto the original weights it is 3e-3.
MERGE_BOUND, ROUNDINGS = 2e-4, 10.0
# A quantizer's KL may be twice that of plain rounding of the same weights (1.4 times the error of the outputs): grids
# differ. A wrong name, order or a layer left out gives ten times it and more.
ROUNDING = 2.0
LEFT = 0.05  # share of the linear weights that may stay bf16 without a word
PROCESSOR = ("preprocessor_config.json", "processor_config.json")


class Fault(Exception):
    """A step ended well, and what it made is not right."""


@dataclass(frozen=True)
class Bench:
    """One architecture in its work folder."""

    folder: Path
    name: str

    @property
    def results(self) -> dict[str, Any]:
        """What is known of its steps."""
        return json.loads((self.folder / "result.json").read_text(encoding="utf-8"))

    @property
    def base(self) -> Path:
        """The base."""
        return self.folder / "base"

    @property
    def recipe_file(self) -> Path:
        """Its recipe."""
        return self.folder / "recipe.yaml"

    @property
    def model(self) -> Path:
        """What is quantized: the merged model, or the base where there is none."""
        merged = self.folder / "merge"
        return merged if (merged / "config.json").exists() and not self.broken("merge") else self.base

    def broken(self, step: str) -> bool:
        """The step was tried and did not end well."""
        return self.results["steps"].get(step, {}).get("state", "works") != "works"

    def loaded(self, *schemes: str, settings: Sequence[str] | None = None) -> Loaded:
        """Its recipe with these schemes, and the settings that check asked for."""
        known: Sequence[str] = self.results["steps"].get("check", {}).get("settings", [])
        given = known if settings is None else settings
        return load(self.recipe_file, sets=[f"quantize.schemes=[{', '.join(schemes)}]", *given])

    def do(self, step: Step, out: str, **inputs: Path) -> dict[str, Any]:
        """Run a step's job body here; that of another environment in a child of its Python."""
        place = self.folder / out
        shutil.rmtree(place, ignore_errors=True)
        paths: dict[str, Any] = {**inputs}  # the other keywords of make_job have other types
        job = replace(make_job(step.stage, place, params=step.params, **paths), entry=step.entry, slug=step.slug)
        if step.environment is None:
            module, _, function = step.entry.partition(":")
            return getattr(importlib.import_module(module), function)(job)
        job.dump(self.folder / f"{out}.job.json")
        return _in_environment(step.environment, self.folder / f"{out}.job.json")


def _in_environment(name: str, job: Path) -> dict[str, Any]:
    """A job in the Python of another environment.

    Raises:
        StageError: As the job did.
        Fault: It ended in another way.
    """
    argv = [str(interpreter(name)), "-P", "-m", "tasks.runtime.process.child", "run", str(job)]
    (job.parent / "child").mkdir(exist_ok=True)
    own = job.parent / "child" / "job.json"
    shutil.copyfile(job, own)
    argv[-1] = str(own)
    answer = own.with_name("result.json")
    answer.unlink(missing_ok=True)
    done = subprocess.run(argv, cwd=CHECKOUT, env=child_env(threads=1), check=False)
    if not answer.exists():
        raise Fault(f"the process in {name} ended with exit code {done.returncode} and no answer")
    told = json.loads(answer.read_text(encoding="utf-8"))
    if told["ok"]:
        return told["result"]
    problem = Problem(**told["problem"])
    raise StageError(problem) if told["type"] == "StageError" else Fault(f"{problem.what} ({problem.where})")


def external(name: str, path: Path) -> External:
    """Something that is there already."""
    return External(name=name, path=path, digest=name, source=str(path))


# ---- the steps


def base(bench: Bench) -> dict[str, Any]:
    """Write the base, its rows and its recipe."""
    for name in ("base", "merge"):
        shutil.rmtree(bench.folder / name, ignore_errors=True)
    write_architecture(bench.base, bench.name)
    draw = random.Random(SEED)
    rows = [
        {
            "messages": [
                {"role": "user", "content": " ".join(draw.choices(WORDS.split(), k=6)) + " ?"},
                {"role": "assistant", "content": " ".join(draw.choices(WORDS.split(), k=5))},
            ]
        }
        for _ in range(ROWS)
    ]
    (bench.folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    recipe = {
        "name": "models",
        "model": {"base": "base"},
        "data": {"path": "rows.jsonl", "dev": 0.15, "test": 0.15, "max_length": 128},
        "train": {
            **{"rank": 8, "alpha": 16, "learning_rate": 5e-3, "schedule": "constant", "warmup_ratio": 0.0},
            **{"batch_size": 8, "max_steps": 4, "seed": SEED},
        },
        "calibrate": {"rows": 32, "allow_unusual_size": "a base of 128 features", "seq_len": 128},
        "quantize": {"schemes": list(SCHEMES.values())},
        "evaluate": {"max_new_tokens": 48, "batch_size": 8},
    }
    bench.recipe_file.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    config = json.loads((bench.base / "config.json").read_text(encoding="utf-8"))
    return {"class": config["architectures"][0], "model_type": config["model_type"]}


def verdicts(bench: Bench) -> dict[str, Any]:
    """What `quench check` says of this recipe, by step: of the recipe without schemes, and what each scheme adds.

    Where it asks for a setting by name, the recipe gets it from then on.
    """
    said: dict[str, list[dict[str, str]]] = {}
    settings = _asked_for(_problems(bench, [], settings=[]))
    said["train"] = _problems(bench, [], settings=settings)
    for step, slug in SCHEMES.items():
        asked = _asked_for(_problems(bench, [slug], settings=settings))
        settings += [setting for setting in asked if setting not in settings]
        problems = _problems(bench, [slug], settings=settings)
        said[step] = [problem for problem in problems if problem not in said["train"]]
    return {"said": said, "settings": settings}


def _problems(bench: Bench, schemes: Sequence[str], *, settings: Sequence[str]) -> list[dict[str, str]]:
    return [problem.as_dict() for problem in check(bench.loaded(*schemes, settings=settings))]


def _asked_for(problems: Sequence[Mapping[str, str]]) -> list[str]:
    """The settings that would answer these problems, by the field that they name."""
    text = " ".join(problem["where"] + " " + problem["next"] for problem in problems)
    return [f"{field}={value}" for field, value in ANSWERS.items() if f"{field}: {value}" in text]


def prepared(bench: Bench) -> dict[str, Any]:
    """Rows to a dataset, and its calibration set."""
    recipe = bench.loaded().recipe
    step = prepare.step(
        recipe, data=[external("data", bench.folder / "rows.jsonl")], tokenizer=external("tokenizer", bench.base)
    )
    bench.do(step, "dataset", data=bench.folder / "rows.jsonl", tokenizer=bench.base)
    widest = read_headers(bench.base).largest_in_features
    calibset = calibrate.step(recipe, dataset=step, largest_in_features=widest)
    made = bench.do(calibset, "calibset", dataset=bench.folder / "dataset")
    return {"calibration_tokens": made["tokens"]}


def trained(bench: Bench) -> dict[str, Any]:
    """NF4 QLoRA, four steps."""
    recipe, dataset = bench.loaded().recipe, bench.folder / "dataset"
    step = train.step(recipe, dataset=_dataset(recipe), base=external("base", bench.base))
    made = bench.do(step, "adapter", dataset=dataset, base=bench.base)
    return {"dev_loss": made["dev_loss"], "gradient_cosine": made["gradient_cosine"]}


def merged(bench: Bench) -> dict[str, Any]:
    """The adapter into the dequantized base; against base + adapter."""
    recipe, adapter = bench.loaded().recipe, bench.folder / "adapter"
    step = merge.step(
        recipe, base=external("base", bench.base), adapter=external("adapter", adapter), onto="dequantized"
    )
    made = bench.do(step, "merge", base=bench.base, adapter=adapter)
    dataset = _dataset(recipe)
    trained_step = train.step(recipe, dataset=dataset, base=external("base", bench.base))
    of_training = reference.step(recipe, dataset=dataset, base=external("base", bench.base), adapter=trained_step)
    bench.do(of_training, "reference-adapter", dataset=bench.folder / "dataset", base=bench.base, adapter=adapter)
    kl = _evaluated(bench, "merged", kind="bf16", model=bench.folder / "merge", reference="reference-adapter")
    untrained = _evaluated(bench, "base", kind="nf4", model=bench.base, reference="reference-adapter")
    noise = cost(bench.folder / "dataset", bench.folder / "merge", jittered)
    bound = max(MERGE_BOUND, ROUNDINGS * noise)
    if kl > bound:
        raise Fault(f"the merged model's KL to base + adapter is {kl:.2g}; another rounding to bf16 costs {noise:.2g}")
    if untrained < 5 * bound:  # without the adapter the bound has to be broken several times over
        raise Fault(f"the adapter does too little for its merge to be seen: KL {untrained:.2g}")
    figures = {"kl": kl, "bf16_rounding_kl": noise, "kl_without_adapter": untrained}
    return {"by": made["by"], "record": made["record"], **figures}


def baseline(bench: Bench) -> dict[str, Any]:
    """The reference of every scheme, and what plain rounding of the same weights costs."""
    recipe = bench.loaded().recipe
    step = reference.external(recipe, dataset=_dataset(recipe), model=external("whole", bench.model))
    bench.do(step, "reference-model", dataset=bench.folder / "dataset", model=bench.model)
    return {"quantized": bench.model.name, "rounding_kl": cost(bench.folder / "dataset", bench.model, rounded)}


def scheme(step_name: str) -> Callable[[Bench], dict[str, Any]]:
    """Quantize by a scheme, load what it wrote and evaluate it."""

    def run(bench: Bench) -> dict[str, Any]:
        slug, known = SCHEMES[step_name], bench.results["steps"]
        step = quantize.alone(slug, parse_scheme(slug), inputs={})
        if problem := environment_problem(step.environment):
            return {"not_here": f"{problem.what} {problem.next}"}
        said, settings = known["check"]["said"][step_name], known["check"]["settings"]
        if said and step.environment:  # the job refuses first; its process in the other environment takes 15 s
            _checked(bench.model, parse_scheme(slug))
        inputs = {"model": bench.model}
        if parse_scheme(slug).needs_calibration:
            inputs["calibset"] = bench.folder / "calibset"
        made = bench.do(step, step_name, **inputs)
        left = bf16_share(bench.model, bench.folder / step_name)
        kl = _evaluated(
            bench, slug, kind="quantized", model=bench.folder / step_name, reference="reference-model", tools=step.tools
        )
        bound = ROUNDING * known["baseline"]["rounding_kl"]
        if kl > bound:
            raise Fault(f"KL to the model before is {kl:.2g}; plain rounding costs {bound / ROUNDING:.2g}")
        if left > LEFT and not any(setting.startswith("quantize.accept_unquantized") for setting in settings):
            raise Fault(f"{left:.0%} of the linear weights are still bf16 in what it wrote, and check says nothing")
        return {"kl": kl, "layers": made["layers"], "kernel": made["kernel"], "left_in_bf16": left}

    return run


def exported(bench: Bench) -> dict[str, Any]:
    """A copy of the merged model gives the same logits; every model loads in the base's own class, with its files."""
    copy = bench.folder / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(bench.model, copy, ignore=shutil.ignore_patterns("events.jsonl"))
    step = reload.step("merged", kind="bf16", inputs={})
    bench.do(step, "reload", model=bench.model, copy=copy)
    config = json.loads((bench.base / "config.json").read_text(encoding="utf-8"))
    own = getattr(transformers, config["architectures"][0])
    _, info = own.from_pretrained(copy, dtype=torch.bfloat16, output_loading_info=True)
    if gaps := {name: sorted(names)[:3] for name, names in info.items() if names and name != "error_msgs"}:
        raise Fault(f"the merged model does not load whole in {own.__name__}: {gaps}")
    made = [name for name in SCHEMES if (bench.folder / name / "config.json").exists() and not bench.broken(name)]
    wrong: list[str] = []
    for name in (bench.model.name, *made):
        wrong += _unlike_base(bench.folder / name, bench.base, config["architectures"])
    if wrong:
        raise Fault("; ".join(wrong))
    return {"of": bench.model.name, "own_class": own.__name__, "compared": len(made) + 1}


def _unlike_base(folder: Path, base: Path, classes: list[str]) -> list[str]:
    """How a made folder differs from the base in class and in its processor's files."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    wrong: list[str] = []
    if config.get("architectures") != classes:
        wrong.append(f"{folder.name}: config.json says {config.get('architectures')}, the base {classes}")
    lost = [
        name
        for name in PROCESSOR
        if (base / name).exists()
        and (not (folder / name).exists() or (folder / name).read_bytes() != (base / name).read_bytes())
    ]
    return [*wrong, f"{folder.name}: without {' and '.join(lost)}"] if lost else wrong


STEPS: dict[str, Callable[[Bench], dict[str, Any]]] = {
    "base": base,
    "check": verdicts,
    "prepare": prepared,
    "train": trained,
    "merge": merged,
    "baseline": baseline,
    **{name: scheme(name) for name in SCHEMES},
    "export": exported,
}
NEEDS = {
    "check": ("base",),
    "prepare": ("base",),
    "train": ("prepare",),
    "merge": ("train",),
    "baseline": ("prepare",),
    **dict.fromkeys(SCHEMES, ("baseline", "check")),
    "export": ("prepare",),
}


# ---- figures


def _dataset(recipe: Any) -> Step:
    return prepare.step(recipe, data=[external("data", Path("x"))], tokenizer=external("tokenizer", Path("x")))


def _evaluated(bench: Bench, arm: str, *, kind: str, model: Path, reference: str, tools: tuple[str, ...] = ()) -> float:
    """Evaluate an arm; its mean KL over the completion tokens of dev and test, in nats.

    Raises:
        Fault: A loss is not a number.
    """
    recipe = bench.loaded().recipe
    step = evaluate.step(recipe, arm, kind=kind, inputs={"model": external("base", model)})
    inputs = {"model": model, "dataset": bench.folder / "dataset", "reference": bench.folder / reference}
    out = f"scores-{arm}"
    bench.do(step, out, **inputs)
    lines = pq.read_table(bench.folder / out / "scores.parquet").to_pylist()
    means: dict[str, float] = {}
    for metric in ("nll", "kl"):
        own = [line for line in lines if line["metric"] == metric]
        means[metric] = sum(line["sum"] for line in own) / max(1, sum(line["n"] for line in own))
    if not 0 < means["nll"] < float("inf"):
        raise Fault(f"the loss of {arm} is {means['nll']}")
    return means["kl"]


def refusal(error: RecipeError | StageError) -> dict[str, Any]:
    """The four parts of the first problem."""
    problem = error.problems[0] if isinstance(error, RecipeError) else error.problem
    return problem.as_dict()
