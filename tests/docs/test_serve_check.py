"""The check of docs/promotion.md that asks for the champion on a schedule: the page's own text, on a real Prefect."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from flows import cli
from tasks.runtime.process.launch import CHECKOUT
from tests.flows.homes.thin import opened

PAGE = (CHECKOUT / "docs" / "promotion.md").read_text(encoding="utf-8")
HOME = CHECKOUT / "tests" / "flows" / "homes" / "layout-1"
(SCRIPT,) = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)


def test_what_it_asks_is_what_the_command_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("QUENCH_HOME", str(opened(HOME, tmp_path / "home")))
    assert '"champion", name, "--json"' in SCRIPT and cli.main(["champion", "small", "--json"]) == 0
    said = capsys.readouterr().out
    assert set(re.findall(r"champion\['(\w+)'\]", SCRIPT)) == {"version", "path", "since"}
    assert all(f'"{key}":' in said for key in ("version", "path", "since"))


@pytest.mark.slow
def test_it_runs_as_a_deployment(prefect_api: str, tmp_path: Path) -> None:
    home = opened(HOME, tmp_path / "home")
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    env = {**os.environ, "QUENCH_HOME": str(home), "PREFECT_API_URL": prefect_api, "PATH": path}
    (tmp_path / "serve_check.py").write_text(SCRIPT.replace("NAME", "small"))
    served = subprocess.Popen([sys.executable, "serve_check.py"], cwd=tmp_path, env=env)
    try:
        words = ["prefect", "deployment", "run", "serve-check/serve-check", "--watch"]
        deadline = time.monotonic() + 120
        while (
            "serve-check"
            not in subprocess.run(
                ["prefect", "deployment", "ls"], env=env, capture_output=True, text=True, check=False
            ).stdout
        ):
            assert time.monotonic() < deadline and served.poll() is None
            time.sleep(1)
        done = subprocess.run(words, env=env, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        asked = [*words, "--param", "name=nobody"]
        done = subprocess.run(asked, env=env, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 1, done.stdout + done.stderr
    finally:
        served.terminate()
        served.wait(60)
