"""Do packed rows see only themselves? The check that comes before the first packed training step.

transformers 5.23 makes the block mask from position_ids, but only without an attention mask and without a cache, and
only in models that build their masks with its own functions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peft import PeftModel

from tasks.runtime.process.errors import StageError

# Norm of the difference over the norm, bf16: 0.004 at most over the tiny models of the tests; a row that sees the one
# before it is off by 0.05 and more, also in a random model.
LIMIT = 0.02


def packing_error(
    model: PeftModel, rows: list[dict[str, list[int]]], *, collate: Callable[[list[dict[str, Any]]], dict[str, Any]]
) -> float:
    """Relative distance of the last hidden states of packed rows from those of the rows alone.

    Args:
        model: With or without adapter.
        rows: input_ids and labels of each.
        collate: Makes one sequence of several rows.
    """

    def hidden(batch_rows: list[dict[str, list[int]]]) -> torch.Tensor:
        batch = {
            name: value.to(model.device) if torch.is_tensor(value) else value
            for name, value in collate(batch_rows).items()
        }
        del batch["labels"]
        with torch.no_grad(), torch.autocast(model.device.type, dtype=torch.bfloat16):
            return backbone(**batch, use_cache=False).last_hidden_state[0].float()

    backbone: Any = model.get_base_model().base_model
    was_training = model.training
    model.eval()
    packed, alone = hidden(rows), torch.cat([hidden([row]) for row in rows])
    model.train(was_training)
    return ((packed - alone).norm() / alone.norm()).item()


def check_packing(
    model: PeftModel, rows: list[dict[str, list[int]]], *, collate: Callable[[list[dict[str, Any]]], dict[str, Any]]
) -> float:
    """Refuse packing where it changes what a row is.

    Raises:
        StageError: A packed row's hidden states are not those of the row alone, or the model refuses packed rows.
    """
    try:
        error = packing_error(model, rows, collate=collate)
    except ValueError as refused:  # Qwen3.5's linear attention, where causal_conv1d is not installed
        raise StageError.of(
            what="the base does not take packed rows here",
            where=type(model.get_base_model()).__name__,
            why=str(refused),
            next="set train.packing: false",
        ) from refused
    if not error < LIMIT:
        raise StageError.of(
            what="packed rows give other hidden states than the same rows alone",
            where=f"{type(model.get_base_model()).__name__}: hidden states differ by {error:.1%}",
            why="this architecture's attention does not keep the rows of one sequence apart, so each would be "
            "trained with another row as its context",
            next="set train.packing: false",
        )
    return error
