"""docs/recipe.md and docs/schemes.md are what the schema and the schemes say."""

from pathlib import Path

import pytest

from flows.commands import docs
from recipes.read.complaints import fields


def test_the_pages_in_the_tree_are_current():
    for name, text in docs.pages().items():
        assert (docs.DOCS / name).read_text(encoding="utf-8") == text, "run `python -m flows.commands.docs`"


def test_every_field_is_documented():
    page, known = docs.recipe_page(), fields()
    assert len(known) > 50
    for name, text in known.items():
        assert text, f"{name} has no string under it"
        assert f"`{name.rpartition('.')[2]}`" in page or f"## {name}" in page, name


def test_check_says_what_is_stale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(docs, "DOCS", tmp_path)
    assert docs.main([]) == 0 and docs.main(["--check"]) == 0
    (tmp_path / "recipe.md").write_text("old")
    assert docs.main(["--check"]) == 1
    assert "docs/recipe.md is not current" in capsys.readouterr().err


def test_a_cell_holds_bars_and_angles():
    assert docs.table_cell("a | b, tasks/<stage>.py, >= 1, < 2, `x`") == r"a \| b, tasks/&lt;stage>.py, >= 1, < 2, `x`"
    assert docs.table_cell(r"`\d|x`") == "<code>&#92;d&#124;x</code>"
