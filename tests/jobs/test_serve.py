"""serve: a real engine gives the losses and answers that the arm's own evaluation gave, and leaves nothing running."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pyarrow.parquet as pq
import pytest
from safetensors.torch import load_file, save_file

from tasks.jobs import evaluate, prepare, serve
from tasks.jobs.serve_file import write_serve_file
from tasks.runtime.process.environments import environment_problem, interpreter
from tasks.runtime.process.errors import StageError
from tasks.runtime.process.job import Job
from tasks.runtime.process.launch import child_env
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
    "speed": None,
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
    return serve.run(serve_job(world, out, model=model, **changed))


def serve_job(world: World, out: Path, *, model: Path | None = None, **changed: Any) -> Job:
    params = PARAMS | changed
    model = model or world.model
    job = make_job("serve", out, params=params, model=model, dataset=world.dataset, scores=world.scores)
    return replace(job, execution=replace(job.execution, server_python=str(interpreter("vllm"))))


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


def own_and_served(world: World, out: Path) -> tuple[list[float], list[float]]:
    """Loss of each row of test, nats a token: as it was measured, and as the engine says."""
    own, there = total(world.scores, "nll"), total(out, "served_nll")
    assert own.keys() == there.keys() and len(own) > 20
    table = pq.read_table(out / "scores.parquet", filters=[("metric", "==", "served_nll")])
    tokens = dict(zip(table["row"].to_pylist(), table["n"].to_pylist(), strict=True))
    rows = sorted(own)
    return [own[row] / tokens[row] for row in rows], [there[row] / tokens[row] for row in rows]


@needs_engine
@pytest.mark.slow
def test_the_engine_says_what_was_measured(world: World, tmp_path: Path, nothing_left: None) -> None:
    out = tmp_path / "out"
    result = served(world, out, speed={"prompt_tokens": 32, "new_tokens": 4, "repeats": 5})
    own, there = own_and_served(world, out)
    apart = [abs(a - b) for a, b in zip(own, there, strict=True)]
    print(max(apart), sum(own) / len(own), sum(there) / len(there), result)
    assert max(apart) < 0.01  # bf16 of a random model, whose logits are near 0; 0.005 to 0.010 of a trained one
    record = json.loads((out / "served.json").read_text())
    print(record)
    assert [line["requests"] for line in record["loads"]] == [1, 8, 32]
    for line in record["loads"]:
        assert len(line["output_tokens_per_s"]) == 5 and min(line["output_tokens_per_s"]) > 0
        assert len(line["ttft_s"]) == 5 * line["requests"]
    assert record["start_s"] > 1 and record["resident_gib"] > 0.5 and "$PWD" in record["command"]
    assert str(tmp_path) not in json.dumps(record)
    answers = pq.read_table(out / "answers.parquet").to_pylist()
    print(
        [(line["own"], line["served"]) for line in answers][:10], sum(line["equal"] for line in answers), len(answers)
    )
    assert sum(line["equal"] for line in answers) / len(answers) > 0.8


@needs_engine
@pytest.mark.slow
def test_other_weights_are_seen(world: World, tmp_path: Path, nothing_left: None) -> None:
    damaged = shutil.copytree(world.model, tmp_path / "damaged")
    weights = load_file(damaged / "model.safetensors")
    name = next(name for name in weights if name.endswith("layers.0.mlp.down_proj.weight"))
    weights[name] = weights[name] * 1.5
    save_file(weights, damaged / "model.safetensors", metadata={"format": "pt"})
    served(world, tmp_path / "out", model=damaged)
    own, there = own_and_served(world, tmp_path / "out")
    assert max(abs(a - b) for a, b in zip(own, there, strict=True)) > 0.02


@needs_engine
@pytest.mark.slow
def test_an_engine_that_dies_at_its_start_says_why(world: World, tmp_path: Path, nothing_left: None) -> None:
    broken = shutil.copytree(world.model, tmp_path / "broken")
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(config | {"vocab_size": config["vocab_size"] + 64}))
    with pytest.raises(StageError) as refused:
        served(world, tmp_path / "out", model=broken)
    problem = refused.value.problem
    print(problem)
    assert problem.what == "the engine ended while it started"
    assert "AssertionError" in problem.why or "size" in problem.why
    assert "serve.engine: none" in problem.next


def test_a_broken_file_is_named_before_a_start(world: World, tmp_path: Path) -> None:
    broken = shutil.copytree(world.model, tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(StageError) as refused:
        served(world, tmp_path / "out", model=broken)
    assert refused.value.problem.what == "A weight file is truncated or broken."


@needs_engine
@pytest.mark.slow
def test_a_killed_job_leaves_no_engine(world: World, tmp_path: Path) -> None:
    job = replace(serve_job(world, tmp_path / "out"), slug="killed")
    job.dump(tmp_path / "job.json")
    words = [sys.executable, "-P", "-m", "tasks.runtime.process.child", "run", str(tmp_path / "job.json")]
    log = (tmp_path / "log.txt").open("wb")
    child = subprocess.Popen(words, env=child_env(), stdout=log, stderr=log, start_new_session=True)
    wait_for(lambda: len(engines("killed")) > 2)
    child.kill()
    child.wait()
    wait_for(lambda: not engines("killed"), limit_s=20)


def engines(slug: str) -> list[list[str]]:
    """Command lines of the processes in the session of a server that was started under this name."""
    named = [process for process in psutil.process_iter(["cmdline"]) if slug in (process.info["cmdline"] or [])]
    groups = {os.getpgid(process.pid) for process in named if process.is_running()}
    return [process.info["cmdline"] or [] for process in psutil.process_iter(["cmdline"]) if _group(process) in groups]


def _group(process: psutil.Process) -> int | None:
    try:
        return os.getpgid(process.pid)
    except ProcessLookupError:
        return None


def wait_for(holds: Callable[[], bool], limit_s: float = 300) -> None:
    deadline = time.monotonic() + limit_s
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def test_a_context_that_is_too_short_is_refused_before_a_start(world: World, tmp_path: Path) -> None:
    with pytest.raises(StageError) as refused:
        served(world, tmp_path / "out", max_model_len=16)
    assert refused.value.problem.where == "serve.max_model_len"


def test_a_file_that_no_command_serves_is_refused_with_its_reason(world: World, tmp_path: Path) -> None:
    model = shutil.copytree(world.model, tmp_path / "model")
    described = json.loads((model / "serve.json").read_text())
    problem = {"what": "vLLM does not read it.", "where": "x", "why": "Because.", "next": "Write gptq-w4-g128."}
    described["vllm"] |= {"command": None, "refused": [problem]}
    (model / "serve.json").write_text(json.dumps(described))
    with pytest.raises(StageError) as refused:
        served(world, tmp_path / "out", model=model)
    assert refused.value.problem.as_dict() == problem
