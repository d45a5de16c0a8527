"""The store: two keys for a hit, manifest last, nothing finished is lost, damage is seen."""

import multiprocessing
import shutil
import threading
from pathlib import Path

import pytest

from tasks.runtime.store.local import Artifact, LostRaceError, Store, find_home, read_json
from tests.runtime.store.machine import PRINT, manifest, written


def make(
    store: Store, text: str, *, inputs: dict[str, str], fingerprint: str = PRINT, stage: str = "train"
) -> Artifact:
    return written(store, {"weights.txt": text.encode()}, inputs=inputs, fingerprint=fingerprint, stage=stage)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "home with spaces äö")


def test_a_hit_needs_the_print_and_the_inputs(store: Store):
    assert store.find("train", PRINT, {"base": "1"}).why == "not made yet"
    made = make(store, "x", inputs={"base": "1"})
    assert store.find("train", PRINT, {"base": "1"}).artifact == made
    assert store.find("train", PRINT, {"base": "2"}).why == "input was remade: base"
    assert store.find("train", "cd" * 32, {"base": "1"}).artifact is None


def test_a_remade_input_keeps_the_old_artifact_beside_the_new_one(store: Store):
    old = make(store, "x", inputs={"base": "1"})
    new = make(store, "y", inputs={"base": "2"})
    assert old.folder != new.folder
    assert store.find("train", PRINT, {"base": "1"}).artifact == old
    assert store.find("train", PRINT, {"base": "2"}).artifact == new


def test_digest_follows_the_files_and_not_the_clock(store: Store):
    first = make(store, "x", inputs={"base": "1"})
    second = make(store, "x", inputs={"base": "2"})
    third = make(store, "y", inputs={"base": "3"})
    assert first.digest == second.digest != third.digest


def test_files_are_read_only_and_partial_is_gone(store: Store):
    made = make(store, "x", inputs={})
    assert (made.path / "weights.txt").stat().st_mode & 0o222 == 0
    assert not any(store.partial.rglob("*.txt"))
    assert made.manifest["attempts"] == 1


def test_a_missing_or_short_file_is_no_hit_and_is_made_again(store: Store):
    made = make(store, "x", inputs={})
    (made.path / "weights.txt").unlink()
    assert store.find("train", PRINT, {}).why == "damaged: weights.txt is missing"
    again = make(store, "x", inputs={})
    assert again.folder == made.folder
    assert list((store.home / "damaged").iterdir())


def test_verify_reads_the_bytes(store: Store):
    made = make(store, "x", inputs={})
    (made.path / "weights.txt").chmod(0o644)
    (made.path / "weights.txt").write_text("z")
    assert store.find("train", PRINT, {}).artifact is not None  # sizes are equal
    assert "another sha256" in str(store.damage(made.folder, made.manifest, digests=True))


def test_unfinished_work_is_not_a_result_and_attempts_are_counted(store: Store):
    for _ in range(3):
        attempt = store.begin("train", "tiny", PRINT, inputs={"base": "1"})
        (attempt.files / "half.txt").write_text("x")
    assert attempt.number == 3
    assert store.find("train", PRINT, {"base": "1"}).artifact is None
    assert make(store, "x", inputs={"base": "1"}).manifest["attempts"] == 4
    assert "half.txt" not in read_json(next(store.manifests()))["files"]


def test_checkpoint_stays_for_the_same_inputs_only(store: Store):
    attempt = store.begin("train", "tiny", PRINT, inputs={"base": "1"})
    (attempt.checkpoint / "step-10").write_text("x")
    again = store.begin("train", "tiny", PRINT, inputs={"base": "1"})
    assert (again.checkpoint / "step-10").exists()
    other = store.begin("train", "tiny", PRINT, inputs={"base": "2"})
    assert not (other.checkpoint / "step-10").exists()


def test_the_first_of_two_commits_wins(store: Store):
    mine = store.begin("train", "tiny", PRINT, inputs={})
    (mine.files / "weights.txt").write_text("mine")
    make(Store(store.home), "theirs", inputs={})
    with pytest.raises((LostRaceError, FileNotFoundError)):
        store.commit(mine, manifest({}))
    assert (store.find("train", PRINT, {}).artifact.path / "weights.txt").read_text() == "theirs"


def test_what_was_finished_but_not_renamed_is_taken_up(store: Store, monkeypatch: pytest.MonkeyPatch):
    attempt = store.begin("train", "tiny", PRINT, inputs={"base": "1"})
    (attempt.files / "weights.txt").write_text("x")
    with monkeypatch.context() as patch:  # a kill between manifest and rename
        patch.setattr(Path, "rename", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            store.commit(attempt, manifest({"base": "1"}))
    assert store.find("train", PRINT, {"base": "1"}).artifact is None
    assert store.take_up("train", "tiny", PRINT, inputs={"base": "2"}) is None
    taken = store.take_up("train", "tiny", PRINT, inputs={"base": "1"})
    assert taken is not None and taken == store.find("train", PRINT, {"base": "1"}).artifact
    assert taken.manifest["attempts"] == 1


def test_a_view_of_one_moment_sees_nothing_later_and_the_store_does(store: Store):
    view = store.snapshot()
    assert view.find("train", PRINT, {"base": "1"}).why == "not made yet"
    made = make(store, "x", inputs={"base": "1"})
    assert view.find("train", PRINT, {"base": "1"}).artifact is None
    for later in (store, store.snapshot()):
        assert later.find("train", PRINT, {"base": "1"}).artifact == made


def test_what_goes_after_it_was_listed_is_not_made(store: Store):
    make(store, "x", inputs={"base": "1"})
    view = store.snapshot()
    assert view.find("train", PRINT, {"base": "1"}).artifact is not None
    shutil.rmtree(store.root / "train")
    assert view.find("train", PRINT, {"base": "1"}).why == "not made yet"
    assert view.nearest("train", "tiny", {"version": 2}) == []


def test_a_choice_stands_for_what_it_names(store: Store):
    model = make(store, "x", inputs={}, stage="merge")
    attempt = store.begin("choose", "tiny", "ef" * 32, inputs={"dequantized": model.digest})
    (attempt.files / "choice.json").write_text('{"candidate": "dequantized"}')
    raw = manifest({"dequantized": model.digest}, "ef" * 32, "choose")
    raw["inputs"]["dequantized"]["path"] = str(model.path.relative_to(store.home))
    choice = store.commit(attempt, raw)
    assert (choice.digest, choice.path) == (model.digest, model.path)
    assert choice.fingerprint == "ef" * 32


def _hold(home: Path, ready: "multiprocessing.synchronize.Event") -> None:
    with Store(home).lock("train", PRINT):
        ready.set()
        threading.Event().wait(60)


def test_a_dead_owners_lock_is_free(store: Store):
    store.home.mkdir(parents=True)
    ready = multiprocessing.Event()
    owner = multiprocessing.Process(target=_hold, args=(store.home, ready))
    owner.start()
    assert ready.wait(20)
    stop = threading.Event()
    stop.set()
    with pytest.raises(InterruptedError), store.lock("train", PRINT, stop=stop):
        pass
    owner.kill()
    owner.join()
    with store.lock("train", PRINT, stop=stop):
        pass


def test_home_is_found_by_walking_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("QUENCH_HOME", raising=False)
    (tmp_path / ".quench").mkdir()
    below = tmp_path / "a" / "b"
    below.mkdir(parents=True)
    assert find_home(below) == tmp_path / ".quench"
    monkeypatch.setenv("QUENCH_HOME", str(tmp_path / "other"))
    assert find_home(below) == tmp_path / "other"
