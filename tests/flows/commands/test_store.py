"""What no run and no promotion reaches can go, and nothing else goes."""

import datetime as dt
import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest

from flows.commands.store import collect
from flows.commands.store_du import measure
from flows.reach import unreached
from tasks.runtime.store.local import Artifact, Store, flocked


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """Two chains train -> quantize, each named by a run, and one artifact of nobody."""
    store = Store(tmp_path)
    for name in ("one", "two", "none"):
        made = commit(store, "quantize", name, inputs={"model": commit(store, "train", name, inputs={})})
        if name != "none":
            write_run(tmp_path, name, [str(made.folder.relative_to(tmp_path)), None])
    return tmp_path


def commit(store: Store, stage: str, name: str, *, inputs: dict[str, Artifact]) -> Artifact:
    fingerprint = hashlib.sha256(f"{stage}/{name}".encode()).hexdigest()
    digests = {role: one.digest for role, one in inputs.items()}
    attempt = store.begin(stage, name, fingerprint, inputs=digests)
    (attempt.files / "weights.txt").write_text(f"{stage}/{name}")
    named = {
        role: {"fingerprint": one.fingerprint, "digest": one.digest, "path": str(one.path.relative_to(store.home))}
        for role, one in inputs.items()
    }
    manifest = {"stage": stage, "slug": name, "fingerprint": fingerprint, "inputs": named, "identity": {}, "result": {}}
    return store.commit(attempt, manifest)


def write_run(home: Path, name: str, paths: list[str | None]) -> None:
    folder = home / "runs" / name
    folder.mkdir(parents=True)
    (folder / "steps.json").write_text(json.dumps({"steps": [{"path": path} for path in paths]}))


def names(home: Path) -> list[str]:
    """Stage and slug of what is unreached."""
    return sorted(one.name.rsplit("-", 1)[0] for one in unreached(home))


def test_inputs_of_what_a_run_names_are_reached(home: Path):
    assert names(home) == ["quantize/none", "train/none"]


def test_nothing_goes_before_yes_and_then_only_the_unreached(home: Path):
    answer = collect(home, remove=False)
    told, text = answer.json, str(answer.text)
    assert told["removed"] == [] and len(told["unreached"]) == 2 and "--yes" in text
    before = {path for path in (home / "store").rglob("*")}
    told = collect(home, remove=True).json
    assert sorted(told["removed"]) == sorted(one["name"] for one in told["unreached"])
    gone = before - {path for path in (home / "store").rglob("*")}
    assert gone and all(path.relative_to(home / "store").parts[1].startswith("none-") for path in gone)
    assert names(home) == []
    assert collect(home, remove=True).json == {"unreached": [], "removed": []}


def test_a_removed_run_frees_what_it_alone_had(home: Path):
    shutil.rmtree(home / "runs" / "two")
    assert names(home) == ["quantize/none", "quantize/two", "train/none", "train/two"]


def test_a_promotion_keeps_its_artifact_and_what_it_was_made_from(home: Path):
    shutil.rmtree(home / "runs" / "two")
    (made,) = (home / "store" / "quantize").glob("two-*")
    line = json.dumps({"path": f"store/quantize/{made.name}"})
    (home / "promotions.jsonl").write_text(f'{line}\n{{"path": "sto')  # the last line was cut off by a kill
    assert names(home) == ["quantize/none", "train/none"]


def test_the_champions_scores_of_a_run_are_kept(home: Path):
    made = commit(Store(home), "evaluate", "champion", inputs={})
    champion = {"evaluate": str(made.folder.relative_to(home))}
    for name, said in (("one", champion), ("two", None)):
        (home / "runs" / name / "promotion.json").write_text(json.dumps({"champion": said}))
    assert names(home) == ["quantize/none", "train/none"]
    shutil.rmtree(home / "runs" / "one")
    assert "evaluate/champion" in names(home)


def test_a_step_under_way_keeps_its_artifact(home: Path):
    (folder,) = (home / "store" / "train").glob("none-*")
    manifest = json.loads((folder / "manifest.json").read_text())
    with flocked(Store(home).lock_file("train", manifest["fingerprint"])):
        told = collect(home, remove=True).json
    assert [one.split("/")[0] for one in told["removed"]] == ["quantize"]
    assert folder.exists()


def test_what_takes_the_room_and_what_keeps_it(home: Path):
    """Links count once; what gc would free is what gc says, before and after a run is removed."""
    (home / "mlartifacts").mkdir()
    (linked,) = (home / "store" / "train").glob("two-*/files/*")
    os.link(linked, home / "mlartifacts" / "linked")
    (made,) = (home / "store" / "quantize").glob("one-*")
    line = {"path": f"store/quantize/{made.name}", "model": "m", "version": 1}
    (home / "promotions.jsonl").write_text(json.dumps(line) + "\n")
    (home / "runs" / "latest").symlink_to("two")
    answer = measure(home)
    told, text = answer.json, str(answer.text)
    every = {path.stat().st_ino: path.stat().st_size for path in home.rglob("*") if path.is_file()}
    assert told["bytes"] == sum(every.values()) and told["elsewhere"]["mlartifacts"] == 0
    assert {name: line["artifacts"] for name, line in told["stages"].items()} == {"train": 3, "quantize": 3}
    assert {name: line["artifacts"] for name, line in told["kept_by"].items()} == {"both": 2, "runs": 2, "nothing": 2}
    assert told["promotions"]["m/1"]["artifacts"] == told["runs"]["one"]["artifacts"] == 2
    assert told["runs"]["one"]["alone"] == 0 < told["runs"]["two"]["gc_frees"] < told["runs"]["two"]["alone"]
    free = sum(one.free for one in unreached(home))
    assert told["gc_frees"] == free > 0 and f"rm -r {home}/runs/two" in text and "quench store gc --yes frees" in text
    shutil.rmtree(home / "runs" / "two")
    assert sum(one.free for one in unreached(home)) == free + told["runs"]["two"]["gc_frees"]
    assert measure(home).json["gc_frees"] == free + told["runs"]["two"]["gc_frees"]


def test_the_room_by_age(home: Path):
    now = dt.datetime(2026, 12, 31, tzinfo=dt.UTC)
    for name, finished in (("one", "2026-12-30T00:00:00+00:00"), ("two", "2025-01-01T00:00:00+00:00")):
        (path,) = (home / "store" / "train").glob(f"{name}-*/manifest.json")
        path.write_text(json.dumps({**json.loads(path.read_text()), "finished_at": finished}))
    for path in (home / "store").glob("*/*/manifest.json"):  # without a time of their own: that of the file
        os.utime(path, (now.timestamp() - 40 * 86_400, now.timestamp() - 40 * 86_400))
    ages = measure(home, now=now).json["ages"]
    assert {age: line["artifacts"] for age, line in ages.items()} == {"up to 7 days": 1, "up to 90 days": 4, "older": 1}
    assert list(ages) == ["up to 7 days", "up to 90 days", "older"]


def test_no_home_and_an_empty_one_are_empty(tmp_path: Path):
    for home in (tmp_path, tmp_path / "none"):
        assert measure(home).json["bytes"] == 0 and "empty" in str(measure(home).text)


def test_bytes_that_mlflow_links_are_not_called_free(home: Path):
    (file,) = (home / "store" / "train").glob("none-*/files/*")
    os.link(file, home / "linked")
    one = next(one for one in unreached(home) if one.name.startswith("train/"))
    assert one.linked == one.size == file.stat().st_size > 0
