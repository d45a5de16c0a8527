"""Real models through the evaluate job: one under two names is never different, a damaged one is worse."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from flows.results.cells import Draws
from flows.results.comparisons import Comparison, compare
from flows.results.rows import RowScores, read_scores
from tasks.jobs import evaluate
from tasks.runtime.process.job import Input, Job
from tests.conftest import World
from tests.flows.paths import arm

MERGED = "merged-dequantized"
LAYER = "model.layers.2.mlp.down_proj.weight"


def again(home: Path, out: Path, *, model: Path | None = None) -> dict[str, RowScores]:
    """The run's own evaluate job of the merged model, done once more; with another model in its place."""
    job = Job.load(next((home / "store" / "evaluate").glob(f"{MERGED}-*/attempt-1/job.json")))
    out.mkdir(parents=True)
    inputs = job.inputs if model is None else {**job.inputs, "model": Input(path=model, digest="", fingerprint="")}
    evaluate.run(replace(job, out=out, inputs=inputs))
    return read_scores(out)


def damaged(home: Path, out: Path) -> Path:
    """The merged model with as much noise as weight on one of its 42 linear layers."""
    shutil.copytree(next((home / "store" / "merge").glob("*dequantized-*/files")), out)
    weights = load_file(out / "model.safetensors")
    noise = torch.randn(weights[LAYER].shape, generator=torch.Generator().manual_seed(0))
    weights[LAYER] = (weights[LAYER].float() + weights[LAYER].float().std() * noise).bfloat16()
    (out / "model.safetensors").unlink()  # the store's files are read-only
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    return out


def compared(home: Path, folder: Path) -> dict[tuple[str, str, str], Comparison]:
    """The same model as a scheme of its own and the damaged one as another, against the merged model and each other."""
    scores = {
        MERGED: read_scores(next((home / "store" / "evaluate").glob(f"{MERGED}-*/files"))),
        "twin": again(home, folder / "twin"),
        "damaged": again(home, folder / "damaged", model=damaged(home, folder / "model")),
    }
    schemes = [arm(slug, scheme=slug, merge_base="dequantized") for slug in ("twin", "damaged")]
    made, left_out = compare([arm(MERGED, merge_base="dequantized"), *schemes], scores, Draws())
    assert not left_out
    return {(one.a, one.b, one.metric): one for one in made}


@pytest.mark.slow
def test_one_model_under_two_names_is_never_different_and_damage_is_seen(small: World, tmp_path: Path) -> None:
    found = compared(small.home, tmp_path)
    assert len(found) == 8  # three metrics each against the merged model, two against each other
    for metric in ("kl_mean", "task", "ppl_test"):
        twin = found["twin", MERGED, metric]
        assert (twin.difference, twin.verdict) == (0, "no difference shown")
    for metric in ("kl_mean", "ppl_test"):
        assert found["damaged", MERGED, metric].verdict == "worse"
    damage = next(one for (a, b, metric), one in found.items() if {a, b} == {"twin", "damaged"} and metric == "kl_mean")
    assert damage.verdict == ("worse" if damage.a == "damaged" else "better")
