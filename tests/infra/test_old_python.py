"""`make install` with a Python that is too old says so before it installs anything."""

import shutil
import subprocess
import sys
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[2]


def test_make_install_refuses_an_old_python(tmp_path: Path):
    for name in ("Makefile", "pyproject.toml", "infra/locks/main.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(CHECKOUT / name, tmp_path / name)
    old = tmp_path / "python3.10"
    pretend = "import sys; sys.version_info = (3, 10, 13); exec(sys.argv[1])"
    old.write_text(f"#!/bin/sh\nexec {sys.executable} -c '{pretend}' \"$2\"\n")
    old.chmod(0o755)
    done = subprocess.run(
        ["make", "install", f"PYTHON={old}"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2 and "Quench needs Python 3.11 or newer" in done.stderr and "is 3.10" in done.stderr
    assert not (tmp_path / ".venv").exists()
