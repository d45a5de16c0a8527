"""`quench debug`: a step that failed is repeated with its own environment, in a terminal, and leaves the run alone."""

from __future__ import annotations

import json
import os
import pty
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from flows.commands.debug import command, find_attempt, repeated
from flows.commands.terminal import Output
from recipes.problem import RecipeError
from tasks.runtime.process.errors import StepFailed
from tasks.runtime.process.launch import CHECKOUT, Launcher
from tasks.runtime.process.leases import Leases
from tasks.runtime.process.repeat import STARTED
from tasks.runtime.step import Context, External, Step, run_step
from tasks.runtime.store.local import Store

RUN = "20261130-120000-tiny-ab12"
WHAT = "KeyError: 'dequantized_scores'"
SECRET = "hf_" + "a" * 34


@pytest.fixture(scope="module")
def failed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with a run whose only step, a `choose` of two models without scores, ended in a KeyError."""
    home = tmp_path_factory.mktemp("home") / "with 'spaces'"
    model = home / "model"
    model.mkdir(parents=True)
    one = External(name="model", path=model, digest="d" * 64, source="here")
    inputs = {"dequantized": one, "original": replace(one, digest="e" * 64)}
    step = Step(stage="choose", slug="tiny", entry="tasks.jobs.choose:run", version=1, params={}, inputs=inputs)
    with pytest.MonkeyPatch.context() as patch, Launcher() as launcher:
        patch.setenv("ONLY_THERE", "it's there")
        patch.setenv("HF_TOKEN", SECRET)
        patch.setenv("INNOCENT", f"login {SECRET}")
        context = Context(store=Store(home), launcher=launcher, leases=Leases(home))
        with pytest.raises(StepFailed) as caught:
            run_step(step, {name: source.artifact for name, source in inputs.items()}, context)
    error = caught.value
    assert f"quench debug '{home}/partial/" in str(error).replace("'\"'\"'", "'").replace("'\\''", "'"), str(error)
    record = {"key": step.key, "stage": "choose", "slug": "tiny", "fingerprint": step.fingerprint, "path": None}
    record |= {"status": "failed", "log": error.log, "problem": error.problem.as_dict(), "node": None}
    skipped = record | {"key": "quantize/late", "status": "skipped", "log": None, "fingerprint": "0" * 64}
    folder = home / "runs" / RUN
    folder.mkdir(parents=True)
    (folder / "steps.json").write_text(json.dumps({"id": RUN, "steps": [record, skipped]}))
    (home / "runs" / "latest").symlink_to(RUN)
    return home


@pytest.fixture
def home(failed: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("QUENCH_HOME", str(failed))
    return failed


def ask(step: str | None = None, *, run: str | None = None) -> Output:
    import argparse

    return command(argparse.Namespace(step=step, run=run, go=False, pdb=False))


def test_the_line_repeats_the_job_with_its_environment_and_without_secrets(home: Path) -> None:
    before = sorted((path, path.stat().st_mtime_ns) for path in (home / "partial").rglob("*"))
    told = ask().json
    assert (told["step"], told["run"], told["problem"]["what"]) == (
        "choose/tiny",
        RUN,
        "KeyError: 'dequantized_scores'",
    )
    assert told["env_kept"] and told["env"]["ONLY_THERE"] == "it's there" and told["env"]["OMP_NUM_THREADS"]
    assert "HF_TOKEN" not in told["env"] and "INNOCENT" not in told["env"] and SECRET not in json.dumps(told)
    record = Path(told["attempt"]) / STARTED
    assert SECRET not in record.read_text() and record.stat().st_mode & 0o077 == 0
    plain = {"PATH": os.environ["PATH"], "ONLY_HERE": "1"}
    for _ in range(2):  # it can be repeated
        done = subprocess.run(["sh", "-c", told["line"]], env=plain, capture_output=True, text=True, check=False)
        assert done.returncode == 1 and "KeyError: 'dequantized_scores'" in done.stderr, done.stderr
    answer = json.loads((Path(told["folder"]) / "result.json").read_text())
    assert answer["problem"]["what"] == "KeyError: 'dequantized_scores'"
    assert sorted((path, path.stat().st_mtime_ns) for path in (home / "partial").rglob("*")) == before
    assert not (home / "store").exists()


def test_what_differs_from_this_terminal_is_in_the_line(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = ask("tiny", run=RUN[:8]).json
    monkeypatch.setenv("ONLY_THERE", "it's there")
    assert "ONLY_THERE" in told["line"] and "ONLY_THERE" not in ask("choose/tiny").json["line"]
    monkeypatch.setenv("ONLY_HERE", "1")
    monkeypatch.setenv("QUENCH_PASSWORD", "hidden and long")
    line = ask().json["line"]
    assert "-u ONLY_HERE" in line and "-u QUENCH_PASSWORD" in line and "hidden and long" not in line


def test_the_folder_of_an_attempt_does_without_a_run_and_without_a_record(home: Path) -> None:
    attempt = Path(ask().json["attempt"])
    kept = (attempt / STARTED).read_text()
    (attempt / STARTED).unlink()
    try:
        told = ask(str(attempt)).json
        assert told["run"] is None and not told["env_kept"] and told["python"] == sys.executable
        assert ask(str(attempt / "job.json")).json["step"] == "choose/tiny"
    finally:
        (attempt / STARTED).write_text(kept)


def problem(home: Path, step: str | None, run: str | None = None) -> str:
    with pytest.raises(RecipeError) as caught:
        repeated(home, find_attempt(home, step, run))
    return str(caught.value)


def test_what_cannot_be_repeated_is_said(home: Path) -> None:
    assert "quench debug choose/tiny" in problem(home, "choose/tinny")
    assert "No child was started" in problem(home, "late")
    assert "0 runs are called" in problem(home, "tiny", "2027")
    (home / "model").rename(home / "moved")
    try:
        said = problem(home, None)
        assert "The input dequantized of choose/tiny is gone." in said and "quench run" in said
    finally:
        (home / "moved").rename(home / "model")
    attempt = Path(ask().json["attempt"])
    whole = (attempt / "job.json").read_text()
    try:
        (attempt / "job.json").write_text(json.dumps({**json.loads(whole), "schema": 2}))
        assert "schema 2; this Quench reads schema 1" in problem(home, "tiny")
    finally:
        (attempt / "job.json").write_text(whole)
    aside = attempt.with_name("aside")
    attempt.rename(aside)
    try:
        assert "Nothing of choose/tiny is left" in problem(home, "tiny")
        stored = home / "store" / "choose" / attempt.parent.name
        shutil.copytree(aside, stored / "attempt-7")  # a later run made it, and the attempts went with it
        assert find_attempt(home, "tiny", None).folder == stored / "attempt-7"
        shutil.rmtree(home / "store")
    finally:
        aside.rename(attempt)


# ---- in a terminal


def typed(home: Path, *words: str, script: str, env: dict[str, str] | None = None) -> Iterator[str]:
    """`quench debug WORDS` on a terminal of its own, in which `script` is typed; yields output and exit code."""
    here = {**os.environ, "QUENCH_HOME": str(home), "TERM": "dumb", "COLUMNS": "200", **(env or {})}
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(CHECKOUT)
        os.execve(sys.executable, [sys.executable, "-m", "flows.cli", "debug", *words], here)
    said, sent, deadline = b"", False, time.monotonic() + 120
    while time.monotonic() < deadline:
        try:
            said += os.read(terminal, 4096)
        except OSError:  # the other side has ended
            break
        if b"(Pdb) " in said and not sent:
            os.write(terminal, script.encode())
            sent = True
    yield said.decode()
    yield str(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))


def test_pdb_opens_where_it_raises(home: Path) -> None:
    said, code = typed(home, "choose/tiny", "--pdb", script="p 'name of the job:', job.slug\nq\n")
    assert "KeyError: 'dequantized_scores'" in said and "('name of the job:', 'tiny')" in said and code == "1", said


def test_breakpoint_reads_from_the_terminal(home: Path, tmp_path: Path) -> None:
    """A body that stops at breakpoint(), as somebody would write it into a job; the copy of job.json names it."""
    body = "def run(job):\n    answer = 41\n    breakpoint()\n    return {'answer': answer}\n"
    (tmp_path / "stops.py").write_text(body)
    attempt = Path(ask().json["attempt"])
    shutil.copytree(attempt, tmp_path / "attempt-1")
    job = json.loads((attempt / "job.json").read_text())
    (tmp_path / "attempt-1" / "job.json").write_text(json.dumps({**job, "entry": "stops:run"}))
    record = json.loads((attempt / STARTED).read_text())
    record["env"]["PYTHONPATH"] += f":{tmp_path}"
    (tmp_path / "attempt-1" / STARTED).write_text(json.dumps(record))
    said, code = typed(home, str(tmp_path / "attempt-1"), "--go", script="answer = 42\nc\n")
    assert "stops.py(" in said and code == "0", said
    assert json.loads((home / "debug" / "choose-tiny" / "result.json").read_text())["result"] == {"answer": 42}
