"""QUENCH_HOME: refused in four parts where it cannot be written or read, and no clock decides anything in it."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from flows.run.folder import RunRecord, find_run, new_id
from recipes.problem import RecipeError
from recipes.read.load import load
from tasks.runtime.process.launch import CHECKOUT
from tasks.runtime.process.leases import Leases
from tasks.runtime.store.home import LAYOUT, NAME, open_home
from tasks.runtime.store.local import Store, find_home, locked_now
from tests.runtime.store.test_local import PRINT, make

PAST, FUTURE = 0, 4102444800  # 1970, 2100


def quench(home: Path, *words: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "QUENCH_HOME": str(home)}
    argv = [sys.executable, "-m", "flows.cli", *words]
    return subprocess.run(argv, env=env, cwd=CHECKOUT, capture_output=True, text=True, timeout=120)


def test_a_home_is_made_once_and_opened_again(tmp_path: Path):
    home = tmp_path / "Öfen & Töpfe 窯" / "home"
    for _ in range(2):
        open_home(home)
    assert [path.name for path in home.iterdir()] == [NAME]
    assert (home / NAME).read_text() == f"{LAYOUT}\n"


@pytest.mark.parametrize("words", [("run", "recipes/quickstart/recipe.yaml"), ("up",), ("track", "sync")])
def test_a_home_below_a_file_is_refused(tmp_path: Path, words: tuple[str, ...]):
    (tmp_path / "file").write_text("x")
    refused = quench(tmp_path / "file" / "home", *words)
    assert refused.returncode == 2, refused.stderr
    assert "QUENCH_HOME cannot be written" in refused.stderr and "Not a directory" in refused.stderr


def test_a_home_that_is_a_file_is_refused(tmp_path: Path):
    (tmp_path / "home").write_text("x")
    with pytest.raises(RecipeError, match="it is a file"):
        open_home(tmp_path / "home")


@pytest.mark.parametrize(("layout", "whose"), [(str(LAYOUT - 1), "an older"), (str(LAYOUT + 1), "a newer")])
def test_a_home_of_another_layout_is_refused_by_what_writes_and_by_what_reads(tmp_path: Path, layout: str, whose: str):
    make(Store(tmp_path), "x", inputs={})
    (tmp_path / NAME).write_text(f"{layout}\n")
    with pytest.raises(RecipeError, match=f"{whose} Quench wrote it"):
        open_home(tmp_path)
    refused = quench(tmp_path, "store", "ls")
    assert refused.returncode == 2 and f"layout '{layout}'" in refused.stderr and "set QUENCH_HOME" in refused.stderr


def test_a_home_from_before_the_number_is_taken_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    made = make(Store(tmp_path), "x", inputs={})
    monkeypatch.setenv("QUENCH_HOME", str(tmp_path))
    assert find_home() == tmp_path
    open_home(tmp_path)
    assert Store(tmp_path).find("train", PRINT, {}).artifact == made


@pytest.mark.parametrize("when", [PAST, FUTURE])
def test_times_of_files_decide_nothing(tmp_path: Path, when: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("QUENCH_CPU_SLOTS", "1")
    store = Store(tmp_path)
    made = make(store, "x", inputs={"base": "1"})
    attempt = store.begin("merge", "tiny", PRINT, inputs={"base": "1"})
    (attempt.checkpoint / "step-10").write_text("x")
    stop = threading.Event()
    stop.set()
    with store.lock("train", PRINT), Leases(tmp_path).take(1), locked_now(tmp_path / "up.lock") as ours:
        assert ours
        for path in tmp_path.rglob("*"):
            os.utime(path, (when, when))
        assert store.find("train", PRINT, {"base": "1"}).artifact == made
        assert store.damage(made.folder, made.manifest, digests=True) is None
        with pytest.raises(InterruptedError), store.lock("train", PRINT, stop=stop):
            pass
        with pytest.raises(InterruptedError), Leases(tmp_path).take(1, stop=stop):
            pass
        with locked_now(tmp_path / "up.lock") as second:
            assert not second
    with store.lock("train", PRINT, stop=stop), Leases(tmp_path).take(1, stop=stop):
        pass
    assert (store.begin("merge", "tiny", PRINT, inputs={"base": "1"}).checkpoint / "step-10").exists()


def test_latest_is_the_last_run_though_the_clock_went_back(tmp_path: Path):
    loaded = load(CHECKOUT / "recipes" / "quickstart" / "recipe.yaml")
    ahead = RunRecord(tmp_path, loaded, id="21000101-000000-quickstart-aaaa")
    ahead.finish("completed")
    ahead.publish()
    now = RunRecord(tmp_path, loaded, id=new_id("quickstart"))
    now.finish("completed")
    now.publish()
    assert now.id < ahead.id and find_run(tmp_path, None) == now.folder
    assert find_run(tmp_path, ahead.id[:4]) == ahead.folder
    assert len({new_id("quickstart") for _ in range(20)}) == 20  # also within one second


def test_damage_is_moved_aside_as_often_as_there_is_some(tmp_path: Path):
    store = Store(tmp_path)
    for _ in range(3):
        made = make(store, "x", inputs={})
        (made.path / "weights.txt").unlink()
    make(store, "x", inputs={})
    assert len(list((tmp_path / "damaged").iterdir())) == 3
