"""A store that has everything a recipe asks for, week after week: files that were drawn, so that all steps are hits.

Everything else is real: the recipe is pinned and composed as a run does it, artifacts are committed by the store.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from flows.compose import compose
from flows.pins import pin
from flows.plan.lookup import known_inputs
from recipes.arms import CHAMPION
from recipes.checks.check import load_and_read
from recipes.schema import Recipe
from tasks import evaluate
from tasks.choose import candidates
from tasks.runtime.step import External, Step, hardware, lookup, origin
from tasks.runtime.store.local import Artifact, Store
from tests.conftest import QUICKSTART
from tests.flows.promotion.weeks import ARM, tokens
from tests.flows.synthetic_run import BASE, SHAPES, Shape, SyntheticRun

ROWS = 700  # of the quickstart's: enough for 128 calibration rows, as in the small run
TEST = 4000  # rows of test in the scores that are drawn: enough to see one point
RECIPE = f"""
name: quickstart
model: {{base: {QUICKSTART / "base"}}}
data: {{path: rows, max_length: 192}}
train: {{rank: 8, batch_size: 16, max_steps: 8}}
calibrate: {{rows: 128, seq_len: 512}}
quantize: {{schemes: [{ARM}]}}
evaluate: {{max_new_tokens: 40, null_arms: []}}
measure: {{enabled: false}}
promote: {{prefer: {ARM}}}
"""
SPLITS = dict.fromkeys(("train", "dev", "test"), TEST)


@dataclass
class WrittenWeeks:
    """A folder with a recipe and rows; each week has more rows, and another model.

    Attributes:
        folder: Of the recipe and its rows.
        home: QUENCH_HOME.
        models: Week -> the candidate's model, as the evaluation of a champion reads it.
        shares: Week -> the share of the rows of test that it gets right.
    """

    folder: Path
    home: Path
    models: dict[int, External] = field(default_factory=dict)
    shares: dict[int, float] = field(default_factory=dict)

    @property
    def recipe(self) -> Path:
        """The recipe's file."""
        return self.folder / "recipe.yaml"

    def week(self, number: int, share: float) -> None:
        """Add a row to the data, and write what a run of the recipe would now make."""
        lines = (QUICKSTART / "data" / "sql.jsonl").read_text(encoding="utf-8").splitlines()[: ROWS + number]
        (self.folder / "rows").mkdir(parents=True, exist_ok=True)
        (self.folder / "rows" / "sql.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        self.recipe.write_text(RECIPE, encoding="utf-8")
        loaded = load_and_read(self.recipe, sets=[], data=False).loaded
        Week(self, number, share, Store(self.home)).write(loaded.recipe, loaded)


class Week:
    """Writes one week."""

    def __init__(self, weeks: WrittenWeeks, number: int, share: float, store: Store) -> None:
        self.weeks, self.number, self.share, self.store = weeks, number, share, store
        self.drawn = SyntheticRun(weeks.home, test=TEST, general=0)
        self.drawn.domains = [""] * TEST
        self.artifacts: dict[str, Artifact] = {}

    def write(self, recipe: Recipe, loaded: Any) -> None:
        """Commit every step that is not in the store, then what the champions of earlier weeks score on its test."""
        matrix = compose(recipe, pin(loaded, self.weeks.home), self._step)
        scored = {step.key: step for step in matrix.steps}[f"evaluate/{ARM}"]
        inputs = known_inputs(scored, self.artifacts)
        assert inputs is not None
        for week, model in self.weeks.models.items():
            read = {name: external(name, artifact) for name, artifact in inputs.items()} | {"model": model}
            champion = evaluate.step(recipe, CHAMPION, kind="quantized", inputs=read, chosen_by_dev=False)
            self._commit(champion, {name: source.artifact for name, source in read.items()}, self.weeks.shares[week])
        self.weeks.models[self.number] = external("model", inputs["model"])
        self.weeks.shares[self.number] = self.share

    def _step(self, step: Step) -> None:
        inputs = known_inputs(step, self.artifacts)
        assert inputs is not None, step.key
        stored = lookup(step, inputs, self.store).artifact
        self.artifacts[step.key] = stored or self._commit(step, inputs, self.share)

    def _commit(self, step: Step, inputs: Mapping[str, Artifact], share: float) -> Artifact:
        digests = {name: artifact.digest for name, artifact in inputs.items()}
        attempt = self.store.begin(step.stage, step.slug, step.fingerprint, inputs=digests)
        self._files(step, attempt.files, share)
        manifest = {
            "stage": step.stage,
            "slug": step.slug,
            "fingerprint": step.fingerprint,
            "identity": step.identity,
            "inputs": {name: origin(artifact, self.weeks.home) for name, artifact in inputs.items()},
            "result": result(step),
            "seconds": 1.0,
            "peak_rss_gib": 0.5,
            "peak_gpu_gib": None,
            "started_at": "2026-11-24T12:00:00+00:00",
            "finished_at": "2026-11-24T12:00:01+00:00",
            "hardware": hardware(),
            "environment": None,
            "execution": {"device": "cpu", "kind": "cpu", "threads": 1, "micro_batch": None, "processes": 1},
        }
        return self.store.commit(attempt, manifest)

    def _files(self, step: Step, files: Path, share: float) -> None:
        (files / "events.jsonl").write_text("", encoding="utf-8")
        (files / "week.txt").write_text(f"{step.key} of week {self.number}", encoding="utf-8")
        if step.stage == "prepare":
            (files / "tokenizer").mkdir()
            tokens(files / "tokenizer")
            turns = [json.dumps([{"role": "user", "content": name}]) for name in self.drawn.rows]
            table = {"row": list(self.drawn.rows), "split": ["test"] * TEST, "messages": turns}
            pq.write_table(pa.table(table), files / "rows.parquet")
        elif step.stage in ("merge", "quantize"):
            tokens(files)
            for name in ("config.json", "model.safetensors"):  # the model card reads their shapes
                shutil.copyfile(BASE / name, files / name)
        elif step.stage == "choose":
            (files / "choice.json").write_text(json.dumps(result(step)), encoding="utf-8")
        elif step.stage == "evaluate":
            self.drawn._scores(files, step.slug, shape(step.slug, share), np.random.default_rng([0, len(step.slug)]))


def result(step: Step) -> dict[str, Any]:
    """What a job answers."""
    if step.stage == "choose":
        return {"candidate": candidates(step)[0]}
    told = {
        "prepare": {"rows": SPLITS, "tokens": SPLITS},
        "quantize": {"backend": "gptqmodel", "sequences": 3, "tokens": 99},
        "evaluate": {"computed": {"device": "cpu"}},
    }
    return told.get(step.stage, {})


def shape(slug: str, share: float) -> Shape:
    """All arms of a week answer alike, but for the untouched base."""
    return SHAPES["base"] if slug in ("base", "base-nf4") else replace(SHAPES[ARM], kl=1e-4, loss=1e-5, task=share)


def external(name: str, artifact: Artifact) -> External:
    """An artifact as an input that is known by its digest."""
    return External(name=name, path=artifact.path, digest=artifact.digest, source=str(artifact.path))
