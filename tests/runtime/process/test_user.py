"""A user id without a name, a HOME that is unset or cannot be written: what is set for libraries and children."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tasks.runtime.process.launch import CHECKOUT, child_env
from tasks.runtime.process.user import READ, READ_ONLY_HUB, settle_user
from tasks.runtime.store.local import find_home
from tests.flows.tracking.tracked import write_run

UID = 12345
NAMES = ("HOME", "LOGNAME", "USER", "LNAME", "USERNAME")
# The id may read what root's own folders hold, since this Python may lie there; it may write nothing of root's.
AS_UID = ["setpriv", f"--reuid={UID}", f"--regid={UID}", "--clear-groups"]
AS_UID += ["--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search", "--"]
needs_root = pytest.mark.skipif(os.getuid() != 0 or not shutil.which("setpriv"), reason="only root can be another user")

SYNC = """
import getpass, json, os, sys
from flows.cli import main
code = main(["track", "sync"])
import huggingface_hub.constants, mlflow, prefect.settings
print(json.dumps([code, os.getuid(), getpass.getuser(), os.environ["HOME"], huggingface_hub.constants.HF_HUB_CACHE]))
print(json.dumps([run.data.tags["mlflow.user"] for run in mlflow.search_runs(
    search_all_experiments=True, output_format="list", filter_string="tags.`quench.kind` = 'run'")]))
"""


@pytest.fixture
def owned() -> Iterator[Path]:
    """A folder that the id owns, and whose parents it can enter."""
    folder = Path(tempfile.mkdtemp(prefix="quench-user-"))
    os.chown(folder, UID, UID)
    yield folder
    shutil.rmtree(folder)


def python(code: str, home: Path, **more: str) -> subprocess.CompletedProcess[str]:
    """Run a line as the id, which has no entry in the password file, with nothing in its environment that names it."""
    places = ("XDG_CACHE_HOME", "HF_HOME", *READ, *READ_ONLY_HUB)  # other tests of this process may have set them
    env = {name: text for name, text in os.environ.items() if name not in (*NAMES, *places)}
    env |= {"QUENCH_HOME": str(home), "PYTHONPATH": str(CHECKOUT), **more}
    return subprocess.run(
        [*AS_UID, sys.executable, "-c", code], env=env, cwd=home, capture_output=True, text=True, timeout=300
    )


@pytest.mark.slow  # imports Prefect and MLflow
@needs_root
def test_a_user_id_without_a_name_writes_its_run_to_mlflow_below_the_home(owned: Path):
    home = owned / "home"
    write_run(home, status="completed")
    for path in [home, *home.rglob("*")]:
        os.chown(path, UID, UID)
    done = python(SYNC, home)
    assert done.returncode == 0, done.stderr
    own = home / "user"
    *_, state, users = done.stdout.splitlines()
    assert json.loads(state) == [0, UID, str(UID), str(own), str(own / ".cache" / "huggingface" / "hub")]
    assert json.loads(users) == [str(UID)]
    said = f"note: HOME is not set, and user id {UID} has no entry in the password file: caches go below {own}"
    assert done.stderr.count(said) == 1 and own.is_dir()


@needs_root
def test_what_a_read_only_home_holds_is_still_read_and_is_said_once(owned: Path):
    root = owned / "root"
    (root / ".cache" / "huggingface" / "hub").mkdir(parents=True)
    (root / ".aws").mkdir()
    (root / ".aws" / "credentials").touch()
    code = (
        "from pathlib import Path; import json, os\n"
        "from tasks.runtime.process.user import READ, READ_ONLY_HUB, settle_user\n"
        "home = Path(os.environ['QUENCH_HOME'])\n"
        "print(json.dumps([settle_user(home), settle_user(home), dict(os.environ)]))"
    )
    done = python(code, owned, HOME=str(root))
    first, second, env = json.loads(done.stdout)
    assert first == [f"{root} (HOME) cannot be written: caches go below {owned}/user"] and second == []
    assert env["HOME"] == str(owned / "user") and env["LOGNAME"] == str(UID)
    assert env["HF_HUB_CACHE"] == str(root / ".cache" / "huggingface" / "hub") and "HF_HOME" not in env
    assert env["AWS_SHARED_CREDENTIALS_FILE"] == str(root / ".aws" / "credentials") and "NETRC" not in env

    # A volume at .cache/huggingface makes .cache root's; the volume itself is where models are meant to go.
    os.chown(root, UID, UID)
    os.chown(root / ".cache" / "huggingface", UID, UID)
    first, _, env = json.loads(python(code, owned, HOME=str(root)).stdout)
    assert first == [f"{root}/.cache cannot be written: caches go below {owned}/user"]
    assert env["HF_HOME"] == str(root / ".cache" / "huggingface") and "HF_HUB_CACHE" not in env
    first, _, env = json.loads(python(code, owned, HOME=str(root), XDG_CACHE_HOME=str(owned)).stdout)
    assert "HF_HOME" not in env and "HF_HUB_CACHE" not in env


def test_a_home_that_can_be_written_stays(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("HOME", str(tmp_path))
    before = dict(os.environ)
    assert settle_user(tmp_path / "home") == [] and dict(os.environ) == before
    assert not (tmp_path / "home").exists()


def test_children_get_the_home_that_was_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    for name in ("TMPDIR", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, os.environ.get(name, "/tmp"))
    monkeypatch.setenv("HOME", str(tmp_path / "gone"))
    assert settle_user(tmp_path) == [f"HOME ({tmp_path}/gone) is no folder: caches go below {tmp_path}/user"]
    assert child_env()["HOME"] == str(tmp_path / "user") and (tmp_path / "user").is_dir()
    assert settle_user(tmp_path) == []


def test_temporary_files_go_below_the_home_where_nothing_else_can_be_written(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.setattr("tasks.runtime.process.user.TEMPORARY", (str(tmp_path / "no"),))
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("TEMP", "TMP"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TMPDIR", str(tmp_path / "gone"))
    (said,) = settle_user(tmp_path)
    assert said.endswith(f"({tmp_path}/gone, {tmp_path}/no): they go to {tmp_path}/user/tmp")
    assert child_env()["TMPDIR"] == str(tmp_path / "user" / "tmp") and (tmp_path / "user" / "tmp").is_dir()
    assert settle_user(tmp_path) == []


@needs_root
def test_a_quench_home_below_a_home_that_nobody_knows_is_refused(owned: Path):
    done = python("from flows.cli import main; raise SystemExit(main(['store', 'ls']))", owned, QUENCH_HOME="~/quench")
    assert done.returncode == 2 and "QUENCH_HOME begins with ~" in done.stderr, done.stderr


def test_a_quench_home_below_ones_own_home_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("QUENCH_HOME", "~/quench")
    assert find_home() == tmp_path / "quench"
