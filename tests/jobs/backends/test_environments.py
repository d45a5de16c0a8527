"""The quantize job and each backend can be imported where they run: their environments have other transformers."""

from __future__ import annotations

import subprocess

import pytest

from tasks.quantize import ENVIRONMENTS
from tasks.runtime.process.environments import environment_problem, interpreter
from tasks.runtime.process.launch import child_env


def installed(backend: str, name: str) -> object:
    problem = environment_problem(name)
    missing = pytest.mark.skipif(problem is not None, reason=str(problem and problem.next))
    return pytest.param(backend, name, marks=(pytest.mark.slow, missing), id=backend)


@pytest.mark.parametrize(("backend", "name"), [installed(*pair) for pair in ENVIRONMENTS.items()])
def test_the_job_and_the_backend_are_imported(backend: str, name: str) -> None:
    code = f"import tasks.jobs.quantize, tasks.jobs.backends.{backend.replace('-', '_')}"
    argv = [str(interpreter(name)), "-P", "-c", code]
    done = subprocess.run(argv, env=child_env(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
