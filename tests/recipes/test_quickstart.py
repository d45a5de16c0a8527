"""The quickstart's model and data are what its README says."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path

import pytest

from recipes.data.rows import Row, read_rows, side
from recipes.models.headers import read_headers
from recipes.read.load import load
from tasks.jobs.text.leaks import HeldOut, near_twins
from tests.conftest import QUICKSTART
from tests.jobs.build import make_job

RECIPE = load(QUICKSTART / "recipe.yaml").recipe
NEAR_TWIN = 0.9  # Jaccard similarity of word 5-grams, as in the leak check that calibration is held to


@pytest.fixture(scope="module")
def sides() -> dict[str, list[Row]]:
    data, by_side = RECIPE.data, defaultdict(list)
    read = read_rows(QUICKSTART / data.path, required=(data.group, data.domain))
    assert not read.problems
    for row in read.rows:
        split = side(str(row.columns[data.group]), salt=data.salt, dev=data.dev, test=data.test)
        by_side[split].append(row)
    return by_side


def grams(row: Row) -> frozenset[tuple[str, ...]]:
    words = re.findall(r"\w+|[^\w\s]", " ".join(turn["content"] for turn in row.messages).lower())
    return frozenset(zip(*(words[start:] for start in range(5)), strict=False))


def test_no_test_question_is_a_near_twin_of_another_sides(sides: dict[str, list[Row]]):
    known = [grams(row) for name in ("train", "dev") for row in sides[name]]
    holders = defaultdict(list)
    for number, each in enumerate(known):
        for gram in each:
            holders[gram].append(number)
    highest = 0.0
    for row in sides["test"]:
        own = grams(row)
        shared = Counter(number for gram in own for number in holders.get(gram, ()))
        highest = max([highest, *(n / (len(own) + len(known[i]) - n) for i, n in shared.items())])
    print(f"highest similarity: {highest:.2f}")
    assert 0 < highest < NEAR_TWIN


def test_the_leak_check_of_calibration_passes_at_its_default(sides: dict[str, list[Row]], tmp_path: Path):
    """All of train, where a run draws 256 rows."""
    splits = {row.where: name for name in ("dev", "test") for row in sides[name]}
    held = HeldOut(splits, {row.where: row.messages for name in ("dev", "test") for row in sides[name]})
    drawn = {row.where: row.messages for row in sides["train"]}
    job = make_job("calibrate", tmp_path / "out", params={})
    assert near_twins(drawn, held, most=RECIPE.calibrate.max_near_duplicates, job=job) == 0
    assert len(drawn) > 4000 and len(splits) > 1000


def test_there_are_enough_rows_of_every_family(sides: dict[str, list[Row]]):
    families = Counter(str(row.columns[RECIPE.data.domain]) for row in sides["test"])
    assert len(families) == 10 and min(families.values()) >= 30 and sum(families.values()) >= 300
    assert {json.dumps(row.messages) for row in sides["test"]}.isdisjoint(
        json.dumps(row.messages) for name in ("train", "dev") for row in sides[name]
    )


def test_the_generator_writes_the_same_bytes_again(tmp_path: Path):
    for name in ("make_data.py", "domain.yaml"):
        shutil.copyfile(QUICKSTART / name, tmp_path / name)
    subprocess.run([sys.executable, tmp_path / "make_data.py"], check=True, stdout=subprocess.DEVNULL)
    written = sorted(path.relative_to(tmp_path) for path in (tmp_path / "data").rglob("*") if path.is_file())
    assert len(written) == 4
    for path in written:
        assert (tmp_path / path).read_bytes() == (QUICKSTART / path).read_bytes(), path


def test_the_base_is_small_bf16_and_legal_for_every_group_size():
    base = QUICKSTART / RECIPE.model.base
    headers = read_headers(base)
    assert 4e6 <= headers.parameters <= 10e6
    assert sum(path.stat().st_size for path in base.iterdir()) <= 16e6
    assert all(layer.in_features % 128 == 0 for layer in headers.linears)
    assert json.loads((base / "config.json").read_text())["model_type"] == "llama"
    assert "{%- generation" in (base / "chat_template.jinja").read_text()
