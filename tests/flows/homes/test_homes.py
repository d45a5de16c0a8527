"""Homes that other versions of Quench wrote: this one reads each as it was, and says what it cannot read.

tests/flows/homes/layout-N is a home as the version wrote it that began with layout N, layout-N.json what it said then.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flows import cli
from flows.promotion.journal import JOURNAL, Journal, champion
from flows.promotion.promote import model_name, promote, roll_back
from flows.run.server import serving
from recipes.problem import RecipeError
from tasks.runtime.store.home import LAYOUT
from tests.conftest import World
from tests.flows.homes.answers import MODEL, answers, flat, runs_of
from tests.flows.homes.thin import opened

HOMES = sorted(path for path in Path(__file__).parent.glob("layout-*") if path.is_dir())
NEWER = {"of_a_newer_quench": {"some": ["thing"]}}
# Keys are names there, so that an unknown one says something.
BY_NAME = ("inputs", "files", "identity", "params", "documents", "parts", "versions")
CLOSED = "recipe.resolved.json"  # an unknown field may change what was meant: refused


@pytest.fixture(params=HOMES, ids=lambda path: path.name)
def place(request: pytest.FixtureRequest) -> Path:
    return request.param


@pytest.fixture
def home(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy; the registry is a view and has its own tests."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    home = opened(place, tmp_path / "home")
    monkeypatch.setenv("QUENCH_HOME", str(home))
    return home


def same(told: dict[str, Any], place: Path) -> None:
    """Every figure is what it was when the home was written."""
    expected = json.loads(place.with_suffix(".json").read_text(encoding="utf-8"))
    now = json.loads(json.dumps(flat(told)))
    assert now.keys() == expected.keys()
    for name, value in expected.items():
        wanted = pytest.approx(value, rel=1e-6, abs=1e-9) if isinstance(value, float) else value
        assert now[name] == wanted, name


def test_there_is_a_home_of_this_layout_and_they_are_small() -> None:
    assert f"layout-{LAYOUT}" in [path.name for path in HOMES]
    for path in HOMES:
        assert sum(file.lstat().st_size for file in path.rglob("*") if file.is_file()) < 200 * 1024


def test_it_says_what_it_said_then(home: Path, place: Path) -> None:
    same(answers(home), place)


def test_decisions_go_on_in_it_and_its_own_lines_stay(home: Path) -> None:
    before = (home / JOURNAL).read_bytes()
    again = promote(runs_of(home)[1], home, say=lambda _: None)
    assert again.event == "nothing" and (home / JOURNAL).read_bytes() == before
    assert roll_back(home, MODEL, 1, say=lambda _: None).event == "rolled back"
    after = (home / JOURNAL).read_bytes()
    assert after.startswith(before) and after.count(b"\n") == before.count(b"\n") + 1
    lines = [json.loads(line) for line in after.splitlines()]
    assert lines[-1].keys() >= lines[0].keys()  # an older Quench finds every field that it wrote itself
    now = champion(Journal(home, MODEL).lines())
    assert now is not None and now.version == 1


@pytest.mark.slow
def test_mlflow_is_written_from_it(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert cli.main(["track", "sync", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["written"] == [run.name for run in runs_of(home)]
    assert cli.main(["track", "sync", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["written"] == []


# ---- of a newer Quench: unknown keys, and numbers that are higher


def json_files(home: Path) -> Iterator[Path]:
    """Every JSON file that Quench wrote, but for what jobs wrote into an artifact, which its manifest seals."""
    yield from (path for path in sorted(home.rglob("*.json")) if "files" not in path.relative_to(home).parts)


def with_unknown_keys(value: Any, name: str = "") -> Any:
    if isinstance(value, list):
        return [with_unknown_keys(entry) for entry in value]
    if not isinstance(value, dict) or name in BY_NAME:
        return value
    if name == "result":  # figures of a job: some of its keys are names
        return value | NEWER
    return {key: with_unknown_keys(entry, key) for key, entry in value.items()} | ({} if name == "steps" else NEWER)


def test_unknown_keys_change_nothing(home: Path, place: Path) -> None:
    touched = [path for path in json_files(home) if path.name not in (CLOSED, "digests.json")]
    kinds = {re.sub(r"[0-9a-f]{16}", "ROWS", path.name) for path in touched}
    assert kinds >= {
        "manifest.json",
        "steps.json",
        "preflight.json",
        "registered.json",
        "promotion.json",
        "retrain.json",
    }
    assert kinds >= {"up.json", "job.json", "result.json", "train_rows.json", "ROWS.json"}
    for path in touched:
        path.write_text(json.dumps(with_unknown_keys(json.loads(path.read_text()))))
    lines = [json.loads(line) | NEWER for line in (home / JOURNAL).read_text().splitlines()]
    (home / JOURNAL).write_text("".join(json.dumps(line) + "\n" for line in lines))
    same(answers(home), place)
    assert promote(runs_of(home)[1], home, say=lambda _: None).event == "nothing"
    assert serving(home) == []  # up.json of a `quench up` that does not answer


@pytest.mark.parametrize("name", ["manifest.json", "steps.json", "registered.json", "retrain.json", "job.json"])
def test_a_higher_number_is_refused_in_words(home: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [path for path in json_files(home) if path.name == name]
    assert paths
    for path in paths:
        path.write_text(json.dumps({**json.loads(path.read_text()), "schema": 2}))
    asked = {
        "registered.json": ["report", runs_of(home)[0].name],
        "job.json": ["debug", "--run", runs_of(home)[2].name],
        "retrain.json": None,
    }
    if words := asked.get(name, ["store", "du"]):
        assert cli.main(words) == 2
        said = capsys.readouterr().err
    else:
        from flows.retrain.flow import RetrainOptions, last

        with pytest.raises(RecipeError) as caught:
            last(home, RetrainOptions(recipe=Path("recipe.yaml"), sets=[], promote=True))
        said = str(caught.value)
    assert "schema 2; this Quench reads schema 1" in said and str(home) in said and "Traceback" not in said


def test_a_higher_layout_and_an_unknown_field_of_a_recipe_are_refused(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = runs_of(home)[0]
    raw = json.loads((run / CLOSED).read_text())
    (run / CLOSED).write_text(json.dumps({**raw, "train": {**raw["train"], **NEWER}}))
    with pytest.raises(RecipeError, match="another version of Quench"):
        model_name(run)
    assert cli.main(["promote", run.name]) == 2
    assert "another version of Quench" in capsys.readouterr().err
    (home / "layout").write_text("2\n")
    for words in (
        ["champion"],
        ["report"],
        ["store", "gc"],
        ["store", "du"],
        ["debug"],
        ["track", "sync"],
        ["promote"],
    ):
        assert cli.main(words) == 2
        assert "this QUENCH_HOME has layout '2'" in capsys.readouterr().err


# ---- and back: what an older Quench reads is still written


def keys_of(home: Path) -> dict[str, set[str]]:
    """Kind of file -> dotted keys that every file of the kind has."""
    common: dict[str, set[str]] = {}
    for path in json_files(home):
        keys = {key for key in _keys(json.loads(path.read_text())) if not any(part in key for part in BY_NAME)}
        common[path.name] = common[path.name] & keys if path.name in common else keys
    return common


def _keys(value: Any, name: str = "") -> Iterator[str]:
    if isinstance(value, list) and value and isinstance(value[0], dict):
        each = [set(_keys(entry, f"{name}[]")) for entry in value]
        yield from set.intersection(*each)
    elif isinstance(value, dict):
        for key, entry in value.items():
            yield f"{name}.{key}"
            if key not in ("steps", "hardware", "versions", "result") or isinstance(entry, list):
                yield from _keys(entry, f"{name}.{key}")


@pytest.mark.parametrize(
    "name", ["manifest.json", "steps.json", "preflight.json", "registered.json", "recipe.resolved.json"]
)
def test_no_key_of_an_older_home_is_gone_from_what_is_written_now(place: Path, small: World, name: str) -> None:
    assert keys_of(place)[name] - keys_of(small.home)[name] == set()
