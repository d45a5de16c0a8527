"""The folders that an arm is loaded from, and how they are served."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from flows.results.read import Run, RunArm, RunStep
from recipes.models.chat_template import read_template
from recipes.models.headers import Headers, read_headers
from recipes.problem import Problem
from recipes.schemes.serve_file import ServedAdapter, describe

NOT_COPIED = ("events.jsonl", "serve.json", "serve.md")  # our log; serve files are written for the recipe's serve:


class Part(NamedTuple):
    """A folder that an export is made of.

    Attributes:
        name: `model` or `adapter`.
        source: Where its files are.
        under: The folder in the export; empty for its root.
        sha256: File -> digest, as its manifest says; empty for the base, which has none.
    """

    name: str
    source: Path
    under: str
    sha256: Mapping[str, str]


def parts_of(run: Run, arm: RunArm) -> Iterator[Part]:
    """The model's folder, then the adapter's where one is on top.

    Raises:
        RecipeError: The base is not there any more.
    """
    under = "base" if arm.adapter else ""
    model = run.step(arm.model)
    if model is not None:
        yield _of_step("model", model, under)
    elif run.base is not None:
        yield Part("model", run.base, under, {})
    else:
        raise Problem(
            what="The base model is not there any more.",
            where=str(run.raw["base"]["path"]),
            why=f"{arm.slug} is an adapter on top of it.",
            next="Put it back there.",
        ).error()
    if adapter := run.step(arm.adapter):
        yield _of_step("adapter", adapter, "adapter")


def _of_step(name: str, step: RunStep, under: str) -> Part:
    assert step.files is not None and step.manifest is not None  # _find has seen it
    files = {name: file["sha256"] for name, file in step.manifest["files"].items() if name not in NOT_COPIED}
    return Part(name, step.files, under, files)


def serve_record(run: Run, arm: RunArm, parts: list[Part]) -> dict[str, Any]:
    """serve.json for the recipe's serve: section."""
    serve = run.recipe.get("serve") or {}
    headers = bf16_headers(run, arm)
    if arm.adapter and (tokenizer := parts[1].source / "tokenizer").is_dir():
        headers = replace(headers, template=read_template(tokenizer))
    return describe(
        headers,
        name=arm.slug,
        scheme=arm.quantizer,
        tensor_parallel=serve.get("tensor_parallel", 1),
        max_model_len=serve.get("max_model_len"),
        adapter=ServedAdapter.read(parts[1].source, nf4=arm.kind == "nf4") if arm.adapter else None,
    )


def bf16_headers(run: Run, arm: RunArm) -> Headers:
    """Of the arm's model in bf16: what was quantized, or itself."""
    model = run.step(arm.model)
    if model is None or model.manifest is None or model.files is None:
        assert run.base is not None  # parts_of has seen it
        return read_headers(run.base)
    if arm.quantization is None:
        return read_headers(model.files)
    return read_headers(run.home / model.manifest["inputs"]["model"]["path"])
