"""`quench init` with rows of any columns: what it proposes, what can be said, what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from flows.commands.init import init
from recipes.problem import RecipeError
from recipes.read.load import load
from tests.recipes.folders import write_rows
from tests.tiny import write_base

ROWS = 300


def write(folder: Path, row: dict[str, str], **more: Any) -> tuple[Path, Path]:
    """A base, and a file of rows whose texts hold their number."""
    rows = [{name: text.format(number) for name, text in row.items()} | more for number in range(ROWS)]
    return write_base(folder / "base"), write_rows(folder / "rows.jsonl", rows)


def test_names_that_the_field_uses_are_proposed_and_said(tmp_path: Path):
    base, rows = write(
        tmp_path, {"question": "what is {} ?", "context": "a number", "answer": "it is {}", "url": "u{}"}
    )
    written = init(str(base), rows, out=tmp_path / "recipe.yaml")
    assert written.notes["turns"] == (
        'columns: {prompt: "{question}\\n\\n{context}", completion: answer}, proposed by their names'
    )
    assert written.notes["not used"] == "url"
    data = load(written.path).recipe.data
    assert dict(data.columns) == {"prompt": "{question}\n\n{context}", "completion": "answer"}
    text = written.path.read_text(encoding="utf-8")
    assert 'columns: {prompt: "{question}\\n\\n{context}", completion: answer} # proposed by their names' in text
    assert "# Not used: url." in text


def test_what_rows_mean_can_be_said(tmp_path: Path):
    base, rows = write(tmp_path, {"frage": "what is {} ?", "antwort": "it is {}", "thema": "x"}, good=True)
    with pytest.raises(RecipeError) as refused:
        init(str(base), rows, out=tmp_path / "recipe.yaml")
    assert "--set 'data.columns={prompt: COLUMN, completion: COLUMN}'" in str(refused.value)
    assert "`frage`" in str(refused.value)
    sets = ["data.columns={prompt: frage, completion: antwort, domain: thema}", "data.keep.good=true"]
    written = init(str(base), rows, out=tmp_path / "recipe.yaml", sets=sets)
    data = load(written.path).recipe.data
    assert data.domain_column == "domain" and dict(data.keep) == {"good": True}
    assert "not used" not in written.notes
    assert load(written.path).recipe.data.group is None


def test_preferences_are_refused_with_the_words_that_init_takes(tmp_path: Path):
    base, rows = write(tmp_path, {"prompt": "what is {} ?", "chosen": "it is {}", "rejected": "no {}"})
    with pytest.raises(RecipeError, match=r"--set 'data.columns=\{completion: chosen\}'"):
        init(str(base), rows, out=tmp_path / "recipe.yaml")
    written = init(str(base), rows, out=tmp_path / "recipe.yaml", sets=["data.columns={completion: chosen}"])
    assert written.notes["not used"] == "rejected"


@pytest.mark.parametrize("item", ["train.rank=3", "data.dev=0.2", "data.columns.propt=a", "data.columns.prompt={", "x"])
def test_what_init_cannot_take_is_refused(tmp_path: Path, item: str):
    base, rows = write(tmp_path, {"prompt": "what is {} ?", "completion": "it is {}"})
    with pytest.raises(RecipeError) as refused:
        init(str(base), rows, out=tmp_path / "recipe.yaml", sets=[item])
    assert item.partition("=")[0] in str(refused.value) and not (tmp_path / "recipe.yaml").exists()


def test_the_written_lines_are_yaml_that_says_the_same(tmp_path: Path):
    base, rows = write(tmp_path, {"My question": "what is {} ?", "answer: long": "it is {}"})
    columns = {"prompt": "My question", "completion": "answer: long"}
    written = init(str(base), rows, out=tmp_path / "recipe.yaml", sets=[f"data.columns={json.dumps(columns)}"])
    assert dict(load(written.path).recipe.data.columns) == columns
