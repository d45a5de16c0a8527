"""The site's build, as `make site` and `make check` run it, fails on a dead link and on a dead anchor."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[2]
READ = ("docs", "infra/pages", "infra/mkdocs.yml", "infra/README.md", "README.md", "recipes/quickstart/README.md")


def test_a_dead_link_ends_the_build(tmp_path: Path):
    for name in (
        "docs",
        "infra/pages",
        "recipes/quickstart/README.md",
        "README.md",
        "infra/README.md",
        "infra/mkdocs.yml",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        if (CHECKOUT / name).is_dir():
            shutil.copytree(CHECKOUT / name, tmp_path / name, symlinks=True)
        else:
            shutil.copy(CHECKOUT / name, tmp_path / name)
    with (tmp_path / "docs" / "hub.md").open("a", encoding="utf-8") as page:
        page.write("\n[a page](nowhere.md), [an anchor](report.md#nowhere)\n")
    commands = re.findall(
        r"^\t\$\(MKDOCS\) (build .+)$", (CHECKOUT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert len(commands) == 2 and len(set(commands)) == 1, "make check and make site build it in the same way"
    command = [sys.executable, "-m", "mkdocs", *commands[0].split()]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "Aborted with 2 warnings in strict mode" in done.stdout, done.stderr
    assert "nowhere.md" in done.stderr and "report.md#nowhere" in done.stderr
