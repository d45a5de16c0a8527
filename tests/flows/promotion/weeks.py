"""Weekly runs of one model in one home, with planted true scores: what `quench promote` needs, and no model.

Every week's run is a synthetic one whose artifacts have real files and manifests as the steps leave them. The scores of
a version on a later week's rows are in the store already, where the champion's evaluation looks them up: a hit.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from recipes.arms import CHAMPION
from recipes.schema import Recipe, recipe_of_run
from tasks import evaluate
from tasks.runtime.fingerprint import file_digest, fingerprint
from tasks.runtime.step import External, Step
from tests.flows.synthetic_run import BASE, SHAPES, SyntheticRun

ARM = "gptq-w4-g128"
ARMS = ("base", "nf4-adapter", "merged-dequantized", ARM)


@dataclass
class Weeks:
    """Writes a run a week.

    Attributes:
        home: QUENCH_HOME.
        test: Rows that test is drawn from.
        gate: The recipe's, where it differs from the default. Rows are of one domain: slices are not what is planted.
        made: Week -> the candidate's model, as an input of an evaluation.
        shares: Week -> the share of the rows that it gets right.
    """

    home: Path
    test: int = 3000
    gate: dict[str, Any] = field(default_factory=dict)
    made: dict[int, External] = field(default_factory=dict)
    shares: dict[int, float] = field(default_factory=dict)

    def run(self, week: int, share: float, *, part: slice = slice(None)) -> Path:
        """A week's run; its candidate gets that share of the rows right, the same rows every week but for the loss."""
        shapes = {name: replace(SHAPES[name], kl=1e-4, loss=1e-5) for name in ARMS}
        shapes["base"] = SHAPES["base"]
        shapes |= {name: replace(shapes[name], task=share) for name in ARMS if name != "base"}
        mark = f"week-{week}"
        written = SyntheticRun(
            self.home,
            shapes=shapes,
            test=self.test,
            general=400,
            run_id=f"202611{week:02d}-120000-{mark}",
            salt=mark,
            remade=mark,
            part=part,
            measured=False,
        )
        written.domains = [""] * len(written.rows)
        folder = written.write()
        recipe = json.loads((folder / "recipe.resolved.json").read_text())
        recipe |= {"model": {"base": "base"}, "data": {"path": "domain.jsonl", "general": "general.jsonl"}}
        recipe |= {"gate": self.gate, "promote": {"prefer": ARM}}
        recipe["evaluate"]["scorers"][0]["databases"] = "databases"
        (folder / "recipe.resolved.json").write_text(json.dumps(recipe))
        dataset = self._dataset(written)
        model = self._of(folder, f"quantize/{ARM}")
        real(model)
        self.made[week], self.shares[week] = source("model", model), share
        self._evaluations(written, recipe_of_run(recipe), source("dataset", dataset), week)
        return folder

    def _of(self, folder: Path, key: str) -> Path:
        steps = json.loads((folder / "steps.json").read_text())["steps"]
        (path,) = [step["path"] for step in steps if step["key"] == key]
        return self.home / path

    def _dataset(self, written: SyntheticRun) -> Path:
        (step,) = [step for step in written.steps if step["stage"] == "prepare"]
        folder = self.home / step["path"]
        (folder / "files" / "tokenizer").mkdir()
        turns = [json.dumps([{"role": "user", "content": name}]) for name in written.rows]
        table = {"row": list(written.rows), "split": ["test"] * len(turns), "messages": turns}
        pq.write_table(pa.table(table), folder / "files" / "rows.parquet")
        tokens(folder / "files" / "tokenizer")
        return folder

    def _evaluations(self, written: SyntheticRun, recipe: Recipe, data: External, week: int) -> None:
        """The candidate's own, and on the same rows those of every earlier version."""
        own = self._of(self.home / "runs" / written.run_id, f"evaluate/{ARM}")
        for number, model in self.made.items():
            place, slug = own, ARM if number == week else CHAMPION
            inputs = {"dataset": data, "model": model}
            step = evaluate.step(recipe, slug, kind="quantized", inputs=inputs, chosen_by_dev=slug != CHAMPION)
            if number != week:
                place = self.home / "store" / "evaluate" / f"{CHAMPION}-{step.fingerprint[:12]}"
                shutil.copytree(own, place)
                shape = replace(written.shapes[ARM], task=self.shares[number])
                written._scores(place / "files", ARM, shape, np.random.default_rng([0, ARMS.index(ARM)]))
            complete(place, step, self.home)


def source(name: str, folder: Path) -> External:
    """An artifact of the store as an input."""
    digest = json.loads((folder / "manifest.json").read_text())["digest"]
    return External(name=name, path=folder / "files", digest=digest, source=str(folder))


def tokens(folder: Path) -> None:
    """A tokenizer's files, the same everywhere."""
    for name in ("tokenizer.json", "chat_template.jinja"):
        (folder / name).write_text(name)
    (folder / "tokenizer_config.json").write_text("{}")


def real(folder: Path) -> None:
    """Give a synthetic model files with the sizes and digests that its manifest names."""
    tokens(folder / "files")
    manifest = json.loads((folder / "manifest.json").read_text())
    for name in manifest["files"]:
        path = folder / "files" / name
        if name.endswith(".safetensors"):
            path.write_bytes(f"weights of {folder.name}".encode())
        elif not path.exists():
            path.write_text(name)
    manifest["inputs"] = {"model": {"path": str(BASE), "digest": "0" * 64, "fingerprint": "0" * 64}}
    manifest["result"] = {"backend": "gptqmodel", "sequences": 3, "tokens": 99}
    sealed(folder, manifest)


def complete(folder: Path, step: Step, home: Path) -> None:
    """Give an evaluation the manifest that its step leaves."""
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest |= {"identity": step.identity, "fingerprint": step.fingerprint, "slug": step.slug}
    manifest["inputs"] = {
        name: {"path": str(read.path.relative_to(home)), "digest": read.digest, "fingerprint": read.fingerprint}
        for name, read in step.inputs.items()
        if isinstance(read, External)
    }
    manifest["files"] = {path.name: {} for path in sorted((folder / "files").iterdir()) if path.is_file()}
    sealed(folder, manifest)


def sealed(folder: Path, manifest: dict[str, Any]) -> None:
    """Write the manifest with the sizes and digests of the files as they are."""
    for name in manifest["files"]:
        path = folder / "files" / name
        manifest["files"][name] = {"sha256": file_digest(path), "size": path.stat().st_size}
    manifest["digest"] = fingerprint({"files": {name: one["sha256"] for name, one in manifest["files"].items()}})
    (folder / "manifest.json").write_text(json.dumps(manifest))
