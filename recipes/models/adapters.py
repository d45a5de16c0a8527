"""What an adapter folder tells before any weight is read: adapter_config.json, the safetensors header, its base.

Standard library only, so that an adapter that cannot be merged is refused in milliseconds.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from recipes.models.adapter_config import config_problems
from recipes.models.decoder import is_expert
from recipes.models.weights import Tensor, read_file
from recipes.plain import is_list, is_mapping, json_object
from recipes.problem import Problem, RecipeError

PREFIX = "base_model.model."  # PEFT's, before the base's own module names
# Parts of names that come and go between classes and versions of transformers, before the numbered layers.
WRAPPERS = frozenset(
    {"model", "language_model", "text_model", "vision_model", "transformer", "backbone", "thinker", "llm"}
)
_TAIL = re.compile(r"\.(?:lora_|base_layer\.|modules_to_save\.|token_adapter\.|[^.]+$)")
_LAYER = re.compile(r"(?:^|\.)\d+\.")

# The base's own weights, which PEFT saves beside a resized embedding.
OF_BASE = (".original_module.", ".trainable_tokens_original")

# What stays bf16 in any case: output layers, towers and what joins them to the text decoder.
OUTSIDE_LAYERS = frozenset(
    {"lm_head", "embed_out", "score", "vision_tower", "vision_model", "vision_encoder", "visual", "audio_tower"}
    | {"audio_encoder", "multi_modal_projector", "mm_projector", "embed_vision", "embed_audio", "connector", "merger"}
)

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


class AdapterKey(NamedTuple):
    """The name of an adapter's tensor: the module of the base that it belongs to, and what of it the tensor is."""

    module: str
    tail: str


def split_key(key: str) -> AdapterKey:
    """`base_model.model.model.layers.0.mlp.up_proj.lora_A.weight`: `lora_A.weight` of `model.layers.0.mlp.up_proj`."""
    name = key.removeprefix(PREFIX)
    match = _TAIL.search(name)
    return AdapterKey(name[: match.start()], name[match.start() + 1 :]) if match else AdapterKey("", name)


def saved_part(tail: str) -> str:
    """The parameter's name below its module, of a tensor that is saved whole: `modules_to_save.weight` is `weight`."""
    return re.sub(r"^(?:token_adapter\.)?(?:base_layer|modules_to_save)\.", "", tail)


def plain_name(name: str) -> str:
    """A module's or tensor's name without what other classes and versions of transformers put around the layers.

    Gemma 3 has `language_model.model.layers.0.mlp.up_proj` in its files and in transformers until 4.51,
    `model.language_model.layers.0...` since, and `model.layers.0...` in its text decoder alone. All are
    `layers.0.mlp.up_proj` here; a tower keeps its name.
    """
    parts = name.split(".")
    first = next((index for index, part in enumerate(parts) if part.isdigit()), len(parts) - 1)
    return ".".join([*(part for part in parts[:first] if part not in WRAPPERS), *parts[first:]])


def is_target(config: Mapping[str, Any], module: str) -> bool:
    """PEFT's rule (check_target_module_exists): does adapter_config.json name this module of the base as a target?"""
    excluded = config.get("exclude_modules") or ()
    if re.fullmatch(excluded, module) if isinstance(excluded, str) else _ends_with(module, excluded):
        return False
    if any(re.match(rf"(^|.*\.){saved}($|\..*)", module) for saved in config.get("modules_to_save") or ()):
        return False
    targets = config.get("target_modules") or ()
    if isinstance(targets, str):
        return re.fullmatch(targets, module) is not None
    if module in targets:
        return True
    return _ends_with(module, targets) and _in_layers(config, module)


def lora_alpha(config: Mapping[str, Any], module: str) -> float:
    """Alpha of a module: PEFT's rule (get_pattern_key), the first pattern that its name ends with."""
    patterns: Mapping[str, float] = config.get("alpha_pattern") or {}
    for pattern, alpha in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return alpha
    return config["lora_alpha"]


