"""An adapter on top of a model, every tensor of it in its place: PEFT warns, and goes on without what does not fit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from recipes.models.adapters import CONFIG, PREFIX, WEIGHTS, is_target, lora_alpha, split_key, untrained
from recipes.plain import json_object
from tasks.jobs.loading.adapter_names import ModuleNames
from tasks.runtime.process.errors import StageError

if TYPE_CHECKING:
    from peft import PeftModel

NAME = "default"  # PEFT's word for the first adapter of a model
MISFITS = ("size mismatch", "not found in the base model")  # torch's words for shapes, PEFT's for targets
LISTED = 20  # names in a refusal
# Parts of other kinds than LoRA that PEFT makes again from a seed, or keeps once for all layers.
SHARED = ("vera_A", "vera_B", "randlora_A", "randlora_B", "tinylora_v", "unilora_theta_d", "vblora_vector_bank")


def attach(model: PreTrainedModel, folder: Path) -> PeftModel:
    """The adapter on top of `model`, frozen, eval mode.

    Names that another version or class of transformers gave its modules become those of this model.

    Raises:
        StageError: No adapter_model.safetensors in the folder; tensors in it that fit nothing in the model; parts that
            its config names and the file lacks.
    """
    from peft import MODEL_TYPE_TO_PEFT_MODEL_MAPPING, PeftConfig, PeftModel, set_peft_model_state_dict
    from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING

    if not (folder / WEIGHTS).exists():
        raise StageError.of(
            what=f"no {WEIGHTS} in the adapter folder",
            where=str(folder),
            why="adapters are read from safetensors only; a pickle can run code when it is opened",
            next="save the adapter again with PEFT's save_pretrained (safetensors is its default)",
        )
    names, stored = ModuleNames(model), load_file(folder / WEIGHTS)
    tensors = {names.key(key): tensor for key, tensor in stored.items()}
    config: Any = PeftConfig.from_pretrained(str(folder), local_files_only=True)
    config.inference_mode = True
    if config.peft_type == "LORA":
        _aim(config, model, _trained(stored, names), folder)
    kind = MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(config.task_type, PeftModel)
    try:
        peft = kind(model, config, NAME)
        loaded = set_peft_model_state_dict(peft, tensors, adapter_name=NAME)
    except KeyError as error:
        if (key := str(error.args[0])) in tensors or not key.startswith(PREFIX):
            raise
        raise _missing(folder, [key]) from error  # of what is saved whole (modules_to_save, trainable tokens)
    except (RuntimeError, ValueError) as error:
        if not any(words in str(error) for words in MISFITS):
            raise
        raise _strange(folder, [" ".join(str(error).split())]) from error
    if strange := sorted(key for key in loaded.unexpected_keys if not _is_second(key, tensors)):
        raise _strange(folder, strange)  # beside resized embeddings PEFT saves what is trained whole a second time
    own: str = dict[Any, str](PEFT_TYPE_TO_PREFIX_MAPPING).get(config.peft_type, "")
    if missing := sorted(key for key in loaded.missing_keys if own in key and _is_adapters(key)):
        raise _missing(folder, missing)
    return peft.eval()


class _Trained(NamedTuple):
    """A module's name in the adapter, and the rank of its LoRA."""

    name: str
    rank: int


def _trained(tensors: Mapping[str, Tensor], names: ModuleNames) -> dict[str, _Trained]:
    """What the adapter has a LoRA for, by name in this model."""
    ranks = {}
    for key, tensor in tensors.items():
        module, tail = split_key(key)
        if tail in ("lora_A.weight", "lora_embedding_A"):
            ranks[names.here(module)] = _Trained(module, tensor.shape[0])
    return ranks


def _aim(config: Any, model: PreTrainedModel, trained: Mapping[str, _Trained], folder: Path) -> None:
    """Let a LoRA's config name the modules that its file has, where in this model it would name others.

    Args:
        config: What PEFT read; changed.
        model: The base.
        trained: Modules that the file has, by their names in the model.
        folder: The adapter's.

    Raises:
        StageError: The file lacks layers that the config names.
    """
    written = json_object(folder / CONFIG) or {}
    layers = {name for name, module in model.named_modules() if _takes_lora(module)}
    if not trained or not trained.keys() <= layers:
        return  # other parts alone, experts (PEFT makes those of other versions its own), or another base's
    if missing := untrained(written, trained.keys(), layers):
        raise _missing(folder, missing)
    if trained.keys() == {name for name in layers if is_target(written, name)}:
        return
    config.target_modules = set(trained)
    config.exclude_modules = config.layers_to_transform = config.layers_pattern = None
    config.rank_pattern = {name: rank for name, (_, rank) in trained.items() if rank != config.r}
    alphas = {name: lora_alpha(written, older) for name, (older, _) in trained.items()}
    config.alpha_pattern = {name: alpha for name, alpha in alphas.items() if alpha != config.lora_alpha}


def _takes_lora(module: nn.Module) -> bool:
    """A linear layer, also a quantized one, or an embedding."""
    return isinstance(module, nn.Embedding | Conv1D) or hasattr(module, "in_features")


def _is_second(key: str, tensors: Mapping[str, Tensor]) -> bool:
    """What is trained whole, under a second name."""
    first = key.replace(".modules_to_save.", ".")
    return first != key and first in tensors


def _is_adapters(key: str) -> bool:
    """A key that the adapter's file has to bring; what is saved whole may be shared, and is looked up by PEFT."""
    if ".token_adapter." in key or ".modules_to_save." in key:
        return False
    return NAME in key.removeprefix(PREFIX).split(".") and not any(name in key for name in SHARED)


def _strange(folder: Path, what: Sequence[str]) -> StageError:
    return StageError.of(
        what="the adapter does not fit this base",
        where=f"{folder / WEIGHTS}: {_listed(what)}",
        why="PEFT would go on without these parts, and the result would be another model under this name",
        next="name the base that it was trained on; of several adapters in one folder, save this one alone",
    )


def _missing(folder: Path, what: Sequence[str]) -> StageError:
    return StageError.of(
        what=f"{len(what)} part(s) of the adapter are not in its file",
        where=f"{folder / WEIGHTS}: {_listed(what)}",
        why=f"its {CONFIG} names them; the file was cut short, or saved before its parts were gathered",
        next=f"save the adapter again; if these were never trained, take them out of target_modules in {CONFIG}",
    )


def _listed(what: Sequence[str]) -> str:
    more = len(what) - LISTED
    return ", ".join(what[:LISTED]) + (f" and {more} more" if more > 0 else "")
