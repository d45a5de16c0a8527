"""Arms that cannot be loaded, or not measured as the recipe wants, as far as recipe and headers show."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from recipes.arms import arms
from recipes.models.adapters import read_adapter
from recipes.models.headers import Headers
from recipes.problem import Problem, RecipeError
from recipes.read.load import Loaded


def unavailable(loaded: Loaded) -> Iterator[Problem]:
    """Arms of evaluate.on_base that PEFT cannot load; none where `check` refuses the recipe."""
    try:
        reasons = {arm.slug: arm.unavailable for arm in arms(loaded.recipe, adapter=_adapter_config(loaded))}
    except RecipeError:
        return  # check reports it
    for index, slug in enumerate(loaded.recipe.evaluate.on_base):
        why = reasons[f"{slug}.on-base"]
        if why is not None:
            yield Problem(
                what=f"{slug}.on-base cannot be loaded, so its cells in the report will be empty.",
                where=f"evaluate.on_base.{index}",
                why=f"{why}.",
                next="Leave it to have the reason in the report, or remove it; nf4 on the base takes DoRA.",
            )


def _adapter_config(loaded: Loaded) -> Mapping[str, Any] | None:
    return read_adapter(loaded.adapter).config if loaded.adapter is not None else None


def kv_cache_problems(loaded: Loaded, headers: Headers) -> Iterator[Problem]:
    """evaluate.kv_cache with a base that stores something else than keys and values."""
    if loaded.recipe.evaluate.kv_cache and headers.text_config.get("kv_lora_rank"):
        yield Problem(
            what="The KV cache of this base cannot be simulated.",
            where="evaluate.kv_cache",
            why="It caches a latent vector a token (kv_lora_rank in config.json); transformers caches what is "
            "projected from it, so what a server would store never appears.",
            next="Leave evaluate.kv_cache out.",
        )
