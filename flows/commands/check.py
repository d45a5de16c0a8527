"""`quench check`: everything that config.json, the safetensors headers and the rows can tell, before anything runs."""

from __future__ import annotations

import argparse

from flows.commands.schemes import not_here
from flows.commands.terminal import Output
from flows.plan.registered import Earlier, earlier, foreseen
from recipes.checks.check import load_and_read
from recipes.checks.rows import warnings_at
from recipes.checks.serving import warnings
from recipes.checks.train import unquantized_warnings
from recipes.problem import RecipeError
from recipes.schema import Recipe
from tasks.runtime.gpus import no_gpu
from tasks.runtime.store.local import find_home


def command(args: argparse.Namespace) -> Output:
    """Check a recipe.

    Raises:
        RecipeError: Everything that is wrong with it.
    """
    loaded, rows = load_and_read(args.recipe, sets=args.set, data=args.data)
    absent = no_gpu(loaded.where("run.device")) if loaded.recipe.run.device == "cuda" else None
    warned = [*warnings(loaded), *unquantized_warnings(loaded), *not_here(loaded.recipe)]
    before = _earlier(loaded.recipe) if rows.sizes else None
    few = warnings_at(loaded, rows, before.rate) if before else rows.warnings
    warned += [*filter(None, [absent]), *few]
    told = foreseen(loaded.recipe, rows.sizes, before=before) if rows.sizes else None
    lines = [f"{args.recipe}: no problem found", *(f"  {name}: {value}" for name, value in rows.summary.items())]
    lines += [f"  gate: {sentence}" for sentence in (told or {"text": []})["text"]]
    look = [f"look at what is trained: quench show {args.recipe}"] if args.data else []
    return Output(
        json={
            "ok": True,
            "problems": [],
            "warnings": [warning.as_dict() for warning in warned],
            "rows": rows.summary,
            "foreseen": told,
        },
        text="\n".join([*lines, *(f"\nwarning: {warning}" for warning in warned), *look]),
    )


def _earlier(recipe: Recipe) -> Earlier | None:
    """What this home's runs say of it; a home that cannot be read is no reason not to check."""
    try:
        return earlier(find_home(), recipe)
    except RecipeError:
        return None
