"""A copy is compared with its original by tokens and logits, whatever kind of arm it is."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tasks.jobs import reload
from tasks.runtime.process.errors import StageError
from tests.jobs.build import make_job
from tests.jobs.test_merge import plant_adapter


def compare(kind: str, tmp_path: Path, **inputs: Path) -> dict[str, object]:
    return reload.run(make_job("reload", tmp_path / "out", params={"kind": kind}, **inputs))


def test_the_same_bytes_give_the_same_logits(base: Path, tmp_path: Path):
    copy = shutil.copytree(base, tmp_path / "copy")
    result = compare("bf16", tmp_path, model=base, copy=copy)
    assert result["largest_difference"] == 0 and result["kernel"] == "Linear" and result["prompt_tokens"]


def test_base_and_adapter(base: Path, tmp_path: Path):
    adapter = plant_adapter(base, tmp_path / "adapter")
    shutil.copytree(base, tmp_path / "copy" / "base")
    copied = shutil.copytree(adapter, tmp_path / "copy" / "adapter")
    result = compare("nf4", tmp_path, model=base, adapter=adapter, copy=tmp_path / "copy")
    assert result["largest_difference"] == 0 and result["kernel"] == "Linear4bit"
    weights = load_file(copied / "adapter_model.safetensors")
    save_file({name: 1.1 * tensor for name, tensor in weights.items()}, copied / "adapter_model.safetensors")
    with pytest.raises(StageError, match="other logits"):
        compare("nf4", tmp_path, model=base, adapter=adapter, copy=tmp_path / "copy")


@pytest.mark.parametrize("value", [1.0, float("nan")])
def test_one_weight_that_differs(base: Path, tmp_path: Path, value: float):
    copy = shutil.copytree(base, tmp_path / "copy")
    weights = load_file(copy / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"][0] = value
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(StageError, match="other logits"):
        compare("bf16", tmp_path, model=base, copy=copy)


def test_another_template(base: Path, tmp_path: Path):
    copy = shutil.copytree(base, tmp_path / "copy")
    template = copy / "chat_template.jinja"
    template.write_text(template.read_text().replace("'\\n'", "' '").replace("\n'", " '"))
    with pytest.raises(StageError, match="other tokens"):
        compare("bf16", tmp_path, model=base, copy=copy)
