"""An adapter on the quantized base: which ones PEFT puts on which format, and that the recipe knows it before."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

from recipes.arms import arms
from recipes.schema import Recipe
from recipes.schemes.slugs import parse_scheme
from tasks.jobs.loading.load import load_arm, load_bf16
from tests.jobs.backends import compressed
from tests.jobs.quantized import log_probs, make, mean_kl, write_calibset
from tests.tiny import write_base

# rtn is stored in GPTQ's format; each of these loads another class of layer.
SCHEMES = ("rtn-w4-g32", "awq-w4-g32", "nf4", "ct-gptq-w4-g32")
ADAPTERS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "patterns": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 1}},
    "saved": {"modules_to_save": ["lm_head", "norm"]},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base/ and an adapter a kind, with random A and B."""
    root = tmp_path_factory.mktemp("on_base")
    write_base(root / "base", tied=False)
    for name, more in ADAPTERS.items():
        torch.manual_seed(1)
        settings = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM", **more)
        get_peft_model(load_bf16(root / "base", device="cpu"), settings).save_pretrained(root / name)
    return root


@pytest.fixture(scope="module")
def quantized(folder: Path) -> Callable[[str], Path]:
    """The base by a scheme, made once."""
    calibset = write_calibset(folder / "calibset")

    def write(slug: str) -> Path:
        out = folder / slug
        if out.exists():
            return out
        if slug.startswith("ct-"):
            compressed.write(folder / "base", out, parse_scheme(slug))
        else:
            make(slug, folder / "base", out, calibset=calibset)
        return out

    return write


def unavailable(slug: str, kind: str) -> str | None:
    """What the recipe says of the arm; `kind` as a setting of training."""
    train = {"rslora": {"rslora": True}, "dora": {"dora": True}}.get(kind, {})
    recipe = Recipe.model_validate(
        {
            "name": "test",
            "model": {"base": "base"},
            "data": {"path": "rows.jsonl"},
            "train": train,
            "evaluate": {"on_base": [slug]},
        }
    )
    return next(arm.unavailable for arm in arms(recipe) if arm.slug == f"{slug}.on-base")


@pytest.mark.parametrize("kind", ADAPTERS)
@pytest.mark.parametrize("slug", SCHEMES)
def test_the_recipe_knows_what_peft_refuses(
    slug: str, kind: str, folder: Path, quantized: Callable[[str], Path]
) -> None:
    base, reason = quantized(slug), unavailable(slug, kind)

    def loaded() -> Tensor:
        return log_probs(load_arm("quantized", base, device="cpu", adapter=folder / kind))

    if reason is None:
        assert mean_kl(log_probs(load_arm("quantized", base, device="cpu")), loaded()) > 1e-3  # it does something
    else:
        with pytest.raises(ValueError, match="does not support DoRA yet") as refused:
            loaded()
        assert str(refused.value).startswith(reason.partition(": ")[2])
    assert (reason is not None) == (kind == "dora" and slug in ("rtn-w4-g32", "awq-w4-g32"))
