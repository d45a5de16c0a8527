"""Makes a home as this Quench leaves one, small enough for the tree: `python -m tests.flows.homes.make WORK DEST`.

WORK gets the whole home: five runs of a recipe with 200 rows by the real commands, three decisions, a step that failed.
It takes some ten minutes. DEST gets the same home without weights and pages (tests/flows/homes/thin.py). A version that
changes what a home looks like, and still reads older ones, adds a home beside those; none is ever written again.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from flows.run.server import OwnServer, prefect_settings
from tasks.runtime.process.launch import CHECKOUT, Launcher
from tests.conftest import QUICKSTART
from tests.flows.homes.thin import thin

ROWS = 200
RECIPE = f"""
name: small
model: {{base: {QUICKSTART.relative_to(CHECKOUT) / "base"}}}
data: {{path: rows.jsonl, general: general.jsonl, domain: family, group: group, max_length: 192}}
train: {{rank: 8, learning_rate: 2.0e-3, batch_size: 16, max_steps: 4, checkpoint_steps: 2}}
calibrate: {{rows: 60, seq_len: 512, allow_unusual_size: a home for tests has few rows}}
quantize: {{schemes: [rtn-w4-g128]}}
evaluate:
  scorers: [{{kind: sql-execution, databases: {QUICKSTART.relative_to(CHECKOUT) / "data" / "databases"}}}]
  max_new_tokens: 48
  batch_size: 50
  null_arms: []
  reference_gib: 0.05
measure: {{enabled: false}}
gate: {{task: 0.5, domain_task: 0.5, loss: 2.0, general_loss: 2.0, better_than_base: false}}
promote: {{prefer: rtn-w4-g128}}
"""
RETRAIN = "from flows.retrain.flow import retrain; retrain(recipe={!r}, sets={!r}, return_state=True)"


def make(work: Path) -> Path:
    """Run everything below `work`; returns the home."""
    home, recipe = work / "home", work / "recipe.yaml"
    for name, count in (("sql", ROWS), ("general", 8)):
        rows = (QUICKSTART / "data" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()[:count]
        out = work / ("rows.jsonl" if name == "sql" else "general.jsonl")
        out.write_text("\n".join(rows) + "\n", encoding="utf-8")
    recipe.write_text(RECIPE.replace(str(QUICKSTART.relative_to(CHECKOUT)), str(QUICKSTART)), encoding="utf-8")
    home.mkdir()
    with Launcher() as launcher:
        server = OwnServer(home, launcher)
        server.start()
        server.wait()
        env = {**os.environ, **prefect_settings(home), "QUENCH_HOME": str(home), "PREFECT_API_URL": server.api}

        def quench(*words: str, code: int = 0) -> None:
            done = subprocess.run([sys.executable, "-m", "flows.cli", *words], env=env, cwd=CHECKOUT, check=False)
            assert done.returncode == code, words

        quench("run", str(recipe))
        quench("promote")
        sets = ["promote.prefer=merged-dequantized"]
        retrain = RETRAIN.format(str(recipe), sets)
        subprocess.run([sys.executable, "-c", retrain], env=env, cwd=CHECKOUT, check=True)
        strict = ("--set", "promote.prefer=merged-original", "--set", "gate.better_than_base=true")
        quench("run", str(recipe), *strict)
        quench("promote", code=1)
        quench("run", str(recipe), "--set", "evaluate.max_new_tokens=16", code=1)
    return home


if __name__ == "__main__":
    work, dest = map(Path, sys.argv[1:])
    work.mkdir(parents=True, exist_ok=True)
    home = make(work.resolve())
    thin(home, dest, without=sorted(path.name for path in (home / "runs").iterdir())[2])
