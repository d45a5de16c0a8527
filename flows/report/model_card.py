"""The model card of an export: README.md with the hub's front matter, figures with intervals, and the origin."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from flows.report.inert import in_lines, inert, one_line
from flows.report.served import seconds
from flows.report.tables import escaped
from flows.report.text import data_line, hardware_line
from flows.results.artifacts import parts_of, serve_record
from flows.results.metrics import METRICS, interval_text, value_text
from flows.results.read import Run, RunArm, RunStep, notes
from flows.results.served import arm_text
from flows.results.throughput import OUTPUT
from recipes.schemes.scheme import PER_CHANNEL
from recipes.schemes.serve_file import python_lines, shell

SHOWN = ("task", "ppl_test", "kl_mean", "kl_p99", "top1_agreement", "ppl_general", "size_bytes")
BESIDE = "nf4-adapter"  # the model as it was trained: what every arm is compared with
SHORT = 16  # hex digits of a digest that are shown


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """What an arm was made of.

    Attributes:
        arm: The arm.
        run: Its run.
        model: Manifest of its model; None where the base itself is loaded.
        adapter: Manifest of the adapter.
        calibration: Step of the calibration set, where one was read.
        steps: Steps whose notes are shown.
    """

    arm: RunArm
    run: Run
    model: Mapping[str, Any] | None
    adapter: Mapping[str, Any] | None
    calibration: RunStep | None
    steps: tuple[RunStep, ...]


def card(origin: Provenance, report: Mapping[str, Any], served: Mapping[str, Any]) -> str:
    """The whole README.md."""
    report, served = in_lines(report), in_lines(served)
    lines = ["---", yaml.safe_dump(_front(origin, report), sort_keys=False, allow_unicode=True).rstrip(), "---", ""]
    lines += [f"# {report['name']}: {origin.arm.slug}", "", _what(origin), ""]
    lines += ["## Figures", "", *_figures(origin, report), ""]
    lines += ["## How it was made", "", *_made(origin, report), ""]
    lines += ["## Serving", "", *_serving(served), *as_served(origin.arm.slug, report), ""]
    if remarks := [f"* {one_line(note.about)}: {one_line(note.text)}" for note in notes(origin.steps)]:
        lines += ["## What the tools did beside the plan", "", *remarks, ""]
    lines += ["Licence and terms of use are those of the base model and of the data.", ""]
    return inert("\n".join(lines))


def _front(origin: Provenance, report: Mapping[str, Any]) -> dict[str, Any]:
    """Metadata that a hub reads; https://huggingface.co/docs/hub/model-cards."""
    arm = origin.arm
    hub_id, _, commit = str(report["sources"]["base"]["source"]).partition("@")
    named = {"base_model": hub_id} if commit else {}  # a path of this machine is no id
    relation = "adapter" if arm.adapter else "quantized" if arm.quantization else "finetune"
    tags = ["quench", "qlora", *([f"{arm.parts.bits}-bit", arm.parts.method] if arm.quantization else [])]
    return {
        "library_name": "peft" if arm.adapter else "transformers",
        "pipeline_tag": "text-generation",
        **named,
        **({"base_model_relation": relation} if named else {}),
        "tags": tags,
    }


def _what(origin: Provenance) -> str:
    """One sentence: what is in the folder."""
    arm = origin.arm
    if arm.kind == "nf4":
        return "A LoRA adapter (adapter/) and its base model (base/), which is quantized to NF4 while it is loaded."
    if arm.adapter:
        return f"A base model quantized by {arm.scheme} (base/), and a LoRA adapter on top of it (adapter/)."
    if arm.quantization:
        return f"A fine-tuned model, merged into the {arm.merge_base} base weights and quantized: {_quantization(arm)}."
    return f"A fine-tuned model in bf16, merged into the {arm.merge_base} base weights."


def _quantization(arm: RunArm) -> str:
    params = arm.quantization or {}
    group = params["group_size"]
    grouped = "one scale an output" if group == PER_CHANNEL else f"groups of {group}"
    points = "symmetric" if params["symmetric"] else "with zero points"
    order = ", activation order" if params["desc_act"] else ""
    return f"{params['method'].upper()}, {params['bits']} bits, {grouped}, {points}{order}, {params['form']} format"


def _figures(origin: Provenance, report: Mapping[str, Any]) -> Iterator[str]:
    own = report["arms"][origin.arm.slug]["metrics"]
    other = report["arms"].get(BESIDE, {}).get("metrics", {})
    yield f"{data_line(report)}. 95 % intervals in brackets; n counts tokens, or rows for task."
    yield "Beside it the model as it was trained: the adapter on NF4 weights."
    yield ""
    yield "| metric | this model | n | as trained | what it says |"
    yield "| --- | ---: | ---: | ---: | --- |"
    for name in SHOWN:
        cell, metric = own[name], METRICS[name]
        beside = _cell(name, other[name]) if name in other else "-"
        count = f"{cell['n']:,}" if cell["n"] else "-"
        yield f"| {metric.label} | {_cell(name, cell)} | {count} | {beside} | {escaped(report['meanings'][name])} |"
    if why := report["not_ranked"].get(origin.arm.slug):
        yield f"\nNot ranked among the arms of its run: {why}."
    if origin.arm.is_control:
        yield "\nA control: made to be compared with, not to be shipped."
    if refused := report["arms"][origin.arm.slug]["refused"]:
        yield f"\nNot served by the engine that the recipe names: {refused}"


