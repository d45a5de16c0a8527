"""One's own model and data: `quench init`, then `check` and `run`, with no edit of the file."""

import json
import random
from pathlib import Path

import pytest

from tests.conftest import World
from tests.tiny import write_base


@pytest.mark.slow
def test_a_second_architecture_from_init_to_report(prefect_api: str, tmp_path: Path):
    write_base(tmp_path / "qwen", architecture="qwen3", chat_template="plain")
    draw = random.Random(0)
    rows = []
    for _ in range(400):
        a, b = draw.randrange(1000), draw.randrange(1000)
        rows.append({"prompt": f"What is {a} plus {b}?", "completion": f"{a} plus {b} is {a + b}."})
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    world = World(home=tmp_path / "home", recipe=tmp_path / "recipe.yaml", api=prefect_api)
    world.home.mkdir()
    said = world.quench("init", "--model", "qwen", "--data", "sums.jsonl").stdout
    assert "prompt-completion" in said and said.strip().endswith("quench run recipe.yaml")
    world.quench("check", "recipe.yaml", "--data")
    world.quench("run", "recipe.yaml")
    report = world.report()
    made = {slug: arm for slug, arm in report["arms"].items() if ".null-" not in slug}  # two threads need two cores
    assert {arm["status"] for arm in made.values()} == {"ok"}
    assert len(made) >= 6
