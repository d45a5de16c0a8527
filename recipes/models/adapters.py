"""What an adapter folder tells before any weight is read: adapter_config.json, the safetensors header, its base.

Standard library only, so that an adapter that cannot be merged is refused in milliseconds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from recipes.models.weights import Tensor, read_file
from recipes.plain import is_mapping, json_object
from recipes.problem import Problem, RecipeError

CONFIG, WEIGHTS, RECORD = "adapter_config.json", "adapter_model.safetensors", "nf4.json"
BaseType = Literal["nf4", "bf16", "unknown"]

# Initialisations that moved a part of the base into the adapter: it was trained beside another base than the one
# it names. PEFT converts the first four; LoftQ's base has to be named itself.
CONVERTIBLE = ("pissa", "olora", "corda", "lora_ga")
LOFTQ = "loftq"
UNMERGEABLE = ("PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "ADAPTION_PROMPT", "CPT")


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """A PEFT adapter as its folder describes it.

    Attributes:
        folder: The folder.
        config: adapter_config.json.
        tensors: Every tensor, by name.
        base_type: What the base's linear layers were in training.
        evidence: What says so.
    """

    folder: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    base_type: BaseType
    evidence: str

    @property
    def initialisation(self) -> str:
        """`default`, or the name that init_lora_weights gives."""
        start = self.config.get("init_lora_weights", True)
        return start if isinstance(start, str) else "default"


def read_adapter(folder: Path) -> Adapter:
    """Read an adapter's folder.

    Raises:
        RecipeError: It is no adapter, is broken, changed its base when it was initialised, or cannot be merged.
    """
    config = json_object(folder / CONFIG)
    if config is None or not (folder / WEIGHTS).is_file():
        missing = " and ".join(name for name in (CONFIG, WEIGHTS) if not (folder / name).is_file())
        raise Problem(
            what=f"This is no adapter: {missing + ' missing' if missing else CONFIG + ' is not JSON'}.",
            where=str(folder),
            why="An adapter is read from PEFT's safetensors; a pickle (adapter_model.bin) can run code.",
            next="Name a folder that PEFT's save_pretrained wrote (safetensors is its default).",
        ).error()
    problems = [*_initialisation(folder, config), *_kind(folder, config)]
    tensors: dict[str, Tensor] = {}
    try:
        tensors = read_file(folder / WEIGHTS)
    except RecipeError as error:
        problems += error.problems
    if problems:
        raise RecipeError(problems)
    base_type, evidence = _base_type(folder, config)
    return Adapter(folder=folder, config=config, tensors=tensors, base_type=base_type, evidence=evidence)


def _initialisation(folder: Path, config: Mapping[str, Any]) -> list[Problem]:
    start = str(config.get("init_lora_weights", True)).lower()
    if start == LOFTQ:
        remedy = (
            "Name the folder that LoftQ wrote (its residual is in those weights) as the base, with a copy of "
            f'this adapter in which {CONFIG} says "init_lora_weights": true: sed -i \'s/"loftq"/true/\' COPY/{CONFIG}'
        )
    elif start.startswith(CONVERTIBLE):
        remedy = (
            "Convert it once, with the adapter as it was saved before its first step (INITIAL) and the residual base "
            'that it was trained on (RESIDUAL): python -c "from peft import PeftModel as P; from transformers import '
            f"AutoModelForCausalLM as M; P.from_pretrained(M.from_pretrained('RESIDUAL'), '{folder}').save_pretrained("
            "'CONVERTED', path_initial_model_for_weight_conversion='INITIAL')\" and merge CONVERTED."
        )
    else:
        return []
    return [
        Problem(
            what=f"The adapter's initialisation ({start}) changed the base.",
            where=f"{folder / CONFIG} init_lora_weights",
            why="It was trained beside the residual of the base; added to the base itself, that part counts twice.",
            next=remedy,
        )
    ]


def _kind(folder: Path, config: Mapping[str, Any]) -> list[Problem]:
    kind = config.get("peft_type")
    if isinstance(kind, str) and kind not in UNMERGEABLE and not config.get("alora_invocation_tokens"):
        return []
    return [
        Problem(
            what=f"An adapter of the kind {'activated LoRA' if kind == 'LORA' else kind} cannot be merged.",
            where=f"{folder / CONFIG} peft_type",
            why="It changes the input or a part of the positions, so no single set of weights equals it.",
            next="Serve it as an adapter, or train a LoRA.",
        )
    ]


def _base_type(folder: Path, config: Mapping[str, Any]) -> tuple[BaseType, str]:
    """From our record, else from what trainers leave beside an adapter, else from the name of its base."""
    record = json_object(folder / RECORD)
    if record is not None:
        return ("nf4" if record.get("modules") else "bf16"), RECORD
    model = json_object(folder / "config.json") or {}
    quantization = model.get("quantization_config")
    if is_mapping(quantization) and quantization.get("load_in_4bit"):
        return ("nf4" if quantization.get("bnb_4bit_quant_type") == "nf4" else "unknown"), "config.json"
    base = str(config.get("base_model_name_or_path") or "")
    if base.lower().endswith(("bnb-4bit", "-nf4")):
        return "nf4", f"{CONFIG}: base {base}"
    return "unknown", "neither a record nor a quantization config is beside the adapter"
