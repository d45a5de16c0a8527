"""`quench export`: a real copy that loads, with a card whose figures are the report's; everything else is refused."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file, save_file

from flows.commands.export import _names, export
from flows.results.artifacts import Part
from recipes.problem import RecipeError
from recipes.read.load import load
from recipes.schema import Recipe
from tasks.runtime.fingerprint import file_digest
from tasks.runtime.store.local import read_json
from tests.conftest import World
from tests.hub import Hub, read_folder
from tests.hub_upload import Account

ARM = "gptq-w4-g128"
TOKEN = "hf_anna"


@dataclass(frozen=True, kw_only=True)
class Done:
    """An export and what the command said."""

    folder: Path
    said: dict[str, Any]
    world: World

    @property
    def card(self) -> str:
        return (self.folder / "README.md").read_text(encoding="utf-8")

    @property
    def artifact(self) -> Path:
        return (self.world.home / self.world.report()["arms"][self.said["arm"]]["path"]).parent


@pytest.fixture(scope="module")
def done(small: World, tmp_path_factory: pytest.TempPathFactory) -> Done:
    folder = tmp_path_factory.mktemp("export") / "out"
    return Done(folder=folder, said=json.loads(small.quench("export", ARM, str(folder), "--json").stdout), world=small)


def refused(world: World, arm: str, dest: Path) -> str:
    """What the export says instead; nothing stands at DEST, nor beside it."""
    before = sorted(dest.parent.iterdir())
    with pytest.raises(RecipeError) as caught:
        export((world.home / "runs" / "latest").resolve(), arm, dest, home=world.home)
    assert sorted(dest.parent.iterdir()) == before
    return str(caught.value)


def test_it_is_a_real_copy_and_was_loaded(done: Done):
    assert done.said["ok"] and done.said["reloaded"]["largest_difference"] == 0
    assert done.said["reloaded"]["kernel"] not in ("", "Linear") and done.said["pushed"] is None
    files = [path for path in done.folder.rglob("*") if path.is_file()]
    assert done.said["files"] == len(files) and done.said["bytes"] == sum(path.stat().st_size for path in files)
    assert not any(path.is_symlink() or path.stat().st_nlink > 1 for path in files)
    manifest = read_json(done.artifact / "manifest.json")["files"]
    copied = [name for name in manifest if name not in ("events.jsonl", "serve.json", "serve.md")]
    assert {"model.safetensors", "config.json", "tokenizer.json", "chat_template.jinja"} <= set(copied)
    assert {"generation_config.json", "quantize_config.json"} <= set(copied)
    assert all(file_digest(done.folder / name) == manifest[name]["sha256"] for name in copied)
    own = {path.name for path in files} - set(copied)
    assert own == {"README.md", "recipe.yaml", "serve.json", "serve.md"}
    assert [path.name for path in done.folder.parent.iterdir()] == ["out"]
    stored = done.said["on_disk"]
    assert stored == read_json(done.artifact / "manifest.json")["result"]["on_disk"]
    assert stored["packed_share"] == 1 and stored["bits_a_weight"] == stored["promised_bits_a_weight"]


def test_a_push_may_begin_where_the_copy_is_there(done: Done, tmp_path: Path):
    """A push that failed leaves a whole copy: the same command goes on from it, and from nothing else."""
    run = (done.world.home / "runs" / "latest").resolve()
    made = export(run, ARM, done.folder, home=done.world.home, again=True)
    assert made.reloaded is None and made.files == done.said["files"]
    other = shutil.copytree(done.folder, tmp_path / "other")
    (other / "config.json").write_text("{}")
    for arm, folder in ((ARM, other), ("rtn-w4-g128", done.folder)):
        with pytest.raises(RecipeError, match="not an empty folder"):
            export(run, arm, folder, home=done.world.home, again=True)


def test_the_cards_figures_are_the_reports(done: Done):
    report = done.world.report()
    rows = dict(
        re.findall(r"^\| ([\w -]+) \| ([^|]+ \| [^|]+) \|", done.card.partition("## How")[0], flags=re.MULTILINE)
    )
    metrics = report["arms"][ARM]["metrics"]
    for label, name in (("task", "task"), ("perplexity", "ppl_test"), ("KL", "kl_mean"), ("top-1", "top1_agreement")):
        figure, n = (part.strip() for part in rows[label].split("|"))
        assert n == f"{metrics[name]['n']:,}" and re.search(r"\[.+, .+\]", figure), name
        value = float(figure.split()[0])
        scale = 100 if name in ("task", "top1_agreement") else 1
        assert value == pytest.approx(scale * metrics[name]["value"], rel=0.02, abs=0.05), name  # rounded by interval


def test_the_card_says_where_it_came_from(done: Done):
    front = yaml.safe_load(done.card.split("---\n")[1])
    assert front["library_name"] == "transformers" and {"4-bit", "gptq"} <= set(front["tags"])
    assert "base_model" not in front, "a local base has no id on a hub"
    report, manifest = done.world.report(), read_json(done.artifact / "manifest.json")
    for digest in (report["sources"]["base"]["digest"], report["sources"]["data"]["digest"], manifest["digest"]):
        assert digest[:16] in done.card
    for text in (
        "into the dequantized base weights",
        "128 rows of the training domain",
        "rank 8",
        "max_steps 8",
        report["id"],
    ):
        assert text in done.card, text
    assert f'vllm serve "$PWD" --served-model-name {ARM}' in done.card
    written = [(done.folder / name).read_text() for name in ("README.md", "serve.md", "serve.json")]
    assert not any(str(done.world.home.parent) in text or "/recipes/quickstart" in text for text in written)


def test_its_recipe_is_the_one_that_ran(done: Done):
    ran = read_json(done.world.home / "runs" / "latest" / "recipe.resolved.json")
    assert load(done.folder / "recipe.yaml").recipe == Recipe.model_validate(ran)


def test_refusals_name_what_is_there(small: World, tmp_path: Path):
    assert f"Did you mean {ARM}?" in refused(small, "gptq-w4-g12", tmp_path / "out")
    assert "untouched base" in refused(small, "base", tmp_path / "out")
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine.txt").write_text("x")
    assert "not an empty folder" in refused(small, ARM, full) and (full / "mine.txt").exists()
    inside = small.home / small.report()["arms"][ARM]["path"] / "out"
    assert "lies inside a folder that is read" in refused(small, ARM, inside)
    assert "[RUN] ARM DEST" in small.quench("export", ARM, check=2).stderr


def test_an_arm_that_failed(world: World, tmp_path: Path):
    steps = world.home / "runs" / "latest" / "steps.json"
    raw = json.loads(steps.read_text())
    for step in raw["steps"]:
        if step["key"] == f"quantize/{ARM}":
            why = {"what": "Scales are NaN.", "where": "x", "why": "a channel is zero", "next": "y"}
            step |= {"status": "failed", "path": None, "problem": why}
    steps.write_text(json.dumps(raw))
    assert "Scales are NaN" in refused(world, ARM, tmp_path / "out")


def test_an_artifact_that_was_changed_is_not_exported(world: World, tmp_path: Path):
    (weights,) = (world.home / "store" / "quantize").glob(f"{ARM}-*/files/model.safetensors")
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.unlink()  # a link to the shared store
    weights.write_bytes(data)
    assert "another sha256" in refused(world, ARM, tmp_path / "out")
    weights.unlink()
    assert "model.safetensors" in refused(world, ARM, tmp_path / "out")


def test_an_artifact_that_holds_bf16_is_not_exported(world: World, tmp_path: Path):
    """As an older Quench, which did not look, may have stored it: the manifest agrees with the files."""
    (folder,) = (world.home / "store" / "quantize").glob(f"{ARM}-*")
    weights, layer = folder / "files" / "model.safetensors", "model.layers.1.mlp.up_proj"
    manifest = read_json(folder / "manifest.json")
    merged = load_file(world.home / manifest["inputs"]["model"]["path"] / "model.safetensors")
    tensors = {name: one for name, one in load_file(weights).items() if not name.startswith(f"{layer}.")}
    tensors[f"{layer}.weight"] = merged[f"{layer}.weight"]
    weights.unlink()  # links to the shared store
    (folder / "manifest.json").unlink()
    save_file(tensors, weights, metadata={"format": "pt"})
    manifest["files"]["model.safetensors"] |= {"sha256": file_digest(weights), "size": weights.stat().st_size}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    said = refused(world, ARM, tmp_path / "out")
    assert f"stored as BF16 where {ARM} promises codes: {layer}" in said and str(folder) in said


@pytest.mark.slow  # loads two arms twice
def test_an_adapter_goes_with_its_base_and_to_a_hub(small: World, tmp_path: Path):
    with Hub() as hub:
        hub.uploads.accounts = {TOKEN: Account(name="anna")}
        hub.tokens = {TOKEN: set()}
        kept = {name: value for name, value in small.env.items() if not name.startswith("HF_")}
        env = kept | hub.env(tmp_path / "hf", token=TOKEN) | {"QUENCH_HOME": str(small.home)}
        words = small.argv("export", "latest", "nf4-adapter", "out", "--push", "anna/sql")
        ran = subprocess.run(words, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=600)
        assert ran.returncode == 0, ran.stderr
        assert "new and private" in ran.stdout and TOKEN not in ran.stdout + ran.stderr
        again = subprocess.run(words, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=600)
        assert again.returncode == 0 and "was there already" in again.stdout
        pushed = hub.repositories["anna/sql"]
        assert len(pushed.commits) == 2, "its .gitattributes, and everything at once; nothing the second time"
        files = {name: data for name, data in pushed.commits[pushed.branches["main"]].items() if name[0] != "."}
    assert files == read_folder(tmp_path / "out")
    assert {"base/model.safetensors", "adapter/adapter_model.safetensors", "adapter/tokenizer/tokenizer.json"} <= set(
        files
    )
    card = files["README.md"].decode()
    assert "library_name: peft" in card and "BitsAndBytesConfig" in card and "vLLM does not serve nf4-adapter" in card
    merged = tmp_path / "merged"
    small.quench("export", "merged-dequantized", str(merged))
    assert "in bf16, merged into the dequantized" in (merged / "README.md").read_text()


@pytest.mark.slow  # makes two arms
def test_an_adapter_on_a_quantized_base_and_an_engine_that_refuses(world: World, tmp_path: Path):
    sets = ("evaluate.on_base=[rtn-w4-g128]", "quantize.schemes=[rtn-w3-g128]", "serve.engine=vllm")
    sets += ("measure.enabled=false", "serve.max_model_len=256")
    words = [word for one in sets for word in ("--set", one)]
    assert "warning: vLLM does not read the 3-bit weights" in world.quench("run", str(world.recipe), *words).stderr
    arms = world.report()["arms"]
    assert [slug for slug, arm in arms.items() if arm["refused"]] == ["rtn-w3-g128"]
    out = tmp_path / "out"
    world.quench("export", "rtn-w4-g128.on-base", str(out))
    command = next(line for line in (out / "serve.md").read_text().splitlines() if line.startswith("vllm serve"))
    assert command.startswith('vllm serve "$PWD/base" --enable-lora') and "--max-lora-rank 8" in command
    assert "--max-model-len 256" in command and '"rtn-w4-g128.on-base=$PWD/adapter"' in command
    asked = load(out / "recipe.yaml").recipe
    assert asked.serve.engine == "vllm" and asked.quantize.schemes == ["rtn-w3-g128"]
    w3 = tmp_path / "w3"
    world.quench("export", "rtn-w3-g128", str(w3))
    text = (w3 / "README.md").read_text() + (w3 / "serve.md").read_text()
    assert "vllm serve" not in text and text.count("Write ct-gptq-w3-g128") >= 1 and "Not served by the engine" in text


def test_the_base_of_an_adapter_is_copied_with_its_processor(tmp_path: Path):
    names = {"config.json", "model.safetensors", "tokenizer.json", "preprocessor_config.json", "processor_config.json"}
    for name in (*names, "video_preprocessor_config.json", "picture.png"):
        (tmp_path / name).write_text("{}")
    base = Part(name="model", source=tmp_path, under="base", sha256={})
    assert set(_names(base)) == names | {"video_preprocessor_config.json"}
