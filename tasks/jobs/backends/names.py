"""Which module of a loaded model a linear layer of the checkpoint is: backends name modules, we name tensors."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from transformers import PreTrainedModel

from tasks.jobs.loading.names import modules_of
from tasks.runtime.process.errors import StageError


def linear_modules(model: PreTrainedModel, names: Sequence[str], *, backend: str) -> dict[str, str]:
    """Name in the checkpoint -> module name, in the order of `names`; asked before anything is spent.

    Args:
        model: As the backend loaded it, not quantized yet.
        names: Linear layers of the checkpoint that are to be quantized.
        backend: Who asks.

    Raises:
        StageError: One of them is not one linear module there: fused with others, or transposed.
    """
    modules = modules_of(model, names)
    linear = linear_layers(model)
    if missing := [name for name in names if modules.get(name) not in linear]:
        raise StageError.of(
            what=f"{len(missing)} linear layers of the checkpoint are not linear layers in the loaded model",
            where=missing[0],
            why=f"transformers holds them as one fused or transposed weight, which {backend} does not quantize",
            next="write another scheme for this model (quench schemes lists them), or keep these layers in bf16 by a "
            "rule with keep: true (ct- schemes)",
        )
    return {name: modules[name] for name in names}


def linear_layers(model: nn.Module) -> set[str]:
    """Module names of the linear layers that a backend can take; transposed ones (Conv1D) are none."""
    return {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
