"""What adapter_config.json may say: every key that is read here, and what PEFT takes for it.

PEFT itself checks hardly any of them: a text in place of a list is taken letter by letter, "false" is true.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recipes.plain import is_list, is_mapping
from recipes.problem import Problem

LARGEST = 1e18  # of an alpha; an integer of 400 digits is none that a float can hold
SHOWN = 60  # characters of a value that an error shows


@dataclass(frozen=True)
class Rule:
    """What a value has to be, in words, and whether one is."""

    words: str
    fits: Callable[[object], bool]


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 1 << 63  # true is no count


def _is_rank(value: object) -> bool:
    return _is_count(value) and value != 0


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= LARGEST  # NaN is not


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _are(value: object, fits: Callable[[object], bool]) -> bool:
    return is_list(value) and all(map(fits, value))


def _by_name(value: object, fits: Callable[[object], bool]) -> bool:
    return is_mapping(value) and all(map(fits, value.values()))


def _are_counts(value: object) -> bool:
    return _are(value, _is_count)


_TEXTS = Rule("a text or a list of texts", lambda value: _is_text(value) or _are(value, _is_text))
_SWITCH = Rule("true or false", lambda value: isinstance(value, bool))
RULES = {
    "base_model_name_or_path": Rule("a text", _is_text),
    "init_lora_weights": Rule("true, false or a name", lambda value: isinstance(value, bool | str)),
    "r": Rule("a whole number from 1 on", _is_rank),
    "lora_alpha": Rule("a number up to 1e18", _is_number),
    "target_modules": _TEXTS,
    "exclude_modules": _TEXTS,
    "modules_to_save": Rule("a list of texts", lambda value: _are(value, _is_text)),
    "layers_to_transform": Rule(
        "a whole number or a list of them", lambda value: _is_count(value) or _are_counts(value)
    ),
    "layers_pattern": _TEXTS,
    "rank_pattern": Rule("whole numbers from 1 on, by name", lambda value: _by_name(value, _is_rank)),
    "alpha_pattern": Rule("numbers by name", lambda value: _by_name(value, _is_number)),
    "trainable_token_indices": Rule(
        "a list of token ids, or one by name of a module",
        lambda value: _are_counts(value) or _by_name(value, _are_counts),
    ),
    "use_rslora": _SWITCH,
    "use_dora": _SWITCH,
    "ensure_weight_tying": _SWITCH,
}
ENDS = ("target_modules", "exclude_modules")  # a text is an expression, a list has ends of names
NEEDED = ("r", "lora_alpha")  # of a LoRA, whose update is alpha / r times B @ A
OF_LORA = (*NEEDED, "rank_pattern")  # AdaLoRA keeps lists there, and OFT an r of 0


def config_problems(path: Path, config: Mapping[str, Any]) -> list[Problem]:
    """Keys of other types than PEFT writes, and regular expressions that are none.

    Args:
        path: adapter_config.json.
        config: What it holds.
    """
    lora = config.get("peft_type") == "LORA"
    problems = [_missing(path, name) for name in NEEDED if lora and config.get(name) is None]
    for name, rule in RULES.items():
        value = config.get(name)
        if value is not None and not rule.fits(value) and (lora or name not in OF_LORA):
            problems.append(_wrong(path, name, value, rule.words))
    return problems or [_no_expression(path, name, error) for name, error in _expressions(config)]


def _expressions(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Name of the key and what is wrong, of texts that PEFT takes for regular expressions."""
    for name in (*ENDS, "modules_to_save", "layers_pattern", "alpha_pattern", "rank_pattern"):
        value: Any = config.get(name) or ()
        for text in [value] if isinstance(value, str) else () if name in ENDS else value:
            try:
                re.compile(f"(^|.*\\.)({text})($|\\..*)")
            except (re.error, OverflowError, RecursionError) as error:
                yield name, f"{text[:SHOWN]!a}: {error}"


def _missing(path: Path, name: str) -> Problem:
    return Problem(
        what=f"The adapter's config does not say {name}.",
        where=f"{path} {name}",
        why="What it changes is alpha / r times the product of its matrices.",
        next=f"Write {name} into {path.name}, as it was in training.",
    )


def _wrong(path: Path, name: str, value: object, words: str) -> Problem:
    return Problem(
        what=f"The adapter's {name} is {_short(value)}; it has to be {words}.",
        where=f"{path} {name}",
        why="PEFT writes no other kind of value, so the file was edited or broken.",
        next=f"Correct it in {path.name}, or take the adapter's folder anew from where it was saved.",
    )


def _no_expression(path: Path, name: str, error: str) -> Problem:
    return Problem(
        what=f"The adapter's {name} holds no regular expression.",
        where=f"{path} {name}",
        why=f"PEFT matches names of modules with it, and Python cannot read {error}.",
        next=f"Correct it in {path.name}.",
    )


def _short(value: object) -> str:
    if is_mapping(value):
        return "an object"
    if is_list(value):
        return "a list"
    text = f"{value!a}" if isinstance(value, str | float | bool) else "a whole number"
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."