def _cell(name: str, cell: Mapping[str, Any]) -> str:
    if cell["value"] is None:
        return f"- ({cell['reason']})"
    interval = interval_text(name, cell["value"], cell["ci95"])
    return f"{value_text(name, cell['value'], cell['ci95'])} {interval}".rstrip()


def _made(origin: Provenance, report: Mapping[str, Any]) -> Iterator[str]:
    yield "| | |"
    yield "| --- | --- |"
    for name, text in _rows(origin, report):
        yield f"| {name} | {escaped(text)} |"
    yield ""
    yield "recipe.yaml is the recipe of the run, overrides included: with base and data in place `quench run` makes"
    yield "the same again."


def _rows(origin: Provenance, report: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    arm, model, adapter = origin.arm, origin.model, origin.adapter
    for name, source in report["sources"].items():
        yield name, f"{_source(source['source'])}, sha256 {source['digest'][:SHORT]}"
    if adapter:
        yield "training", f"{_training(adapter['identity']['params'])}; adapter {adapter['digest'][:SHORT]}"
    if arm.merge_base and not arm.on_base:
        yield "merge", f"into the {arm.merge_base} base weights"
    if origin.calibration and origin.calibration.manifest:
        yield "calibration", _calibration(origin.calibration.manifest, model or {})
    if model and arm.quantization:
        yield "quantized by", f"{model['result']['backend']}; {_quantization(arm)}"
    if model:
        yield "artifact", f"{model['digest'][:SHORT]}, fingerprint {model['fingerprint'][:12]}"
    yield "run", str(report["id"])
    yield "versions", ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    yield "machine", hardware_line(report["hardware"])


def _source(source: str) -> str:
    """A hub id with its commit; of a path on the machine of the run only the last part."""
    return source if "@" in source else source.rstrip("/").rpartition("/")[2]


def _training(params: Mapping[str, Any]) -> str:
    length = "max_steps" if params.get("max_steps") else "epochs"
    settings = [
        f"{name} {params[name]}" for name in ("rank", "alpha", "learning_rate", "batch_size", length) if name in params
    ]
    return ", ".join(["NF4 QLoRA", *settings])


def _calibration(manifest: Mapping[str, Any], model: Mapping[str, Any]) -> str:
    params = manifest["identity"]["params"]
    rows = (
        f"{params['rows']} rows of the training domain" if "rows" in params else f"the control set `{params['kind']}`"
    )
    result = model.get("result", {})
    packed = f" in {result['sequences']} sequences, {result['tokens']:,} tokens" if "sequences" in result else ""
    return f"{rows}{packed}; set {manifest['digest'][:SHORT]}"


def _serving(served: Mapping[str, Any]) -> Iterator[str]:
    yield "serve.md explains each option."
    yield ""
    vllm = served["vllm"]
    if vllm["command"]:
        yield from ["```", shell(vllm["command"]), "```"]
    else:
        yield from (f"{problem['what']} {problem['why']}" for problem in vllm["refused"])
    yield from ["", *python_lines(served)]


def as_served(slug: str, report: Mapping[str, Any]) -> Iterator[str]:
    """What a real engine made of these files, where the run served them."""
    told = report.get("served")
    arm = told["arms"].get(slug) if told else None
    if arm is None:
        return
    yield ""
    yield f"Served by {arm['engine']} {arm['version']} on {hardware_line(report['hardware'])}: {arm_text(slug, arm)}"
    yield ""
    for load in arm["loads"]:
        rate, first = value_text(OUTPUT, load[OUTPUT]["value"]), seconds(load["ttft_s"]["median"])
        yield f"* {load['requests']} at once: {rate} output tokens a second, first token after {first} s (median)"


def card_of(run: Run, arm: RunArm, report: Mapping[str, Any]) -> str:
    """The model card of an arm, from the store."""
    return card(provenance_of(run, arm), report, serve_record(run, arm, list(parts_of(run, arm))))


def provenance_of(run: Run, arm: RunArm) -> Provenance:
    """What the store says an arm was made of."""
    model, adapter = run.step(arm.model), run.step(arm.adapter) or _only(run, "train")
    return Provenance(
        arm=arm,
        run=run,
        model=model.manifest if model else None,
        adapter=adapter.manifest if adapter else None,
        calibration=_calibration_step(run, model),
        steps=tuple(step for step in (adapter, model) if step is not None),
    )


def _calibration_step(run: Run, model: RunStep | None) -> RunStep | None:
    """The calibration set that the model was quantized on."""
    read = (model.manifest or {}).get("inputs", {}).get("calibset") if model else None
    return next((step for step in run.steps.values() if read and step.fingerprint == read["fingerprint"]), None)


def _only(run: Run, stage: str) -> RunStep | None:
    return next((step for step in run.steps.values() if step.stage == stage and step.ok), None)
