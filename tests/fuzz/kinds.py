"""The kinds of input: how one is made from its number, which command reads it, and how it is made small."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open

from flows.plan.machine import Memory
from flows.plan.preflight import judge, sampled
from recipes.checks.external import external_headers
from recipes.models.adapters import read_adapter
from recipes.models.headers import read_headers
from recipes.read.load import load
from tests.fuzz import models, recipes, rows
from tests.fuzz.odd import fewer_lines, fewer_values

SMALL = {"cpu": Memory(host_gib=1.0, gpu_gib=None), "cuda": Memory(host_gib=8.0, gpu_gib=1.0, gpus=2)}


@dataclass(frozen=True, kw_only=True)
class Kind:
    """One kind of input.

    Attributes:
        name: As `--only` takes it.
        cases: In `make fuzz`.
        quick: Of them in `make test`.
        place: Fills a folder with what stays the same.
        make: Content of the file by its number.
        write: Puts a content into the folder.
        argv: Words behind `quench`, by folder and number.
        then: What is called after exit code 0, if anything, with folder and number.
        smaller: Contents with something left out.
    """

    name: str
    cases: int
    quick: int
    place: Callable[[Path], None]
    make: Callable[[int], bytes]
    write: Callable[[Path, int, bytes], None]
    argv: Callable[[Path, int], list[str]]
    then: Callable[[Path, int], None] | None = None
    smaller: Callable[[bytes], Iterator[bytes]] = fewer_lines


def _recipe(folder: Path, number: int, content: bytes) -> None:
    (folder / "recipe.yaml").write_bytes(content)


def _planned(recipe: Path) -> None:
    """The memory prediction of `quench plan`, on a machine where hardly anything fits: it looks for settings."""
    loaded = load(recipe)
    base = loaded.base
    assert base is not None
    headers = read_headers(base)
    others = {name: external_headers(folder) for name, folder in loaded.externals.items() if folder}
    rows = sampled(loaded, headers)
    for device, memory in SMALL.items():
        judge(loaded.recipe, headers, memory=memory, device=device, rows=rows, externals=others, slots=2)


def _rows(folder: Path, number: int, content: bytes) -> None:
    for file in folder.glob("rows*"):
        file.unlink()
    (folder / rows.name(number)).write_bytes(content)
    (folder / "recipe.yaml").write_text(rows.recipe(number), encoding="utf-8")


def _config(folder: Path, number: int, content: bytes) -> None:
    for name in ("base", "other"):
        good = models.BASE / "config.json"
        models.put(folder / name / "config.json", content if name == models.config_name(number) else good.read_bytes())


def _tokenizer(folder: Path, number: int, content: bytes) -> None:
    for name in {*models.TOKENIZERS}:
        models.put(folder / "base" / name, (models.BASE / name).read_bytes())
    models.put(folder / "base" / models.tokenizer_name(number), content)


def _adapter(folder: Path, number: int, content: bytes) -> None:
    for name in ("config.json", "nf4.json"):
        (folder / "adapter" / name).unlink(missing_ok=True)
    models.put(folder / "adapter" / "adapter_config.json", models.as_json(models.adapter_tree()))
    models.put(folder / "adapter" / models.adapter_name(number), content)


def _weights(folder: Path, number: int, content: bytes) -> None:
    for name in ("base", "other"):
        good = folder / name / "model.safetensors"
        good.unlink()
        good.symlink_to(models.BASE / "model.safetensors")
    models.write_weights(folder / "adapter" / "adapter_model.safetensors", 0, models.packed(models.adapter_header()))
    models.write_weights(_weight_file(folder, number), number, content)


def _weight_file(folder: Path, number: int) -> Path:
    name = models.weights_name(number)
    return folder / name / ("adapter_model.safetensors" if name == "adapter" else "model.safetensors")


def _check_of(which: Callable[[int], str]) -> Callable[[Path, int], list[str]]:
    return lambda folder, number: [
        *("check", str(folder / f"{which(number)}.yaml")),
        *(["--json"] if number % 2 else []),
    ]


_check = _check_of(lambda number: "recipe")


def _plan_of(which: Callable[[int], str]) -> Callable[[Path, int], None]:
    def plan(folder: Path, number: int) -> None:
        if which(number) == "adapter":
            read_adapter(folder / "adapter")  # as `quench merge` does
        _planned(folder / f"{which(number)}.yaml")

    return plan


def _weights_open(folder: Path, number: int) -> None:
    """What `check` passes opens in the library that every later step reads with."""
    with safe_open(_weight_file(folder, number), "np") as file:
        file.keys()
    _plan_of(models.weights_name)(folder, number)


KINDS = {
    kind.name: kind
    for kind in (
        Kind(
            name="recipes",
            cases=10_000,
            quick=300,
            place=recipes.place,
            make=recipes.recipe,
            write=_recipe,
            argv=_check,
            then=lambda folder, number: _planned(folder / "recipe.yaml") if number % 10 == 0 else None,
        ),
        Kind(
            name="rows",
            cases=1_000,
            quick=20,
            place=rows.place,
            make=rows.rows,
            write=_rows,
            argv=lambda folder, number: [*_check(folder, number), "--data"],
        ),
        Kind(
            name="config.json",
            cases=1_000,
            quick=20,
            place=models.place,
            make=models.config,
            write=_config,
            argv=_check_of(models.config_name),
            then=_plan_of(models.config_name),
            smaller=fewer_values,
        ),
        Kind(
            name="tokenizers",
            cases=1_000,
            quick=20,
            place=models.place,
            make=models.tokenizer,
            write=_tokenizer,
            argv=_check_of(lambda number: "base"),
            then=_plan_of(lambda number: "base"),
            smaller=fewer_values,
        ),
        Kind(
            name="adapters",
            cases=1_000,
            quick=20,
            place=models.place,
            make=models.adapter,
            write=_adapter,
            argv=_check_of(lambda number: "adapter"),
            then=_plan_of(lambda number: "adapter"),
            smaller=fewer_values,
        ),
        Kind(
            name="safetensors",
            cases=1_000,
            quick=20,
            place=models.place,
            make=models.weights,
            write=_weights,
            argv=_check_of(models.weights_name),
            then=_weights_open,
            smaller=models.fewer_tensors,
        ),
    )
}
