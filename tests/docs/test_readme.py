"""README.md is a front page: what does not fit goes to docs/."""

from pathlib import Path

MOST_LINES = 120


def test_the_front_page_is_short():
    lines = (Path(__file__).resolve().parents[2] / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= MOST_LINES
