"""docs/security.md: every line of its tables names tests that exist."""

import ast
import re
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[2]
PAGE = CHECKOUT / "docs" / "security.md"
NAMED = re.compile(r"`(tests/[\w/]+\.py)(?:::(\w+))?`")


def named_tests(path: Path) -> set[str]:
    """Names of the tests of a file."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}


def test_every_line_has_its_test():
    rows = [
        line
        for line in PAGE.read_text(encoding="utf-8").splitlines()
        if line.startswith("|") and not line.startswith(("| what", "| ---"))
    ]
    assert len(rows) >= 25
    for row in rows:
        named = NAMED.findall(row.rsplit("|", 2)[1])
        assert named, f"no test: {row}"
        for file, test in named:
            assert (CHECKOUT / file).is_file(), file
            assert not test or test in named_tests(CHECKOUT / file), f"{file}::{test}"


def test_the_site_has_the_page():
    assert "docs/security.md" in (CHECKOUT / "infra" / "mkdocs.yml").read_text(encoding="utf-8")
