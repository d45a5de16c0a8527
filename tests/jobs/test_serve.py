"""serve: a real engine gives the losses and answers that the arm's own evaluation gave, and leaves nothing running."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pyarrow.parquet as pq
import pytest

from tasks.jobs import evaluate, prepare, serve
from tasks.jobs.serve_file import write_serve_file
from tasks.runtime.process.environments import environment_problem, interpreter
from tests.jobs.build import make_job, write_jsonl
from tests.jobs.test_evaluate import PARAMS as EVALUATE
from tests.jobs.test_prepare import PARAMS as PREPARE
from tests.jobs.test_prepare import questions
from tests.tiny import write_base

PARAMS = {
    "engine": {"name": "vllm", "version": "0"},
    "kv_cache_dtype": "auto",
    "tensor_parallel": 1,
    "max_model_len": None,
    "scorers": EVALUATE["scorers"],
    "max_new_tokens": 8,
    "speed": {"prompt_tokens": 32, "new_tokens": 4, "repeats": 5},
}
missing = environment_problem("vllm")
needs_engine = pytest.mark.skipif(missing is not None, reason=str(missing and missing.next))


class World(NamedTuple):
    model: Path
    dataset: Path
    scores: Path


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("serve")
    model = write_base(folder / "model")
    write_serve_file(model, name="merged", model=model, scheme=None)
    data = write_jsonl(folder / "rows.jsonl", questions(200))
    prepare.run(make_job("prepare", folder / "dataset", params=PREPARE, data=data, tokenizer=model))
    params = EVALUATE | {"max_new_tokens": 8}
    job = make_job("evaluate", folder / "scores", params=params, model=model, dataset=folder / "dataset")
    evaluate.run(job)
    return World(model, folder / "dataset", folder / "scores")


def served(world: World, out: Path, *, model: Path | None = None, **changed: Any) -> dict[str, Any]:
    inputs = {"model": model or world.model, "dataset": world.dataset, "scores": world.scores}
    job = make_job("serve", out, params=PARAMS | changed, **inputs)
    return serve.run(replace(job, execution=replace(job.execution, server_python=str(interpreter("vllm")))))


def total(folder: Path, metric: str) -> dict[str, float]:
    lines = pq.read_table(folder / "scores.parquet", filters=[("metric", "==", metric), ("split", "==", "test")])
    return dict(zip(lines["row"].to_pylist(), lines["sum"].to_pylist(), strict=True))


@pytest.fixture
def nothing_left() -> Iterator[None]:
    """No process of this test is alive after it."""
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    yield
    left = [child for child in psutil.Process().children(recursive=True) if child.pid not in before]
    assert not left


@needs_engine
@pytest.mark.slow
def test_the_engine_says_what_was_measured(world: World, tmp_path: Path, nothing_left: None) -> None:
    out = tmp_path / "out"
    result = served(world, out)
    own, there = total(world.scores, "nll"), total(out, "served_nll")
    assert own.keys() == there.keys()
    assert len(own) > 10
    tokens = pq.read_table(out / "scores.parquet", filters=[("metric", "==", "served_nll")])["n"].to_pylist()
    print(result, sum(own.values()) / sum(tokens))
    assert abs(sum(own.values()) - sum(there.values())) / sum(tokens) < 0.005
    record = json.loads((out / "served.json").read_text())
    print(record)
    assert [line["requests"] for line in record["loads"]] == [1, 8, 32]
