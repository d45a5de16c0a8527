"""The record of promotions: order, versions, a line cut short, two promotions at once, a registry that is lost."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlflow
import pytest
from mlflow.tracking import MlflowClient

from flows.promotion.journal import Journal, Promotion, challenger, champion, locked, version_of, versions
from flows.promotion.promote import model_name, promote, roll_back
from flows.tracking.tracker import tracking_uri
from recipes.problem import RecipeError
from tasks.runtime.fingerprint import file_digest, fingerprint
from tasks.runtime.store.open import open_store
from tests.flows.synthetic_run import BASE, SHAPES, SyntheticRun
from tests.mlflow_server import mlflow_server
from tests.s3_server import s3_server, wire

SHAPED = {name: SHAPES[name] for name in ("base", "nf4-adapter", "merged-dequantized", "merged-original")}
SHAPED["gptq-w4-g128"] = replace(SHAPES["gptq-w4-g128"], task=0.905)


def line(version: int, event: Any, **more: Any) -> Promotion:
    own: dict[str, Any] = {"outcome": "pass", "model": "m", "digest": f"{version}" * 64, "champion": None}
    named = {name: name for name in ("at", "run", "arm", "kind", "path", "recipe", "dataset")}
    return Promotion(**{**named, **own, "version": version, "event": event, **more})


# ---- the journal


def test_the_champion_follows_promotions_and_rollbacks() -> None:
    lines = [line(1, "promoted"), line(2, "blocked"), line(3, "promoted"), line(1, "rolled back")]
    found = [champion(lines[:n]) for n in range(5)]
    assert [one and one.version for one in found] == [None, 1, 1, 3, 1]
    assert [one and one.version for one in (challenger(lines[:n]) for n in range(5))] == [None, None, 2, None, None]
    assert {number: one.event for number, one in versions(lines).items()} == {
        1: "promoted",
        2: "blocked",
        3: "promoted",
    }


def test_equal_bytes_are_one_version() -> None:
    lines = [line(1, "promoted"), line(2, "blocked")]
    assert version_of(lines, "2" * 64) == 2
    assert version_of(lines, "9" * 64) == 3
    assert version_of([], "9" * 64) == 1
    twice = [*lines, line(2, "promoted"), line(2, "blocked")]  # judged again on other rows: what it once passed stands
    assert versions(twice)[2].event == "promoted"


def test_a_line_cut_short_is_not_read_and_is_cut_off(tmp_path: Path) -> None:
    journal = Journal(tmp_path, "m")
    journal.append(line(1, "promoted"))
    whole = journal.path.read_bytes()
    journal.path.write_bytes(whole + b'{"model": "m", "version": 2, "even')
    assert [one.version for one in journal.lines()] == [1]
    journal.append(line(3, "promoted"))
    assert [one.version for one in journal.lines()] == [1, 3]
    assert journal.path.read_bytes().startswith(whole) and journal.path.read_bytes().count(b"\n") == 2


def test_models_have_champions_of_their_own(tmp_path: Path) -> None:
    for model in ("m", "other"):
        Journal(tmp_path, model).append(line(1, "promoted", model=model))
    assert len(Journal(tmp_path, "m").lines()) == 1
    assert Journal(tmp_path, "third").lines() == []


# ---- a run whose champion is the first


def real(folder: Path) -> None:
    """Give a synthetic artifact files with the sizes and digests that its manifest names."""
    manifest = json.loads((folder / "manifest.json").read_text())
    for name, one in manifest["files"].items():
        path = folder / "files" / name
        if name.endswith(".safetensors"):
            path.write_bytes(f"weights of {folder.name}".encode())
        elif not path.exists():
            path.write_text(name)
        one |= {"sha256": file_digest(path), "size": path.stat().st_size}
    manifest["inputs"] = {"model": {"path": str(BASE), "digest": "0" * 64, "fingerprint": "0" * 64}}
    manifest["result"] = {"backend": "gptqmodel", "sequences": 3, "tokens": 99}
    manifest["digest"] = fingerprint({"files": {name: one["sha256"] for name, one in manifest["files"].items()}})
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("home")
    folder = SyntheticRun(home, shapes=SHAPED, test=1000, general=40).write()
    recipe = json.loads((folder / "recipe.resolved.json").read_text())
    recipe |= {"model": {"base": "base"}, "data": {"path": "domain.jsonl", "general": "general.jsonl"}}
    recipe["evaluate"]["scorers"][0]["databases"] = "databases"
    (folder / "recipe.resolved.json").write_text(json.dumps(recipe))
    for path in [*home.glob("store/quantize/*"), *home.glob("store/merge/*")]:
        real(path)
    MlflowClient(tracking_uri(home)).search_experiments()  # the database is made once
    return home


@pytest.fixture
def home(written: Path, tmp_path: Path) -> Path:
    shutil.copytree(written, tmp_path / "home")
    return tmp_path / "home"


def only_run(home: Path) -> Path:
    return next(path for path in (home / "runs").iterdir() if not path.is_symlink())


def quiet(_: str) -> None:
    pass


def judged(home: Path) -> str:
    return promote(only_run(home), home, say=quiet).event


def test_the_first_champion_is_on_record_before_the_registry_has_it(home: Path) -> None:
    decision = promote(only_run(home), home, say=quiet)
    assert (decision.event, decision.trouble) == ("promoted", []), decision.gate
    (one,) = Journal(home, "quickstart").lines()
    assert (one.version, one.arm, one.event, one.champion) == (1, "gptq-w4-g128", "promoted", None)
    assert all(check["outcome"] == "pass" for check in one.checks if check["gates"])
    found = MlflowClient(tracking_uri(home)).get_model_version_by_alias("quickstart", "champion")
    assert found.tags["quench.artifact"] == one.digest and found.tags["quench.recipe"] == one.recipe
    assert found.tags["quench.gate"] == "pass" and "quench.dataset" in found.tags and "quench.report" in found.tags
    assert found.description and "gptq-w4-g128" in found.description
    assert judged(home) == "nothing"  # equal bytes
    assert len(Journal(home, "quickstart").lines()) == 1


def test_a_lost_mlflow_is_made_again_from_the_record(home: Path) -> None:
    judged(home)
    shutil.rmtree(home / "mlartifacts")
    (home / "mlflow.db").unlink()
    moved = home.rename(home.with_name("moved"))  # MLflow remembers what it opened under the old name
    for _ in range(2):  # doing it twice adds nothing
        assert judged(moved) == "nothing"
    client = MlflowClient(tracking_uri(moved))
    assert client.get_model_version_by_alias("quickstart", "champion").tags["quench.version"] == "1"
    assert len(client.search_model_versions("name='quickstart'")) == 1


def test_weights_are_links_and_come_back_whole(home: Path, tmp_path: Path) -> None:
    judged(home)
    stored = next(home.glob("store/quantize/gptq-w4-g128-*")) / "files" / "model.safetensors"
    assert stored.stat().st_nlink > 1
    words = ["artifacts", "download", "-u", "models:/quickstart@champion", "-d", str(tmp_path / "out")]
    env = {**os.environ, "MLFLOW_TRACKING_URI": tracking_uri(home)}
    subprocess.run(
        [Path(sys.executable).with_name("mlflow"), *words], env=env, check=True, capture_output=True, timeout=300
    )
    assert file_digest(tmp_path / "out" / "model.safetensors") == file_digest(stored)


def test_a_dead_registry_costs_the_promotion_nothing(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    decision = promote(only_run(home), home, say=quiet)
    assert decision.event == "promoted"
    assert len(decision.trouble) == 1 and "the registry was not written" in decision.trouble[0]
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert promote(only_run(home), home, say=quiet).trouble == []
    assert (
        MlflowClient(tracking_uri(home)).get_model_version_by_alias("quickstart", "champion").tags["quench.version"]
        == "1"
    )


@pytest.mark.slow
def test_a_registry_behind_http_has_the_files_and_both_aliases(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MLflow's own server, which proxies artifacts: no hard links there, the weights are sent."""
    with mlflow_server(tmp_path) as url:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", url)
        decision = promote(only_run(home), home, say=quiet)
        assert (decision.event, decision.trouble) == ("promoted", [])
        client = MlflowClient(url)
        found = client.get_model_version_by_alias("quickstart", "champion")
        assert found.tags["quench.version"] == "1" and found.description
        loaded = mlflow.artifacts.download_artifacts("models:/quickstart@champion", tracking_uri=url)
        stored = next(home.glob("store/quantize/gptq-w4-g128-*")) / "files" / "model.safetensors"
        assert file_digest(Path(loaded) / "model.safetensors") == file_digest(stored)
        assert judged(home) == "nothing"  # and adds no second version
        assert len(client.search_model_versions("name='quickstart'")) == 1


