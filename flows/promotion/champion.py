"""The present champion on the rows of another run: what it was trained on, and its scores on the present test set."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from flows.compose import limits
from flows.pins import scorer_content
from flows.promotion.evidence import record_folder
from flows.promotion.journal import Promotion
from flows.results.read import Run, RunArm, RunStep, recipe_of
from flows.results.rows import read_scores
from recipes.arms import CHAMPION
from recipes.data.rows import normalised
from recipes.problem import Problem
from recipes.schema import Recipe
from tasks import evaluate
from tasks.runtime.fingerprint import file_digest
from tasks.runtime.gpus import device_kind
from tasks.runtime.pin import Digests
from tasks.runtime.process.launch import Launcher
from tasks.runtime.process.leases import Leases
from tasks.runtime.step import Context, External, run_step
from tasks.runtime.store.local import Store, read_json
from tasks.runtime.store.open import open_store

TRAIN_ROWS = "train_rows.json"
OWN_TOKENS = "It reads other tokens ({}): compared by its answers and by bits a byte, not on the general hold-out."
TOKEN_FILES = (
    *("tokenizer.json", "tokenizer.model"),
    *("chat_template.jinja", "chat_template.json", "chat_template_args.json"),
)


# ---- what it was trained on


def trained_on(home: Path, model: Path) -> dict[str, Any]:
    """The rows of train behind a model, as train_rows.json keeps them: by name, and by the hash of their turns.

    Both are made of a row's content, so it is found again in any later data set: by its turns also where another column
    has changed, or the way in which rows are named.

    Args:
        home: QUENCH_HOME.
        model: The artifact's folder, relative to QUENCH_HOME.

    Returns:
        {"dataset": digest or None, "rows": sorted names and hashes, "note": what is not known, or None}.
    """
    behind = _ancestors(home, model)
    dataset = next((path for path, manifest in behind.items() if manifest["stage"] == "prepare"), None)
    here = [manifest["result"].get("trained_here") for manifest in behind.values() if manifest["stage"] == "train"]
    note = "It was trained elsewhere: rows of that training are not known." if False in here else None
    if dataset is None:
        return {"dataset": None, "rows": [], "note": "Its data set is not in the store: no row could be left out."}
    rows = {key for keys in _keys(dataset / "files", "train").values() for key in keys}
    return {"dataset": behind[dataset]["digest"], "rows": sorted(rows), "note": note}


def training_of(version: Promotion, home: Path) -> dict[str, Any]:
    """`trained_on` of a version as it was kept; of one that is older than this record, as the store still has it."""
    kept = record_folder(home, version) / TRAIN_ROWS
    return read_json(kept) if kept.is_file() else trained_on(home, Path(version.path))


def _keys(dataset: Path, split: str) -> dict[str, tuple[str, str]]:
    """Sample -> name of its row, and hash of its turns: white space and Unicode forms do not count."""
    columns, only = ["row", "messages"], [("split", "==", split)]
    keys: dict[str, tuple[str, str]] = {}
    for batch in pq.read_table(dataset / "rows.parquet", columns=columns, filters=only).to_batches():
        for sample, messages in zip(*(column.to_pylist() for column in batch.columns), strict=True):
            turns = hashlib.sha256(normalised(json.loads(messages)).encode()).hexdigest()[:16]
            keys[sample] = (row_name(sample), turns)
    return keys


def row_name(name: str) -> str:
    """Name of a sample's row. A sample of one turn is named HASH.TURN; the row is its hash."""
    return name.partition(".")[0]


def _ancestors(home: Path, model: Path) -> dict[Path, Mapping[str, Any]]:
    """Folder -> manifest of an artifact and of everything in the store that it was made from, nearest first."""
    manifests: dict[Path, Mapping[str, Any]] = {}
    todo = [home / model]
    while todo:
        folder = todo.pop(0)
        if folder in manifests or not (folder / "manifest.json").is_file():  # outside of the store there is none
            continue
        manifests[folder] = manifest = read_json(folder / "manifest.json")
        todo += [(home / origin["path"]).parent for origin in manifest["inputs"].values()]
    return manifests


# ---- its scores here


@dataclass(frozen=True, kw_only=True)
class ChampionScores:
    """The champion's scores on this run's rows.

    Attributes:
        evaluate: Folder of its scores, relative to QUENCH_HOME.
        rows: Rows of test.
        removed: Those that it was trained on.
        note: What is not known about its training, or None.
    """

    evaluate: str
    rows: int
    removed: list[str]
    note: str | None


