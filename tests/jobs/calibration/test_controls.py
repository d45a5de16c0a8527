"""Control calibration sets: the shape of the run's own, other text in it, the same bytes every time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from transformers import AutoTokenizer

from tasks.jobs import prepare
from tasks.jobs.calibration import controls
from tasks.runtime.process.errors import StageError
from tests.jobs.build import make_job, write_jsonl
from tests.jobs.test_prepare import PARAMS, questions
from tests.jobs.test_quantize import write_calibset
from tests.tiny import write_base

LENGTHS = (96, 80, 96, 61, 90, 77)
TEXTS = [f"the sky over hill {i} is blue and wide" for i in range(40)]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("controls")
    base = write_base(folder / "base")
    evaluated = write_jsonl(folder / "general.jsonl", [{"text": "a text that is evaluated"}])
    data = write_jsonl(folder / "rows.jsonl", questions(60))
    job = make_job("prepare", folder / "dataset", params=PARAMS, data=data, tokenizer=base, general=evaluated)
    prepare.run(job)
    return {
        "dataset": folder / "dataset",
        "calibset": write_calibset(folder / "calibset", lengths=LENGTHS),
        "general": write_jsonl(folder / "texts.jsonl", [{"text": text} for text in TEXTS]),
    }


def made(kind: str, inputs: dict[str, Path], out: Path, seed: int = 0) -> list[dict[str, Any]]:
    controls.run(make_job("calibrate", out, params={"kind": kind, "seed": seed}, **inputs))
    return pq.read_table(out / "calibset.parquet").to_pylist()


@pytest.mark.parametrize("kind", ["generic", "mixed", "random"])
def test_it_has_the_shape_of_the_own_set_and_the_same_bytes_twice(
    kind: str, inputs: dict[str, Path], tmp_path: Path
) -> None:
    sequences = made(kind, inputs, tmp_path / "a")
    assert tuple(len(sequence["input_ids"]) for sequence in sequences) == LENGTHS
    made(kind, inputs, tmp_path / "b")
    assert made(kind, inputs, tmp_path / "c", seed=1) != sequences
    first, second = ((tmp_path / name / "calibset.parquet").read_bytes() for name in "ab")
    assert first == second
    assert (tmp_path / "a" / "preview.md").read_text().count("## ") == 5


def test_generic_text_is_all_texts_joined(inputs: dict[str, Path], tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(inputs["dataset"] / "tokenizer")
    sequences = made("generic", inputs, tmp_path / "out")
    texts = tokenizer.decode([id for sequence in sequences for id in sequence["input_ids"]]).split(tokenizer.eos_token)
    assert set(texts[:-1]) <= set(TEXTS) and len(set(texts)) == len(texts)
    assert any(text.startswith(texts[-1]) for text in TEXTS)
    assert {len(name) for sequence in sequences for name in sequence["rows"]} == {16}


def test_mixed_keeps_every_second_sequence(inputs: dict[str, Path], tmp_path: Path) -> None:
    own = pq.read_table(inputs["calibset"] / "calibset.parquet").to_pylist()
    mixed = made("mixed", inputs, tmp_path / "out")
    assert [one == other for one, other in zip(own, mixed, strict=True)] == [True, False] * 3
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert (summary["own_sequences"], summary["own_tokens"]) == (3, 96 + 96 + 90)


def test_random_ids_are_uniform_without_special_tokens(inputs: dict[str, Path], tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(inputs["dataset"] / "tokenizer")
    ids = [id for one in made("random", inputs, tmp_path / "out") for id in one["input_ids"]]
    assert not set(ids) & set(tokenizer.all_special_ids)
    size = len(tokenizer) - len(tokenizer.all_special_ids)
    expected = size * (1 - (1 - 1 / size) ** len(ids))  # distinct ids among so many uniform draws
    assert len(set(ids)) == pytest.approx(expected, rel=0.1)  # three standard deviations are 8 %


def test_texts_that_are_evaluated_and_too_few_are_refused(inputs: dict[str, Path], tmp_path: Path) -> None:
    leaking = write_jsonl(tmp_path / "leaking.jsonl", [{"text": "a text  that is evaluated"}, {"text": "another"}])
    with pytest.raises(StageError, match=r"1 texts of calibrate\.general are in data\.general"):
        made("generic", inputs | {"general": leaking}, tmp_path / "out")
    few = write_jsonl(tmp_path / "few.jsonl", [{"text": "a few words"}])
    with pytest.raises(StageError, match="500 are needed"):
        made("generic", inputs | {"general": few}, tmp_path / "short")
