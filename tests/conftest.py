"""One small run a session, made by production code, fills a home that tests read; copied by hard links to change it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from flows.run.server import OwnServer, prefect_settings
from tasks.runtime.process.launch import CHECKOUT, Launcher
from tasks.runtime.store.local import flocked

# One thread a child and one slot a run: xdist -n 2 has two of them on two cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
QUICKSTART = CHECKOUT / "recipes" / "quickstart"
UNUSUAL = "Öfen & Töpfe 窯"
HANGS_S = 1800  # ends what hangs: the small run takes two minutes on idle cores, four times that on slow ones
ROWS = 700  # of the quickstart's 6,000: enough for 128 calibration rows and some 80 test rows


@dataclass(frozen=True, kw_only=True)
class World:
    """A home, a recipe that was run in it, and how to run `quench` there."""

    home: Path
    recipe: Path
    api: str

    @property
    def env(self) -> dict[str, str]:
        """Environment of a `quench` process in this world."""
        return {
            **os.environ,
            "QUENCH_HOME": str(self.home),
            "PREFECT_API_URL": self.api,
            "QUENCH_CPU_SLOTS": "1",
            "COLUMNS": "160",
        }

    def argv(self, *words: str) -> list[str]:
        """`quench WORDS` as this Python runs it."""
        return [sys.executable, "-m", "flows.cli", *words]

    def quench(self, *words: str, check: int | None = 0) -> subprocess.CompletedProcess[str]:
        """Run `quench WORDS` to its end; assert the exit code unless `check` is None."""
        done = subprocess.run(
            self.argv(*words), env=self.env, cwd=self.home.parent, capture_output=True, text=True, timeout=HANGS_S
        )
        assert check is None or done.returncode == check, f"{done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    def plan(self, *words: str) -> dict[str, bool]:
        """Key -> hit, as `quench plan` says."""
        lines = json.loads(self.quench("plan", str(self.recipe), "--json", *words).stdout)
        return {line["key"]: line["hit"] for line in lines}

    def steps(self, run: str = "latest") -> dict[str, dict[str, object]]:
        """steps.json of a run, by key."""
        raw = json.loads((self.home / "runs" / run / "steps.json").read_text())
        return {one["key"]: one for one in raw["steps"]}

    def report(self) -> dict[str, dict[str, object]]:
        """report.json of the latest run."""
        return json.loads((self.home / "runs" / "latest" / "report.json").read_text())

    def drop(self, stage: str, slug: str = "*") -> None:
        """Delete a stage's artifacts from the store."""
        found = list((self.home / "store" / stage).glob(f"{slug}-*"))
        assert found, f"nothing to drop: {stage}/{slug}"
        for folder in found:
            shutil.rmtree(folder)


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """A folder that all xdist workers of this session see."""
    base = tmp_path_factory.getbasetemp()
    return base if worker_id == "master" else base.parent


@pytest.fixture(scope="session")
def prefect_api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A Prefect server on loopback for this process's tests; it dies with the process."""
    home = tmp_path_factory.mktemp("prefect")
    with pytest.MonkeyPatch.context() as patch, Launcher() as launcher:
        patch.delenv("PREFECT_API_URL", raising=False)
        for name, value in prefect_settings(home).items():
            patch.setenv(name, value)
        server = OwnServer(home, launcher)
        server.start()
        server.wait()
        yield server.api


def write_small_recipe(folder: Path) -> Path:
    """A recipe of the quickstart's real parts, cut to seconds: few rows, 8 steps, RTN and one GPTQ."""
    folder.mkdir(parents=True)
    rows = (QUICKSTART / "data" / "sql.jsonl").read_text(encoding="utf-8").splitlines()[:ROWS]
    (folder / "rows.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    general = (QUICKSTART / "data" / "general.jsonl").read_text(encoding="utf-8").splitlines()[:16]
    (folder / "general.jsonl").write_text("\n".join(general) + "\n", encoding="utf-8")
    path = folder / "recipe.yaml"
    path.write_text(
        f"""
name: small
model: {{base: {QUICKSTART / "base"}}}
data: {{path: rows.jsonl, general: general.jsonl, domain: family, group: group, max_length: 192}}
train: {{rank: 8, learning_rate: 2.0e-3, batch_size: 16, max_steps: 8, checkpoint_steps: 2}}
calibrate: {{rows: 128, seq_len: 512}}
quantize: {{schemes: [gptq-w4-g128, rtn-w4-g128]}}
evaluate:
  scorers: [{{kind: sql-execution, databases: {QUICKSTART / "data" / "databases"}}}]
  max_new_tokens: 40
  batch_size: 50
  null_arms: [batch]
measure: {{prompt_tokens: 16, new_tokens: 4}}
""",
        encoding="utf-8",
    )
    return path


@pytest.fixture(scope="session")
def small(shared: Path, prefect_api: str) -> World:
    """The session's small run, finished. Read only: tests that change it take `world`."""
    # Spaces and letters beyond ASCII: what is tested on this run and on its copies is tested on such a home.
    world = World(home=shared / "small" / UNUSUAL, recipe=shared / "small" / "project" / "recipe.yaml", api=prefect_api)
    with flocked(shared / "small.lock"):
        if not (world.home / "runs" / "latest").exists():
            write_small_recipe(world.recipe.parent)
            world.home.mkdir(parents=True)
            world.quench("run", str(world.recipe))
    return world


@pytest.fixture
def world(small: World, tmp_path: Path) -> World:
    """A copy of the small run's home to work in: the store by hard links, databases by copy."""

    def link(source: str, target: str) -> None:
        os.link(source, target)

    home = tmp_path / UNUSUAL
    shutil.copytree(small.home / "store", home / "store", copy_function=link)
    shutil.copytree(small.home / "runs", home / "runs", symlinks=True)
    return World(home=home, recipe=small.recipe, api=small.api)