def evaluated(present: Promotion, run: Run, candidate: RunArm, home: Path) -> ChampionScores:
    """Score the champion as the candidate was scored: same rows, order, batches and code.

    Raises:
        RecipeError: It is not in the store any more, is damaged, or the run was scored by another version of Quench.
        StepFailed: It does not load or does not compute.
    """
    scored = run.step(candidate.evaluate)
    assert scored is not None and scored.manifest is not None and scored.files is not None  # it was evaluated
    store, folder = open_store(home), home / present.path
    if problem := stale(store, present):
        raise problem.error()
    recipe = recipe_of(run.folder)
    inputs = _inputs(scored, recipe, home)
    other = _other_tokens(folder / "files", inputs["dataset"].path / "tokenizer")
    if other:  # then there is nothing that its logits could be compared with
        inputs.pop("reference", None)
    inputs["model"] = External(name="model", path=folder / "files", digest=present.digest, source=present.path)
    kind = "external" if other else present.kind  # which reads the rows in the model's own tokens
    computed = evaluate.Computing(device=device_kind(limits(recipe).device))
    step = evaluate.step(recipe, CHAMPION, kind=kind, inputs=dict(inputs), computed=computed, chosen_by_dev=False)
    _same_scoring(step.identity, scored.manifest["identity"], run)
    with Launcher() as launcher:
        context = Context(store=store, launcher=launcher, leases=Leases(home), limits=limits(recipe))
        artifact = run_step(step, {name: source.artifact for name, source in inputs.items()}, context).artifact
    assert artifact.folder is not None
    rows = [str(name) for name in read_scores(scored.files)["nll"].rows]
    training = training_of(present, home)
    trained, keys = set(training["rows"]), _keys(inputs["dataset"].path, "test")
    notes = [training["note"]] if training["note"] else []
    if "nll" not in read_scores(artifact.path):
        notes.append(OWN_TOKENS.format(", ".join(other)))
    return ChampionScores(
        evaluate=str(artifact.folder.relative_to(home)),
        rows=len(rows),
        removed=[name for name in rows if not trained.isdisjoint(keys.get(name, (row_name(name),)))],
        note=" ".join(notes) or None,
    )


def stale(store: Store, version: Promotion, *, digests: bool = True) -> Problem | None:
    """The artifact of a promotion is not in the store as it was promoted; every byte is read where `digests`."""
    folder = store.home / version.path
    manifest = _manifest(folder)
    if manifest is None:
        why = "It was removed."
    elif not {"digest", "files"} <= manifest.keys():
        why = "Its manifest.json cannot be read."
    elif manifest["digest"] != version.digest:
        why = f"Another artifact is there: {manifest['digest'][:12]} instead of {version.digest[:12]}."
    elif damage := store.damage(folder, manifest, digests=digests):
        why = f"{damage[0].upper()}{damage[1:]}."
    else:
        return None
    return Problem(
        what=f"Version {version.version} of {version.model} is not in the store as it was promoted.",
        where=str(folder),
        why=why,
        next=f"Put its files back (the registry's version has them, too), or quench promote --to another version of "
        f"{version.model}.",
    )


def _manifest(folder: Path) -> dict[str, Any] | None:
    """A manifest; None where there is none, and without keys where something has changed or cut the file."""
    try:
        manifest = read_json(folder / "manifest.json")
    except FileNotFoundError:
        return None
    except ValueError:
        return {}
    return manifest if isinstance(manifest, dict) else {}


def _inputs(scored: RunStep, recipe: Recipe, home: Path) -> dict[str, External]:
    """What the candidate was scored with, but for the model itself.

    Raises:
        RecipeError: Something of it has changed or gone since.
    """
    inputs: dict[str, External] = {}
    digests = Digests(home)
    assert scored.manifest is not None
    for name, read in scored.manifest["inputs"].items():
        if name in ("model", "adapter", "calibset"):
            continue
        path = home / read["path"]  # an absolute path stays what it is
        now = read["digest"] if path.is_relative_to(home) else _digest(name, path, recipe, digests)
        if now != read["digest"] or not path.exists():
            raise Problem(
                what=f"{name} is not what the run read.",
                where=str(path),
                why="The champion has to be scored as the candidate was.",
                next="quench run the recipe again; what has not changed is taken from the store.",
            ).error()
        inputs[name] = External(name=name, path=path, digest=read["digest"], source=read["path"])
    return inputs


def _digest(name: str, path: Path, recipe: Recipe, digests: Digests) -> str | None:
    """Of what a scorer reads outside of the store (scorer-N), as it is now."""
    if not path.exists():
        return None
    number = int(name.removeprefix("scorer-"))
    return scorer_content(recipe.evaluate.scorers[number], path, number, digests=digests).digest


def _other_tokens(model: Path, dataset: Path) -> list[str]:
    """Files of the champion's tokenizer and chat template that differ from the data set's."""
    other = [name for name in TOKEN_FILES if _content(model / name) != _content(dataset / name)]
    return other + (["chat_template"] if _template(model) != _template(dataset) else [])


def _content(path: Path) -> str | None:
    return file_digest(path) if path.is_file() else None


def _template(folder: Path) -> str | None:
    """The chat template in tokenizer_config.json, where older tokenizers have it."""
    path = folder / "tokenizer_config.json"
    return json.loads(path.read_text(encoding="utf-8")).get("chat_template") if path.is_file() else None


def _same_scoring(ours: Mapping[str, Any], theirs: Mapping[str, Any], run: Run) -> None:
    """Raise RecipeError where this machine, this code or these packages score otherwise than the run's did."""
    here, there = ours["params"]["device"], theirs["params"].get("device")
    if there is not None and here != there:
        raise Problem(
            what=f"The run was scored on {there}, and the champion would be scored on {here}.",
            where=str(run.folder),
            why="Noise of arithmetic differs between kinds of devices: both models have to be scored on one.",
            next="quench promote on a machine of that kind, or quench run the recipe again here: evaluations are made "
            "again, models are taken from the store.",
        ).error()
    shared = ours["tools"].keys() & theirs["tools"].keys()
    plain = [
        {
            **identity["params"],
            "kind": None,
            "decoded": None,  # which splits: the batches of test are the same
            "version": identity["version"],
            "tools": {name: identity["tools"][name] for name in shared},
        }
        for identity in (ours, theirs)
    ]
    if plain[0] != plain[1]:
        raise Problem(
            what="The run was scored by another version of Quench.",
            where=str(run.folder),
            why="Candidate and champion have to be scored by the same code.",
            next="quench run the recipe again: evaluations are made again, models are taken from the store.",
        ).error()
