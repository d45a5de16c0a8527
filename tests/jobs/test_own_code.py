"""A model that brings code: transformers runs it where a job is told so, and there alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from tasks.jobs import evaluate
from tasks.jobs.loading.load import load_arm
from tests.jobs.build import make_job
from tests.jobs.test_evaluate import PARAMS, world  # noqa: F401  (a fixture)

MODELING = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM

Path({mark!r}).write_text("ran")


class StrangeConfig(LlamaConfig):
    model_type = "strange"


class Strange(LlamaForCausalLM):
    config_class = StrangeConfig
"""


@pytest.fixture
def strange(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:  # noqa: F811
    """The tiny model under a type that transformers does not have, with code that leaves a mark when it runs."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = shutil.copytree(world / "base", tmp_path / "strange")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "strange", "architectures": ["Strange"]}
    config["auto_map"] = {"AutoConfig": "modeling.StrangeConfig", "AutoModelForCausalLM": "modeling.Strange"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "modeling.py").write_text(MODELING.format(mark=str(tmp_path / "mark")))
    return folder


def test_code_runs_only_where_it_was_asked_for(strange: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="trust_remote_code"):
        load_arm("external", strange, device="cpu")
    assert not (tmp_path / "mark").exists()
    model = load_arm("external", strange, device="cpu", trusted=True)
    assert type(model).__name__ == "Strange" and (tmp_path / "mark").exists() and model.dtype == torch.bfloat16


def test_it_is_evaluated_as_the_same_model_without_code(world: Path, strange: Path, tmp_path: Path) -> None:  # noqa: F811
    inputs = {"dataset": world / "dataset", "reference": world / "reference"}
    notes_by_kind = {
        name: evaluate.run(make_job("evaluate", tmp_path / name, params=PARAMS | more, model=model, **inputs))
        for name, model, more in (
            ("own", strange, {"kind": "external", "trust_remote_code": True}),
            ("plain", world / "base", {"kind": "external"}),
        )
    }
    assert (tmp_path / "mark").exists() and "nll/test" in notes_by_kind["own"]
    assert notes_by_kind["own"] == notes_by_kind["plain"]
