"""Pinning what a hub has: refusals name repository, page and variable; what is fetched is the commit, byte for byte."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import QUICKSTART
from tests.hub import Hub, read_folder

SNAPSHOTS = """
import json, sys
from recipes.problem import RecipeError
from tasks.runtime.pin import HubId, snapshots
asked = [HubId(name=one[0], kind=one[1], revision=one[2], field="model.base") for one in json.loads(sys.argv[1])]
try:
    for done in snapshots(asked):
        print(*done, sep="\\n")
except RecipeError as error:
    print(*error.problems, sep="\\n\\n")
    sys.exit(2)
"""
TOKENS = ("hf_reader", "hf_stranger")
ADAPTER = {"adapter_config.json": b"{}", "adapter_model.safetensors": b"weights", "tokenizer.json": b"{}"}
SEEING = {
    name: name.encode()
    for name in (
        *("config.json", "model.safetensors", "tokenizer.json", "chat_template.json"),
        *("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json", "tekken.json"),
    )
}
# Over two steps of 10 MiB, in which huggingface_hub keeps what it got.
LARGE = os.urandom(22_000_000)


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    with Hub() as made:
        base = made.add("org/base", QUICKSTART / "base")
        base.tags["v1.0"] = base.branches["main"]
        made.add("org/gated", QUICKSTART / "base", gated=True)
        made.add("org/private", QUICKSTART / "base", private=True)
        made.add("org/adapter", ADAPTER)
        made.add("org/old-adapter", {"adapter_config.json": b"{}", "adapter_model.bin": b"pickle"})
        made.add("org/pickled", {"config.json": b"{}", "pytorch_model.bin": b"pickle", "tokenizer.json": b"{}"})
        made.add("org/no-config", {"model.safetensors": b"weights", "training_args.bin": b"pickle"})
        made.add("org/large", {"config.json": b"{}", "model.safetensors": LARGE, "onnx/model.safetensors": b"x"})
        made.add("org/seeing", SEEING | {"original/preprocessor_config.json": b"{}", "picture.png": b"x"})
        made.add("org/rows", {"data/train.jsonl": b'{"x": 1}\n', "README.md": b"x", "a.png": b"x"}, dataset=True)
        made.add("org/pictures", {"README.md": b"x", "a.png": b"x"}, dataset=True)
        made.add("org/huge", {"config.json": b"{}", "model.safetensors": b"x"}).sizes["model.safetensors"] = 1 << 60
        made.tokens = {"hf_reader": {"org/gated", "org/private"}, "hf_stranger": set()}
        yield made


def snapshot(hub: Hub, home: Path, name: str, kind: str = "model", revision: str | None = None, **how: Any) -> str:
    """What the client says of one repository."""
    return snapshots(hub, home, (name, kind, revision), **how)


def snapshots(hub: Hub, home: Path, *asked: tuple[str, str, str | None], check: int = 0, **client: Any) -> str:
    """What a client printed: folders and sources, or the problems; never a token."""
    done = subprocess.run(
        [sys.executable, "-c", SNAPSHOTS, json.dumps(asked)],
        env=hub.env(home, **client),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == check, f"{done.stdout}\n{done.stderr}"
    assert not any(token in done.stdout + done.stderr for token in TOKENS)
    return done.stdout + done.stderr


def downloaded(hub: Hub, since: int) -> list[str]:
    """Files whose bytes were sent since a request."""
    return [
        one.path for one in hub.seen[since:] if one.method == "GET" and ("/lfs/" in one.path or "cache" in one.path)
    ]


def test_a_public_model_is_its_commit_byte_for_byte(hub: Hub, tmp_path: Path):
    folder, source, *_ = snapshot(hub, tmp_path, "org/base").splitlines()
    assert (
        source == f"org/base@{hub.repositories['org/base'].branches['main']}" and len(source) == len("org/base@") + 40
    )
    assert read_folder(Path(folder)) == read_folder(QUICKSTART / "base")
    assert snapshot(hub, tmp_path, "org/base", revision="v1.0").splitlines()[:2] == [folder, source]


def test_an_adapter_and_a_data_set_bring_only_what_is_read(hub: Hub, tmp_path: Path):
    folder, *_ = snapshot(hub, tmp_path, "org/adapter", "adapter").splitlines()
    assert read_folder(Path(folder)) == ADAPTER
    folder, *_ = snapshot(hub, tmp_path, "org/rows", "dataset").splitlines()
    assert read_folder(Path(folder)) == {"data/train.jsonl": b'{"x": 1}\n', "README.md": b"x"}


def test_a_model_that_sees_brings_its_processor(hub: Hub, tmp_path: Path):
    folder, *_ = snapshot(hub, tmp_path, "org/seeing").splitlines()
    assert read_folder(Path(folder)) == SEEING
    folder, *_ = snapshot(hub, tmp_path / "another", "org/seeing", "tokenizer").splitlines()
    assert read_folder(Path(folder)) == {name: SEEING[name] for name in SEEING.keys() - {"model.safetensors"}}


def test_a_gate_opens_to_the_token_that_was_let_in(hub: Hub, tmp_path: Path):
    before = len(hub.seen)
    said = snapshot(hub, tmp_path, "org/gated", check=2)
    assert "model org/gated is gated, and no token is set" in said and "401" in said
    assert f"accept the terms on {hub.url()}/org/gated" in said and "HF_TOKEN" in said
    said = snapshot(hub, tmp_path, "org/gated", check=2, token="hf_stranger")
    assert "the token has no access" in said and "403" in said and f"{hub.url()}/org/gated" in said
    said = snapshot(hub, tmp_path, "org/gated", check=2, token="hf_expired")
    assert "cannot be read with this token" in said and "set HF_TOKEN to a valid token" in said
    assert downloaded(hub, before) == []
    folder, *_ = snapshot(hub, tmp_path, "org/gated", token="hf_reader").splitlines()
    assert read_folder(Path(folder)) == read_folder(QUICKSTART / "base")
    stored = [one for one in hub.seen[before:] if one.server == "storage"]
    assert stored and not any(one.token for one in stored), "the storage is another origin: no token goes there"
    assert not any(t.encode() in data for data in read_folder(tmp_path).values() for t in TOKENS)


def test_missing_and_private_repositories_cannot_be_told_apart(hub: Hub, tmp_path: Path):
    ids = (("org/bsae", "model", None), ("org/private", "model", None), ("org/base", "dataset", None))
    said = snapshots(hub, tmp_path, *ids, ("or g/base", "model", None), check=2)
    *hidden, wrong = said.split("\n\n")
    for (name, kind, _), problem in zip(ids, hidden, strict=True):
        page = f"{hub.url()}/{'datasets/' if kind == 'dataset' else ''}{name}"
        assert problem.startswith(f"{kind} {name} is not there, or it is private")
        assert f"{page};" in problem and "HF_TOKEN" in problem
    assert "no id of a hub" in wrong
    snapshot(hub, tmp_path, "org/private", token="hf_reader")


def test_a_wrong_revision_names_the_nearest(hub: Hub, tmp_path: Path):
    near = {"mian": "main", "v1.1": "v1.0", "0" * 40: "main, v1.0"}
    said = snapshots(hub, tmp_path, *(("org/base", "model", revision) for revision in near), check=2)
    for (revision, names), problem in zip(near.items(), said.split("\n\n"), strict=True):
        assert f"model org/base@{revision} has no such revision" in problem and f"write one of: {names}" in problem


def test_what_cannot_be_used_is_refused_before_a_byte_is_downloaded(hub: Hub, tmp_path: Path):
    before = len(hub.seen)
    words = {
        ("org/pickled", "model"): "has its weights as pickles only: pytorch_model.bin",
        ("org/old-adapter", "adapter"): "has its weights as pickles only: adapter_model.bin",
        ("org/adapter", "model"): "is an adapter, not a base model",
        ("org/old-adapter", "model"): "is an adapter, not a base model",
        ("org/no-config", "model"): "has no config.json",
        ("org/base", "adapter"): "has no adapter_config.json and no adapter_model.safetensors",
        ("org/pictures", "dataset"): "has no *.jsonl",
        ("org/huge", "model"): "does not fit the disk of the cache",
    }
    said = snapshots(hub, tmp_path, *((name, kind, None) for name, kind in words), ("org/base", "model", None), check=2)
    for ((name, kind), why), problem in zip(words.items(), said.split("\n\n"), strict=True):
        assert problem.startswith(f"{kind} {name} {why}")
    assert [path for path in downloaded(hub, before) if "generation_config.json" not in path] == []
    # One small file of the sound repository was read, to see whether its gate is open; its weights wait for the others.
    assert len(downloaded(hub, before)) == 1


def test_a_dropped_download_is_resumed_by_a_range(hub: Hub, tmp_path: Path):
    before = len(hub.seen)
    with hub.dropping("model.safetensors", after=15_000_000, times=1):
        folder, *_ = snapshot(hub, tmp_path, "org/large").splitlines()
    ranges = [one.range for one in hub.seen[before:] if one.server == "storage"]
    assert ranges == [None, f"bytes={10 << 20}-"]
    assert (Path(folder) / "model.safetensors").read_bytes() == LARGE
    assert not (Path(folder) / "onnx").exists()


@pytest.mark.slow  # huggingface_hub waits 5 x 1 s
def test_a_connection_that_stays_broken_says_what_is_kept(hub: Hub, tmp_path: Path):
    with hub.dropping("model.safetensors", after=0):
        said = snapshot(hub, tmp_path, "org/large", check=2)
    assert "model org/large was not downloaded to its end" in said and "1 of 2 files are whole and kept" in said
    assert "type the same command again" in said
    before = len(hub.seen)
    snapshot(hub, tmp_path, "org/large")
    assert [path for path in downloaded(hub, before) if "config.json" in path] == [], "it was kept"


def test_offline_uses_the_commit_of_the_cache_and_says_so(hub: Hub, tmp_path: Path):
    online = snapshot(hub, tmp_path, "org/base").splitlines()[:2]
    before = len(hub.seen)
    said = snapshot(hub, tmp_path, "org/base", offline=True)
    assert said.splitlines()[:2] == online and "Using cached commit" in said
    assert len(hub.seen) == before


def test_offline_without_a_cache_names_the_variables(hub: Hub, tmp_path: Path):
    said = snapshots(hub, tmp_path, *(("org/base", "model", one) for one in (None, "1" * 40)), check=2, offline=True)
    for problem in said.split("\n\n"):
        assert "is not in the cache, and the hub is out of reach" in problem and "HF_HUB_OFFLINE is set" in problem
        assert str(tmp_path) in problem and "HF_ENDPOINT" in problem and "HF_HOME" in problem


def test_no_network_and_a_hub_that_is_down(tmp_path: Path):
    with Hub() as gone:
        gone.add("org/base", QUICKSTART / "base")
        online = snapshot(gone, tmp_path / "full", "org/base").splitlines()[:2]
        gone.down = True
        said = snapshot(gone, tmp_path / "empty", "org/base", check=2)
        assert "model org/base cannot be fetched" in said and "answered 503" in said
    said = snapshot(gone, tmp_path / "full", "org/base")
    assert said.splitlines()[:2] == online and "Could not reach the Hub" in said
    said = snapshot(gone, tmp_path / "empty", "org/base", check=2)
    assert f"{gone.url()} cannot be reached" in said and "Connection refused" in said
