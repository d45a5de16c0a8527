"""Values that no reader expects, and trees of JSON or YAML with something changed in one place."""

from __future__ import annotations

import json
from collections.abc import Iterator
from copy import deepcopy
from random import Random
from typing import Any

NUMBERS = (
    *(0, 1, -1, 2, 3, 7, 64, 4096, 2**31 - 1, 2**31, 2**53 + 1, 2**63, -(2**63), 10**30, 10**400),
    *(0.0, -0.0, 0.5, 1.5, -1.5, 1e-320, 1e308, float("inf"), float("-inf"), float("nan")),
)
TEXTS = (
    *("", " ", "\n", "\t", "0", "-1", "1e400", "nan", "null", "true", "~", "auto", "none", ".", "..", "/", "//", "a/b"),
    *("\0", "\x1b[31mred", "\x7f", "\u202eevil", "\ufeffx", "\u2028", "\ud800", "\udcff", "e\u0301", "Öfen 窯 🜁"),
    *("x" * 300, "y" * 100_000, "a/" * 3000, "../" * 50 + "etc/passwd", "~nobody/x", "~", "%s%n{0}", "{}", "{a.b}"),
    *("/dev/null", "/dev/zero", "/dev/full", "/proc/self/mem", "file:///etc/passwd", "https://127.0.0.1:9/x"),
    *("(a+)+$", "(", "[", "*", "\\", ".*", "(.*.*.*.*)*x", "${HOME}", "{{ 7*7 }}", "'; drop table x --", "<script>"),
)


def odd(draw: Random) -> Any:
    """One value of any type."""
    return draw.choice(
        (
            lambda: draw.choice(NUMBERS),
            lambda: draw.choice(TEXTS),
            lambda: draw.choice((None, True, False)),
            lambda: draw.choice(([], {}, [None], [[]], {"": ""}, {"a": 1}, [1, "a"], [{}], {"kind": "x"})),
            lambda: nested(draw.choice((3, 30, 90)), mapping=draw.random() < 0.5),
            lambda: [draw.choice(TEXTS) for _ in range(draw.choice((2, 30)))],
            lambda: {draw.choice(TEXTS): draw.choice(NUMBERS) for _ in range(3)},
        )
    )()


def nested(depth: int, *, mapping: bool) -> Any:
    """A list in a list in a list, or the same of mappings."""
    value: Any = 1
    for _ in range(depth):
        value = {"a": value} if mapping else [value]
    return value


def places(tree: Any) -> list[tuple[Any, ...]]:
    """The path of every value below the top."""
    inner = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [path for key, value in inner for path in ((key,), *((key, *rest) for rest in places(value)))]


def around(tree: Any, path: tuple[Any, ...]) -> Any:
    """What holds the last step of a path."""
    for step in path[:-1]:
        tree = tree[step]
    return tree


def changed(tree: Any, draw: Random) -> Any:
    """A copy with one thing changed."""
    tree = deepcopy(tree)
    every = places(tree)
    if not every:
        return odd(draw)
    path = draw.choice(every)
    holder, key = around(tree, path), path[-1]
    value = holder[key]
    match draw.randrange(9):
        case 0 | 1 | 2:
            holder[key] = odd(draw)
        case 3:
            del holder[key]
        case 4:
            holder[key] = draw.choice(([value], {"value": value}, str(value), [value, value]))
        case 5 if isinstance(holder, dict):
            holder[near(str(key), draw)] = holder.pop(key)
        case 6 if isinstance(holder, dict):
            holder[draw.choice((*TEXTS, "unknown", 1, None, True, 1.5))] = odd(draw)
        case 7:
            other = draw.choice(every)
            there = around(tree, other)
            if isinstance(there, dict | list) and other[: len(path)] != path and path[: len(other)] != other:
                holder[key], there[other[-1]] = deepcopy(there[other[-1]]), deepcopy(value)
        case _:
            number = isinstance(value, int | float) and not isinstance(value, bool)
            holder[key] = value * draw.choice((-1, 0, 2, 1000, 0.5, 10**9)) if number else odd(draw)
    return tree


def near(name: str, draw: Random) -> str:
    """A name with a slip of the pen."""
    at = draw.randrange(len(name) + 1)
    return draw.choice(
        (name[:at] + name[at + 1 :], name[:at] + "x" + name[at:], name.upper(), name.replace("_", "-"), name + " ", "")
    )


def as_json(tree: Any, *, indent: int | None = 1) -> bytes:
    """Written as json.dump does: NaN and Infinity as Python spells them, half a surrogate pair as an escape."""
    return json.dumps(tree, indent=indent, default=str).encode()


# ---- the smallest one


def fewer_lines(content: bytes) -> Iterator[bytes]:
    """The same with some lines left out, many of them first."""
    lines = content.splitlines(keepends=True)
    size = len(lines) // 2
    while size:
        for at in range(0, len(lines), size):
            yield b"".join((*lines[:at], *lines[at + size :]))
        size //= 2


def fewer_values(content: bytes) -> Iterator[bytes]:
    """The same JSON with one value left out, large ones first; with fewer lines where it is no JSON."""
    try:
        tree = json.loads(content)
    except (ValueError, RecursionError):
        yield from fewer_lines(content)
        return
    for path in sorted(places(tree), key=len):
        smaller = deepcopy(tree)
        del around(smaller, path)[path[-1]]
        yield as_json(smaller)
