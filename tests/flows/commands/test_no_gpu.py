"""`cuda` on a machine without a GPU: every command that would need one says so at once, and waits for nothing."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.recipes.folders import write_project

LIMIT_S = 60  # a command that waits for a lease never ends; this one takes 2 s


def quench(*words: str, home: Path) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "QUENCH_HOME": str(home), "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [sys.executable, "-P", "-m", "flows.cli", *words],
        capture_output=True,
        text=True,
        env=env,
        check=False,
        timeout=LIMIT_S,
    )


@pytest.mark.parametrize("command", ["run", "evaluate", "plan"])
def test_a_recipe_that_wants_cuda(command: str, tmp_path: Path):
    recipe = write_project(tmp_path / "project")
    done = quench(command, str(recipe), "--set", "run.device=cuda", home=tmp_path / "home")
    assert done.returncode == 2 and "A GPU is wanted" in done.stderr and "run.device" in done.stderr
    assert not (tmp_path / "home").exists()


def test_quantize_with_cuda(tmp_path: Path):
    write_project(tmp_path / "project")
    base, out = tmp_path / "project" / "base", tmp_path / "out"
    words = ("quantize", str(base), str(out), "--scheme", "rtn-w4-g128", "--device", "cuda")
    done = quench(*words, home=tmp_path / "home")
    assert done.returncode == 2 and "A GPU is wanted" in done.stderr and "where: --device" in done.stderr
    assert not out.exists()


def test_check_warns_and_passes(tmp_path: Path):
    """The recipe may be meant for another machine."""
    recipe = write_project(tmp_path / "project")
    done = quench("check", str(recipe), "--set", "run.device=cuda", home=tmp_path / "home")
    assert done.returncode == 0 and "warning: A GPU is wanted" in done.stdout
