"""Which modules get an adapter, or are trained whole: those of the text decoder, whatever other modules are called."""

from __future__ import annotations

from transformers import PreTrainedModel

from tasks.jobs.loading.classes import has_towers, text_decoder, text_linears

ALL = "all-linear"
# PEFT 0.21 refuses these layers of these `model_type`s: the kernels of state spaces read their weights themselves.
STATE_SPACES = ("falcon_h1", "nemotron_h", "falcon_mamba", "mamba", "mamba2")
STATE_SPACE_LAYERS = ("out_proj", "conv1d")


def adapter_targets(model: PreTrainedModel, targets: str | list[str]) -> str | list[str]:
    """PEFT's target_modules for the recipe's `train.targets`.

    PEFT takes every linear layer but the output layer for `all-linear`, and every module whose name ends in `q_proj`
    for `q_proj`: of a vision-language model the tower's, too. There each layer of the decoder is named in full, so
    that adapter_config.json says what plain PEFT has to load.

    Args:
        model: The base.
        targets: `all-linear`, or ends of names.
    """
    if model.config.model_type in STATE_SPACES and targets == ALL:
        return sorted({name.rpartition(".")[2] for name in text_linears(model)} - {*STATE_SPACE_LAYERS})
    if not has_towers(model):
        return targets
    return sorted(name for name in text_linears(model) if targets == ALL or _ends_in(name, targets))


def saved_modules(model: PreTrainedModel, ends: list[str]) -> list[str]:
    """PEFT's modules_to_save for the recipe's `train.modules_to_save`, in full names where there are towers.

    Args:
        model: The base.
        ends: PEFT takes every module whose name ends so.
    """
    if not ends or not has_towers(model):
        return ends
    stem = text_decoder(model)
    kept = {model.get_input_embeddings(), model.get_output_embeddings()}
    named = [name for name, module in model.named_modules() if name.startswith(f"{stem}.") or module in kept]
    return [name for name in named if name.endswith(tuple(ends))]


def _ends_in(name: str, ends: str | list[str]) -> bool:
    """As PEFT compares: whole parts of a name."""
    return any(name == end or name.endswith(f".{end}") for end in ends)
