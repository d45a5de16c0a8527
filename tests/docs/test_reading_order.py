"""docs/reading-order.md: some twenty files that exist, at most 7,000 lines in all."""

import re
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[2]
MOST_LINES = 7000  # what somebody reads in a day


def test_reading_order():
    page = (CHECKOUT / "docs" / "reading-order.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+) \| `([^`]+)` \| .+ \|$", page, re.MULTILINE)
    files = [name for _, name in rows]
    assert [int(number) for number, _ in rows] == list(range(1, len(rows) + 1))
    assert 18 <= len(files) == len(set(files)) <= 26 and f"These {len(files)} files" in page
    lines = {name: len((CHECKOUT / name).read_text(encoding="utf-8").splitlines()) for name in files}
    print(f"\ndocs/reading-order.md: {len(files)} files, {sum(lines.values())} lines of at most {MOST_LINES}")
    assert sum(lines.values()) <= MOST_LINES, lines
