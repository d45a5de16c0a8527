"""Promotion on a real run: the champion is scored by a real child on the candidate's rows; rollback; real damage."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from mlflow.tracking import MlflowClient
from safetensors.torch import load_file, save_file

from flows.promotion.champion import TRAIN_ROWS, trained_on
from flows.promotion.journal import Journal
from flows.tracking.tracker import tracking_uri
from recipes.data.rows import normalised
from tasks.runtime.fingerprint import file_digest, fingerprint
from tests.conftest import World

# 49 groups of test: what they can tell is wide, and eight steps of training lift no task score.
GATE = {"task": 0.2, "domain_task": 0.2, "loss": 0.5, "general_loss": 0.5, "better_than_base": False}


def run_of(world: World, name: str, *, prefer: str, **gate: float) -> str:
    """A copy of the small run whose recipe names another arm: all its steps are those of the store."""
    source = (world.home / "runs" / "latest").resolve()
    folder = world.home / "runs" / f"{name}-{prefer}"
    shutil.copytree(source, folder)
    recipe = json.loads((folder / "recipe.resolved.json").read_text())
    recipe |= {"gate": {**GATE, **gate}, "promote": {"prefer": prefer}}
    (folder / "recipe.resolved.json").write_text(json.dumps(recipe))
    steps = json.loads((folder / "steps.json").read_text())
    (folder / "steps.json").write_text(json.dumps({**steps, "id": folder.name}))
    return folder.name


def promote(world: World, *words: str, check: int) -> dict[str, Any]:
    return json.loads(world.quench("promote", *words, "--json", check=check).stdout)


def remade(folder: Path, change: Callable[[Path], None]) -> None:
    """Change a committed artifact's files and let its manifest say what they are now: another artifact by its bytes."""
    for path in folder.rglob("*"):  # its files are links into the shared home
        if path.is_file():
            data = path.read_bytes()
            path.unlink()
            path.write_bytes(data)
    change(folder / "files")
    manifest = json.loads((folder / "manifest.json").read_text())
    for name, one in manifest["files"].items():
        path = folder / "files" / name
        one |= {"sha256": file_digest(path), "size": path.stat().st_size}
    content = {name: one["sha256"] for name, one in manifest["files"].items() if name != "events.jsonl"}
    manifest["digest"] = fingerprint({"files": content})
    (folder / "manifest.json").write_text(json.dumps(manifest))


def artifact(world: World, slug: str) -> Path:
    (folder,) = (world.home / "store" / "quantize").glob(f"{slug}-*")
    return folder


def scores(world: World, path: str) -> list[dict[str, Any]]:
    table = pq.read_table(world.home / path / "files" / "scores.parquet")
    return sorted(table.to_pylist(), key=lambda one: (one["metric"], one["row"]))


def alias(world: World, name: str) -> str | None:
    client = MlflowClient(tracking_uri(world.home))
    found = client.get_registered_model("small").aliases.get(name)
    return client.get_model_version("small", found).tags["quench.version"] if found else None


def test_a_champion_is_followed_blocked_against_and_rolled_back_to(world: World) -> None:
    first = run_of(world, "a", prefer="gptq-w4-g128")
    made = promote(world, first, check=0)
    assert (made["event"], made["promotion"]["version"], made["trouble"]) == ("promoted", 1, [])
    assert promote(world, first, check=0)["event"] == "nothing"

    # Another artifact: the champion is scored beside it, by the code and on the rows that it was scored with itself.
    second = run_of(world, "b", prefer="rtn-w4-g128")
    made = promote(world, second, check=0)
    assert (made["event"], made["promotion"]["version"], made["promotion"]["champion"]) == ("promoted", 2, 1)
    beside = made["gate"]["champion"]
    assert beside["compared"] and beside["removed"] == 0 and beside["rows"] > 50
    own = world.steps(first)["evaluate/gptq-w4-g128"]["path"]
    of_answers = {("dev", "task"), ("dev", "truncated")}  # nobody reads the champion's answers to dev
    scored = [one for one in scores(world, str(own)) if (one["split"], one["metric"]) not in of_answers]
    assert scores(world, beside["evaluate"]) == scored and len(scored) < len(scores(world, str(own)))
    report = json.loads((world.home / "runs" / second / "report.json").read_text())
    assert report["gate"] == made["gate"]
    assert {"task", "loss", "general_loss"} <= {
        one["metric"] for one in report["gate"]["tests"] if one["against"] == "champion"
    }
    assert "the champion, version 1" in (world.home / "runs" / second / "report.md").read_text()
    assert (alias(world, "champion"), alias(world, "challenger")) == ("2", None)

    # What cannot be told blocks, and the champion stays.
    third = run_of(world, "c", prefer="merged-original", task=0.001)
    made = promote(world, third, check=1)
    assert (made["event"], made["promotion"]["outcome"]) == ("blocked", "undecided")
    assert any("would decide" in line for line in made["gate"]["text"])
    assert (alias(world, "champion"), alias(world, "challenger")) == ("2", "3")

    made = promote(world, "--to", "1", third, check=0)
    assert (made["event"], made["promotion"]["version"], made["promotion"]["champion"]) == ("rolled back", 1, 2)
    assert alias(world, "champion") == "1"
    events = [(one.version, one.event) for one in Journal(world.home, "small").lines()]
    assert events == [(1, "promoted"), (2, "promoted"), (3, "blocked"), (1, "rolled back")]
    said = world.quench("promote", "--to", "3", third, check=2).stderr
    assert "never passed the gate" in said and "Name one of: 2." in said


