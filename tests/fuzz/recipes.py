"""A recipe by its number: the quickstart's, with legal values changed, or with something that no recipe may have."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from random import Random
from typing import Any, Literal, get_args, get_origin

import yaml
from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from recipes.plain_yaml import Loader
from recipes.read.complaints import sections
from recipes.schema import Recipe
from tasks.runtime.process.launch import CHECKOUT
from tests.fuzz.odd import TEXTS, changed

QUICKSTART = CHECKOUT / "recipes" / "quickstart"
TEXT = (QUICKSTART / "recipe.yaml").read_text(encoding="utf-8")
LEGAL_SHARE = 0.4  # of all recipes: some of their changes exclude each other, so that about a third pass
# Fields that are legal by themselves and not with this data, base or machine; and names, of which there are too many.
NOT_ALONE = ("model.", "data.sources", "data.columns", "data.path", "train.adapter", "evaluate.external", "run.device")
MORE: dict[str, tuple[Any, ...]] = {  # legal values that no bound tells
    "name": ("a", "quickstart-2", "x" * 40, "0"),
    "data.domain": ("family", "schema", None),
    "data.group": ("group", None),
    "data.salt": ("", "other", "Öfen 窯", "0"),
    "train.targets": ("all-linear", ["q_proj"], ["q_proj", "down_proj"]),
    "train.rank_pattern": ({"q_proj": 4}, {"layers.0.mlp.down_proj": 8}, {r"layers\.[01]\..*": 2}),
    "train.alpha_pattern": ({"q_proj": 4.5},),
    "train.modules_to_save": (["norm"], ["embed_tokens"], []),
    "calibrate.rows": (128, 200, 512),
    "calibrate.stratify": ("equal", "proportional"),
    "quantize.schemes": (["rtn-w4-g128"], ["awq-w4-g128", "gptq-w4-g128"], ["nf4", "int8", "gptq-w4-g128"]),
    "evaluate.on_base": ([], ["awq-w4-g128"]),
    "evaluate.kv_cache": ([], ["gptq-w4-g128"]),
    "evaluate.null_arms": ("auto", [], ["batch"], ["batch", "threads"]),
}


def recipe(number: int) -> bytes:
    """The file of this number."""
    draw = Random(f"recipe {number}")
    tree: Any = yaml.load(TEXT, Loader)
    if draw.random() < LEGAL_SHARE:
        for _ in range(draw.choice((0, 1, 1, 2, 3))):
            tree = _legally(tree, draw)
        text = TEXT if draw.random() < 0.02 else _dumped(tree, draw)
        return _written(text, draw) if draw.random() < 0.3 else text.encode()
    if draw.random() < 0.3:
        tree = _legally(tree, draw)
    if draw.random() < 0.65:
        for _ in range(draw.choice((1, 1, 1, 2, 3, 8))):
            tree = changed(tree, draw)
        return _dumped(tree, draw).encode("utf-8", "surrogatepass")
    return _spoiled(_dumped(tree, draw) if draw.random() < 0.5 else TEXT, draw)


def place(folder: Path) -> None:
    """What recipes of a folder name by relative paths."""
    for name in ("base", "data"):
        (folder / name).symlink_to(QUICKSTART / name)


def legal_values() -> dict[str, tuple[Any, ...]]:
    """Values within the bounds of the schema, by dotted field."""
    found = {name: values for name, info in _fields(Recipe) if (values := tuple(_values(info)))}
    return {name: values for name, values in (found | MORE).items() if not name.startswith(NOT_ALONE)}


def _fields(section: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    for name, info in section.model_fields.items():
        inner = sections(info.annotation)
        if len(inner) == 1 and info.annotation is inner[0]:
            yield from _fields(inner[0], f"{prefix}{name}.")
        elif not inner:
            yield f"{prefix}{name}", info


def _values(info: FieldInfo) -> Iterator[Any]:
    kinds = {info.annotation, *get_args(info.annotation)}
    for kind in (info.annotation, *get_args(info.annotation)):
        if get_origin(kind) is Literal:
            yield from get_args(kind)
    if bool in kinds:
        yield from (True, False)
    bounds = list(info.metadata)
    for kind in kinds:
        bounds += getattr(kind, "__metadata__", ())
        kinds = kinds | set(get_args(kind))
    if int in kinds or float in kinds:
        least, most = _bounds(bounds, whole=float not in kinds)
        default = info.default if isinstance(info.default, int | float) else least
        for value in (least, default, (default + most) / 2 if most < 1e6 else 2 * default, most):
            value = int(value) if float not in kinds else value
            if least <= value <= most and abs(value) < 1e6:
                yield value


def _bounds(metadata: list[Any], *, whole: bool) -> tuple[float, float]:
    least, most, step = 0.0, 1e9, 1 if whole else 1e-3
    for part in metadata:
        inner = getattr(part, "metadata", None) or [part]
        for bound in inner:
            match bound:
                case Ge(ge=value):
                    least = value  # pyright: ignore[reportAssignmentType]
                case Gt(gt=value):
                    least = value + step  # pyright: ignore[reportOperatorIssue]
                case Le(le=value):
                    most = value  # pyright: ignore[reportAssignmentType]
                case Lt(lt=value):
                    most = value - step  # pyright: ignore[reportOperatorIssue]
                case _:
                    pass
    return least, most


LEGAL = legal_values()


def _legally(tree: Any, draw: Random) -> Any:
    tree = deepcopy(tree)
    field = draw.choice(sorted(LEGAL))
    *around, last = field.split(".")
    inner = tree
    for section in around:
        if not isinstance(inner.get(section), dict):
            inner[section] = {}
        inner = inner[section]
    inner[last] = deepcopy(draw.choice(LEGAL[field]))
    return tree


def _dumped(tree: Any, draw: Random) -> str:
    return yaml.dump(
        tree, Dumper=yaml.SafeDumper, sort_keys=draw.random() < 0.2, default_flow_style=draw.random() < 0.1, width=1000
    )


def _written(text: str, draw: Random) -> bytes:
    """The same recipe in other bytes: all of these are legal."""
    match draw.randrange(6):
        case 0:
            return text.replace("\n", "\r\n").encode()
        case 1:
            return b"\xef\xbb\xbf" + text.encode()
        case 2:
            return f"%YAML 1.1\n---\n{text}...\n".encode()
        case 3:
            return ("# Öfen 窯 🜁\n" * 3 + text).encode()
        case 4:
            return text.rstrip("\n").encode()
        case _:
            return re.sub(r"(?m)^name: (.*)$", r"name: &n \1  # an anchor", text).encode()


def _spoiled(text: str, draw: Random) -> bytes:
    """The text of a recipe with something in it that YAML, or a recipe, does not have."""
    lines = text.splitlines(keepends=True)
    at = draw.randrange(len(lines))
    return draw.choice(SPOILS)(lines, at, draw)


def _line(text: str) -> Callable[[list[str], int, Random], bytes]:
    """A line put in."""
    return lambda lines, at, draw: "".join((*lines[:at], text + "\n", *lines[at:])).encode("utf-8", "surrogatepass")


def _value(text: str) -> Callable[[list[str], int, Random], bytes]:
    """The value of a line replaced, as text that YAML reads."""

    def spoil(lines: list[str], at: int, draw: Random) -> bytes:
        key = re.sub(r":[ \n].*", ":", lines[at].rstrip("\n"))
        return "".join((*lines[:at], f"{key} {text}\n", *lines[at + 1 :])).encode("utf-8", "surrogatepass")

    return spoil


def _bytes(change: Callable[[bytes, Random], bytes]) -> Callable[[list[str], int, Random], bytes]:
    return lambda lines, at, draw: change("".join(lines).encode(), draw)


def _bomb(levels: int) -> str:
    """Aliases of aliases: 10 ** levels values in a few lines."""
    lines = ["x0: &x0 [a, a, a, a, a, a, a, a, a, a]"]
    lines += [f"x{n}: &x{n} [{', '.join([f'*x{n - 1}'] * 10)}]" for n in range(1, levels)]
    return "\n".join(lines)


VALUES = (  # behind a key
    *("!!int x", "!!float x", "!!bool x", "!!timestamp x", "!!timestamp 2001-99-99", "!!binary x", "!!null x"),
    *("!!python/object/apply:os.system [true]", "!!set {a, b}", "!!omap [a: 1]", "!!pairs [a: 1]", "!x y"),
    *("&a [*a]", "&a {x: *a}", "*nothing", "[" * 3000, "[" * 500 + "]" * 500, "{a: " * 400 + "1" + "}" * 400),
    *("1" * 5000, "1e400", ".nan", "-.inf", "0x" + "f" * 5000, "190:20:30", "1_000", "017", "0b11", "2001-01-01"),
    *('"\\uD800"', '"\\0"', '"\\x1b[31m"', "|\n  text", ">-\n  text", "? [a]\n: b", "{[1, 2]: 3}", "{{a: 1}: 2}"),
    *("{? : 1}", "{1: 2}", "{null: 1}", "{true: 1}", "{1.5: 1}", "<<: {a: 1}", "{<<: [1]}", "{<<: 1}", "@x", "`x`"),
    *("%TAG", "=", "<<", "!!str", "!!map", "!!seq x", "!!map x", "!!str [a]", "!!merge x", "!!value x"),
)
LINES = (
    *("---", "...", "? a", "- a", ": ", "a", "<<: *x", "<<: 1", "1: 2", "null: 1", "true: 1", "[a, b]: c"),
    *("{a: b}: c", "extends: recipe.yaml", "extends: base", "extends: /dev/zero", "extends: nowhere.yaml"),
    *("extends: [a]", "extends: 'a\0b'", "train: {rank: 1}", "2024-01-01: x", "&x y: *x", "\x00", "\x1b", "\ufffe"),
    *("\ud800", "key" * 2000 + ": 1", "? " + "long" * 2000 + "\n: 1", "=: 1", "<<: [{a: 1}, {b: 2}]"),
    *(_bomb(3), _bomb(9), "a: &a\n  b: *a", "x: &x {y: &y [*x, *y]}", "%YAML 9.9\n---", "hf_" + "a" * 40 + ": 1"),
    *("a.b: 1", "train.rank: 1", "'': 1", "' ': 1", "data: null", "data: []", "evaluate: {scorers: 1}", "model: base"),
    *("!!binary eA==: 1", "data: {path: /dev/zero}", "data: {path: data/sql.jsonl, general: /dev/zero}"),
)
SPOILS: tuple[Callable[[list[str], int, Random], bytes], ...] = (
    lambda lines, at, draw: "".join((*lines[:at], lines[at], lines[at], *lines[at + 1 :])).encode(),
    lambda lines, at, draw: "".join((*lines[:at], *lines[at + 1 :])).encode(),
    lambda lines, at, draw: "".join(draw.sample(lines, len(lines))).encode(),
    lambda lines, at, draw: "".join((*lines[:at], "\t" + lines[at], *lines[at + 1 :])).encode(),
    lambda lines, at, draw: "".join((*lines[:at], "  " + lines[at], *lines[at + 1 :])).encode(),
    lambda lines, at, draw: _value(repr(draw.choice(TEXTS)))(lines, at, draw),
    lambda lines, at, draw: _line(f"{draw.choice(TEXTS)!r}: {draw.choice(TEXTS)!r}")(lines, at, draw),
    *map(_value, VALUES),
    *map(_line, LINES),
    *map(
        _bytes,
        (
            lambda raw, draw: raw[: draw.randrange(len(raw))],
            lambda raw, draw: raw.decode().encode("utf-16"),
            lambda raw, draw: raw.decode().encode("utf-32"),
            lambda raw, draw: raw.decode().encode("latin-1", "replace") + b"\xff\xfe",
            lambda raw, draw: b"",
            lambda raw, draw: b"\0" * draw.choice((1, 1000)),
            lambda raw, draw: draw.randbytes(draw.choice((10, 5000))),
            lambda raw, draw: raw[: (at := draw.randrange(len(raw)))] + draw.randbytes(3) + raw[at:],
            lambda raw, draw: raw.replace(b"\n", b"\r"),
            lambda raw, draw: raw * 2,
            lambda raw, draw: raw.replace(b" ", "\u00a0".encode()),
            lambda raw, draw: b"# " + b"x" * 3_000_000 + b"\n" + raw,
            lambda raw, draw: raw + b"".join(b"k%d: {a: [1, 2, 3]}\n" % n for n in range(3000)),
        ),
    ),
)
