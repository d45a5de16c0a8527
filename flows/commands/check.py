"""`quench check`: everything that config.json, the safetensors headers and the rows can tell, before anything runs."""

from __future__ import annotations

import argparse

from flows.commands.schemes import not_here
from flows.commands.terminal import Output
from recipes.checks.check import load_and_read
from recipes.checks.serving import warnings
from recipes.checks.train import unquantized_warnings
from tasks.runtime.gpus import no_gpu


def command(args: argparse.Namespace) -> Output:
    """Check a recipe.

    Raises:
        RecipeError: Everything that is wrong with it.
    """
    loaded, rows = load_and_read(args.recipe, sets=args.set, data=args.data)
    absent = no_gpu(loaded.where("run.device")) if loaded.recipe.run.device == "cuda" else None
    warned = [*warnings(loaded), *unquantized_warnings(loaded), *not_here(loaded.recipe)]
    warned += [*filter(None, [absent]), *rows.warnings]
    lines = [f"{args.recipe}: no problem found", *(f"  {name}: {value}" for name, value in rows.summary.items())]
    look = [f"look at what is trained: quench show {args.recipe}"] if args.data else []
    return Output(
        json={
            "ok": True,
            "problems": [],
            "warnings": [warning.as_dict() for warning in warned],
            "rows": rows.summary,
        },
        text="\n".join([*lines, *(f"\nwarning: {warning}" for warning in warned), *look]),
    )