@pytest.mark.slow
def test_a_registry_behind_http_names_the_files_in_the_bucket(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a store in a bucket nothing is sent to MLflow's server: the version's source is the store's own folder."""
    stored = next(home.glob("store/quantize/gptq-w4-g128-*"))
    manifest = json.loads((stored / "manifest.json").read_text())
    with s3_server(tmp_path / "s3") as server, mlflow_server(tmp_path) as url, wire(url) as line:
        for name, value in server.env(bucket := server.bucket("store")).items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("MLFLOW_TRACKING_URI", line.endpoint)
        monkeypatch.setenv("MLFLOW_S3_ENDPOINT_URL", server.endpoint)
        digests = {role: one["digest"] for role, one in manifest["inputs"].items()}
        assert open_store(home).take_up("quantize", manifest["slug"], manifest["fingerprint"], inputs=digests)
        decision = promote(only_run(home), home, say=quiet)
        assert (decision.event, decision.trouble) == ("promoted", [])
        found = MlflowClient(url).get_model_version_by_alias("quickstart", "champion")
        assert found.source.startswith(f"{bucket}/store/quantize/gptq-w4-g128-")
        assert not [path for _, path in line.seen if "mlflow-artifacts" in path]
        loaded = mlflow.artifacts.download_artifacts("models:/quickstart@champion", tracking_uri=url)
        assert file_digest(Path(loaded) / "model.safetensors") == file_digest(stored / "files" / "model.safetensors")


def test_damaged_weights_are_not_promoted(home: Path) -> None:
    weights = next(home.glob("store/quantize/gptq-w4-g128-*")) / "files" / "model.safetensors"
    raw = bytearray(weights.read_bytes())
    raw[5] ^= 1
    weights.write_bytes(raw)
    with pytest.raises(RecipeError, match="gptq-w4-g128 is damaged"):
        judged(home)
    assert Journal(home, "quickstart").lines() == []


def test_what_the_engine_refuses_is_not_promoted(home: Path) -> None:
    folder = only_run(home)
    raw = json.loads((folder / "steps.json").read_text())
    for arm in raw["arms"]:
        arm["refused"] = "vLLM does not read it." if arm["scheme"] else None
    (folder / "steps.json").write_text(json.dumps(raw))
    decision = promote(folder, home, say=quiet)
    assert (decision.event, decision.promotion) == ("none", None)
    assert decision.gate["text"][0] == "Nothing can be promoted: no scheme of this run is fit for it."
    assert any("vLLM does not read it" in line for line in decision.gate["text"][1:])
    assert Journal(home, "quickstart").lines() == []


def test_a_version_that_never_passed_cannot_be_rolled_back_to(home: Path) -> None:
    judged(home)
    journal = Journal(home, "quickstart")
    journal.append(replace(journal.lines()[0], version=2, event="blocked", outcome="worse", digest="2" * 64))
    for version, why in ((1, "is the champion"), (2, "never passed the gate"), (7, "has no version 7")):
        with pytest.raises(RecipeError, match=why):
            roll_back(home, model_name(only_run(home)), version, say=quiet)
    assert len(journal.lines()) == 2


def _promote(home: Path, gate: Any, out: Any) -> None:
    gate.wait()
    out.put(judged(home))


def test_of_two_promotions_at_once_one_wins(home: Path) -> None:
    context = multiprocessing.get_context("spawn")
    gate, out = context.Barrier(2), context.Queue()
    both = [context.Process(target=_promote, args=(home, gate, out)) for _ in range(2)]
    for one in both:
        one.start()
    assert sorted(out.get(timeout=120) for _ in both) == ["nothing", "promoted"]
    for one in both:
        one.join(30)
        assert one.exitcode == 0
    assert [one.version for one in Journal(home, "quickstart").lines()] == [1]


def test_the_lock_of_a_dead_process_is_free(home: Path) -> None:
    with locked(home):
        pass
    assert (home / "locks" / "promotions.lock").exists()
    assert judged(home) == "promoted"
