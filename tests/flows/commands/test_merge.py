"""`quench merge`: exit codes, a manifest beside the files, nothing half-written, inputs untouched."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from tasks.runtime.fingerprint import file_digest
from tasks.runtime.process.launch import CHECKOUT
from tests.hub import Hub
from tests.jobs.architectures import train_adapter, write_architecture

TURNS = [{"role": "user", "content": "what colour ?"}]


def quench(
    *words: object,
    folder: Path,
    check: int,
    limit: Callable[[], None] | None = None,
    env: Mapping[str, str] = os.environ,
) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "flows.cli", "merge", *map(str, words)],
        env={**env, "PYTHONPATH": str(CHECKOUT), "QUENCH_HOME": str(folder / "home")},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
        preexec_fn=limit,
    )
    assert done.returncode == check, f"{done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


def bytes_of(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): file_digest(path) for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_architecture(tmp_path_factory.mktemp("base"), "llama", shard="200KB")


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_adapter(base, tmp_path_factory.mktemp("adapter"))


def test_a_folder_with_a_manifest_and_nothing_else(base: Path, adapter: Path, tmp_path: Path) -> None:
    before = bytes_of(base), bytes_of(adapter)
    told = quench(base, adapter, tmp_path / "out", "--json", folder=tmp_path, check=0)
    said = json.loads(told.partition("\nbase in training")[0])
    out = tmp_path / "out"
    manifest = json.loads((out / "manifest.json").read_text())
    assert said["merged"][0]["digest"] == manifest["digest"]
    assert manifest["result"]["onto"] == "dequantized" and manifest["result"]["base_type"] == "nf4"
    assert manifest["result"]["record"] == "exact" and manifest["peak_rss_gib"] > 0
    for name, one in manifest["files"].items():
        assert file_digest(out / name) == one["sha256"]
    assert set(manifest["files"]) | {"manifest.json"} == set(bytes_of(out))
    assert before == (bytes_of(base), bytes_of(adapter))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]  # no home was there, and none is made
    AutoModelForCausalLM.from_pretrained(out)
    render = {"tokenize": False, "add_generation_prompt": True}
    assert AutoTokenizer.from_pretrained(out).apply_chat_template(TURNS, **render) == (
        AutoTokenizer.from_pretrained(base).apply_chat_template(TURNS, **render)
    )
    for path in (adapter / "tokenizer").iterdir():
        assert (out / path.name).read_bytes() == path.read_bytes()
    assert "not an empty folder" in quench(base, adapter, out, folder=tmp_path, check=2)


@pytest.mark.slow
def test_unknown_training_makes_both_merges(base: Path, adapter: Path, tmp_path: Path) -> None:
    foreign = shutil.copytree(adapter, tmp_path / "foreign", ignore=shutil.ignore_patterns("nf4.json", "tokenizer"))
    out = tmp_path / "out"
    said = quench(base, foreign, out, folder=tmp_path, check=0)
    assert "in training: unknown" in said and "no record" in said
    results = {path.name: json.loads((path / "manifest.json").read_text())["result"] for path in out.iterdir()}
    assert {name: (one["onto"], one["record"]) for name, one in results.items()} == {
        "dequantized": ("dequantized", "none"),
        "original": ("original", "not needed"),
    }
    assert {path.name for path in tmp_path.iterdir()} == {"foreign", "out"}


def test_bad_input_is_refused_at_once_with_everything(base: Path, adapter: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(base, tmp_path / "broken")
    shards = sorted(broken.glob("*.safetensors"))
    shards[0].unlink()
    shards[1].write_bytes(shards[1].read_bytes()[:-100])
    pissa = shutil.copytree(adapter, tmp_path / "pissa")
    config = json.loads((pissa / "adapter_config.json").read_text())
    (pissa / "adapter_config.json").write_text(json.dumps(config | {"init_lora_weights": "pissa_niter_4"}))
    said = quench(broken, pissa, tmp_path / "out", folder=tmp_path, check=2)
    for part in ("weight files are missing", "truncated", "pissa_niter_4", "path_initial_model_for_weight_conversion"):
        assert part in said
    assert not (tmp_path / "out").exists()


def test_weights_alone_need_no_tokenizer(base: Path, adapter: Path, tmp_path: Path) -> None:
    names = ("tokenizer*", "special_tokens*", "chat_template*")
    bare = shutil.copytree(base, tmp_path / "bare", ignore=shutil.ignore_patterns(*names))
    alone = shutil.copytree(adapter, tmp_path / "alone", ignore=shutil.ignore_patterns("tokenizer"))
    assert "there is none" in quench(bare, alone, tmp_path / "out", folder=tmp_path, check=0)
    whole = tmp_path / "whole"
    assert "there is none" not in quench(base, adapter, whole, folder=tmp_path, check=0)
    assert file_digest(tmp_path / "out" / "model.safetensors") == file_digest(whole / "model.safetensors")
    assert (whole / "serve.md").exists() and not (tmp_path / "out" / "serve.md").exists()


@pytest.mark.parametrize("onto", ["dequantized", "original"])
def test_an_option_that_would_do_nothing_is_refused(base: Path, adapter: Path, tmp_path: Path, onto: str) -> None:
    """Without a record there is nothing to accept; onto the original weights nothing is compared with it."""
    foreign = shutil.copytree(adapter, tmp_path / "foreign")
    if onto == "dequantized":
        (foreign / "nf4.json").unlink()
    words = (base, foreign, tmp_path / "out", "--onto", onto, "--accept-other-base")
    assert "--accept-other-base would do nothing" in quench(*words, folder=tmp_path, check=2)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_full_disk_leaves_nothing_visible(base: Path, adapter: Path, tmp_path: Path) -> None:
    """RLIMIT_FSIZE ends a write like a full disk does, with an errno; Python ignores its signal."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, 150_000))

    before = bytes_of(adapter)
    said = quench(base, adapter, tmp_path / "out", folder=tmp_path, check=1, limit=limit)
    assert "the disk is full" in said and "what was written of it is thrown away" in said
    assert not (tmp_path / "out").exists()
    assert not [path for path in tmp_path.rglob("*") if path.suffix == ".safetensors"]
    assert before == bytes_of(adapter)
    quench(base, adapter, tmp_path / "out", folder=tmp_path, check=0)  # the same command, with room
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_hub_ids_and_a_tokenizer_of_the_adapters_own(base: Path, adapter: Path, tmp_path: Path) -> None:
    """Many tools save the tokenizer, with the template they trained by, at the root of the adapter's folder."""
    local = tmp_path / "adapter"
    local.mkdir()
    for path in adapter.glob("adapter_*"):
        shutil.copyfile(path, local / path.name)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = "{% for message in messages %}[{{ message['content'] }}]{% endfor %}"
    tokenizer.save_pretrained(local)
    with Hub() as hub:
        pinned = hub.add("org/base", base).commit({path.name: path.read_bytes() for path in base.iterdir()})
        hub.add("org/adapter", local)
        env = hub.env(tmp_path / "hf")
        quench("org/base", "org/adapter", tmp_path / "hubs", "--onto", "original", folder=tmp_path, check=0, env=env)
        told = quench("org/bass", "org/adapter", tmp_path / "no", folder=tmp_path, check=2, env=env)
    assert "org/bass" in told and not (tmp_path / "no").exists()
    quench(base, adapter, tmp_path / "folders", "--onto", "original", folder=tmp_path, check=0)
    weights = [file_digest(tmp_path / out / "model.safetensors") for out in ("hubs", "folders")]
    assert weights[0] == weights[1]
    merged = AutoTokenizer.from_pretrained(tmp_path / "hubs")
    assert merged.apply_chat_template(TURNS, tokenize=False) == "[what colour ?]"
    assert pinned in json.dumps(json.loads((tmp_path / "hubs" / "manifest.json").read_text()))