def test_rows_that_the_champion_was_trained_on_are_left_out_and_counted(world: World) -> None:
    first, second = (run_of(world, name, prefer=f"{name}-w4-g128") for name in ("gptq", "rtn"))
    promote(world, first, check=0)
    kept = world.home / "promotions" / "small" / "1" / TRAIN_ROWS
    said = json.loads(kept.read_text())
    dataset = pq.read_table(next((world.home / "store" / "prepare").glob("*")) / "files" / "rows.parquet").to_pylist()
    sides = {side: {one["row"] for one in dataset if one["split"] == side} for side in ("train", "test")}
    turns = {one["row"]: sha256(normalised(json.loads(one["messages"])).encode()).hexdigest()[:16] for one in dataset}
    assert set(said["rows"]) == sides["train"] | {turns[row] for row in sides["train"]} and said["note"] is None
    assert trained_on(world.home, artifact(world, "rtn-w4-g128").relative_to(world.home)) == said

    # As if its split had been another one: ten rows of the present test were in its train, five under older names.
    overlap = sorted(sides["test"])[:10]
    overlap[5:] = [turns[row] for row in overlap[5:]]
    kept.write_text(json.dumps({**said, "rows": sorted({*said["rows"], *overlap})}))
    made = promote(world, second, check=0)
    beside = made["gate"]["champion"]
    assert beside["removed"] == 10 and beside["rows"] == len(sides["test"])
    compared = {one["metric"]: one["n"] for one in made["gate"]["tests"] if one["against"] == "champion"}
    others = {one["metric"]: one["n"] for one in made["gate"]["tests"] if one["against"] != "champion"}
    assert others["loss"] - compared["loss"] == 10 and others["task"] - compared["task"] == 10
    assert others["general_loss"] == compared["general_loss"]
    assert "10 that it was trained on are left out" in " ".join(made["gate"]["text"])


def test_a_champion_that_was_changed_or_is_gone_is_refused(world: World) -> None:
    first, second = (run_of(world, name, prefer=f"{name}-w4-g128") for name in ("gptq", "rtn"))
    promote(world, first, check=0)
    folder = artifact(world, "gptq-w4-g128")
    remade(folder, lambda files: (files / "serve.md").write_text("other") and None)
    said = world.quench("promote", second, check=2).stderr
    assert "Another artifact is there" in said and "promote --to" in said
    shutil.rmtree(folder)
    assert "It was removed." in world.quench("promote", second, check=2).stderr
    assert len((world.home / "promotions.jsonl").read_text().splitlines()) == 1


def test_a_champion_that_reads_other_tokens_is_compared_by_bits_and_answers(world: World) -> None:
    first, second = (run_of(world, name, prefer=f"{name}-w4-g128") for name in ("gptq", "rtn"))

    def other_template(files: Path) -> None:
        path = files / "chat_template.jinja"
        path.write_text(path.read_text().replace("<|im_start|>", "<|im_start|> "))

    remade(artifact(world, "gptq-w4-g128"), other_template)
    promote(world, first, check=0)
    made = promote(world, second, check=0)
    against = {one["metric"]: one for one in made["gate"]["tests"] if one["against"] == "champion"}
    assert set(against) == {"task", "bits_per_byte"}
    assert "reads other tokens (chat_template.jinja)" in made["gate"]["champion"]["note"]
    assert against["bits_per_byte"]["unit"] == "bits" and against["bits_per_byte"]["outcome"] == "pass"


def test_gate_and_promotion_are_in_no_fingerprint(small: World) -> None:
    sets = ("gate.task=0.1", "gate.better_than_base=false", "promote.prefer=rtn-w4-g128", "promote.model_name=other")
    assert all(small.plan(*(f"--set={one}" for one in sets)).values())


@pytest.mark.slow
def test_of_two_runs_at_once_the_second_faces_the_first(world: World) -> None:
    names = [run_of(world, name, prefer=f"{name}-w4-g128") for name in ("gptq", "rtn")]
    both = [
        subprocess.Popen(world.argv("promote", name), env=world.env, cwd=world.home, stderr=subprocess.DEVNULL)
        for name in names
    ]
    assert [one.wait(600) for one in both] == [0, 0]
    first, second = Journal(world.home, "small").lines()
    assert (first.version, first.champion) == (1, None)
    assert (second.version, second.champion) == (2, 1)
    assert any(one["against"] == "champion" for one in second.checks)
    assert alias(world, "champion") == "2"


@pytest.mark.slow
def test_a_damaged_artifact_is_evaluated_and_blocked(world: World) -> None:
    """The scales of one layer are half of what they were: everything loads and answers, and the gate says worse."""
    promote(world, run_of(world, "good", prefer="rtn-w4-g128"), check=0)

    def halve(files: Path) -> None:
        tensors = load_file(files / "model.safetensors")
        (name,) = [one for one in tensors if one.endswith("layers.0.mlp.down_proj.scales")]
        tensors[name] = tensors[name] / 2
        save_file(tensors, files / "model.safetensors", metadata={"format": "pt"})

    remade(artifact(world, "gptq-w4-g128"), halve)
    sets = [f"--set=gate.{name}={str(value).lower()}" for name, value in GATE.items() if name != "loss"]
    world.quench("run", str(world.recipe), *sets, "--set=promote.prefer=gptq-w4-g128")
    assert world.steps()["evaluate/gptq-w4-g128"]["status"] == "made"
    made = promote(world, check=1)
    assert (made["event"], made["promotion"]["outcome"]) == ("blocked", "worse")
    worse = {(one["metric"], one["against"]) for one in made["gate"]["tests"] if one["outcome"] == "worse"}
    assert {("loss", "merged-dequantized"), ("loss", "champion")} <= worse
    assert (alias(world, "champion"), alias(world, "challenger")) == ("1", "2")