def token_indices(config: Mapping[str, Any], module: str) -> tuple[int, ...]:
    """The tokens whose rows of this module were trained: one list for the input embeddings, or one for each module."""
    indices = config.get("trainable_token_indices") or ()
    if is_mapping(indices):
        indices = next((tokens for name, tokens in indices.items() if f".{module}".endswith(f".{name}")), ())
    return tuple(indices)


def untrained(config: Mapping[str, Any], adapted: Collection[str], modules: Iterable[str]) -> list[str]:
    """Modules that the adapter's config names as targets and its file lacks, in stacks of layers that it adapts.

    Other stacks (the vision tower of a model whose text decoder was trained alone) are not missed.

    Args:
        config: adapter_config.json.
        adapted: Modules of the base that the file has parts for, named as in `modules`.
        modules: Linear layers of the base.
    """
    if config.get("peft_type") != "LORA" or config.get("target_modules") == "all-linear":
        return []
    stacks = {_stack(module) for module in adapted}
    return sorted(
        module
        for module in modules
        if module not in adapted and _stack(module) in stacks and not is_expert(module) and is_target(config, module)
    )


def _stack(module: str) -> str:
    """The name before the number of the layer."""
    return _LAYER.split(plain_name(module), maxsplit=1)[0]


def _ends_with(module: str, names: Iterable[str]) -> bool:
    return any(module == name or module.endswith(f".{name}") for name in names)


def _in_layers(config: Mapping[str, Any], module: str) -> bool:
    """The module's layer is one of layers_to_transform, where that is given."""
    wanted = config.get("layers_to_transform")
    if wanted is None or wanted == []:
        return True
    patterns = config.get("layers_pattern") or r"[^.]*"
    before = r".*?\." if patterns == r"[^.]*" else r"(?:^|.*?\.)"
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        if match := re.match(rf"{before}{pattern}\.(\d+)\.", module):
            return int(match[1]) in ([wanted] if isinstance(wanted, int) else wanted)
    return False


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
    problems = config_problems(folder / CONFIG, config)
    problems = problems or [*_initialisation(folder, config), *_kind(folder, config), *_tying(folder, config)]
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


def _tying(folder: Path, config: Mapping[str, Any]) -> list[Problem]:
    if not config.get("ensure_weight_tying"):
        return []
    return [
        Problem(
            what="An adapter with ensure_weight_tying is not merged.",
            where=f"{folder / CONFIG} ensure_weight_tying",
            why="PEFT 0.21's merge of it is not the model that was trained: KL 0.016 on a tiny tied Qwen2, where other "
            "kinds cost less than 0.0001.",
            next="Train without it: what changes one side of tied embeddings is merged, and the sides are then untied.",
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
        other = _other_four_bits(quantization)
        return ("unknown", f"config.json: 4 bits, but {other}") if other else ("nf4", "config.json")
    base = str(config.get("base_model_name_or_path") or "")
    if base.lower().endswith(("bnb-4bit", "-nf4")):
        return "nf4", f"{CONFIG}: base {base}"
    return "unknown", "neither a record nor a quantization config is beside the adapter"


def _other_four_bits(quantization: Mapping[str, Any]) -> str:
    """How a base in 4 bits differed from the one that merging makes again (QLoRA's), or an empty string."""
    if (kind := quantization.get("bnb_4bit_quant_type", "fp4")) != "nf4":
        return f"{kind}, not NF4"
    if not quantization.get("bnb_4bit_use_double_quant", False):
        return "without double quantization: its scales, and so its weights, are others (bnb_4bit_use_double_quant)"
    skipped: Any = quantization.get("llm_int8_skip_modules") or []
    if not is_list(skipped) or not all(isinstance(name, str) for name in skipped):
        return "what was left in bf16 (llm_int8_skip_modules) is no list of names"
    kept = sorted(name for name in skipped if name.rpartition(".")[2] not in OUTSIDE_LAYERS)
    return f"these were left in bf16 (llm_int8_skip_modules): {', '.join(kept)}" if kept else ""
