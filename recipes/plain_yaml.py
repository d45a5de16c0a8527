"""YAML that other people wrote, as the values that JSON has: nothing else, nothing endless.

PyYAML, not ruamel.yaml: that one stops at the first repeated key, would need the same walk for dotted names, and reads
YAML 1.2, in which `017` is 17, not 15: recipes would change their meaning in silence.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import chain, islice
from typing import Any, ClassVar, cast

import yaml

_EXPONENT = ("tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"))


DEEPEST = 50  # levels; a recipe has six, and what reads it calls itself for each
MOST_VALUES = 100_000  # an alias counts as all that it stands for: ten of them in ten lines can stand for gigabytes
PLAIN = ("null", "bool", "int", "float", "str", "seq", "map")  # what JSON has, too; merge keys (<<) go by their value
AS_TEXT = ("timestamp", "value")  # 2024-01-01, and `=`, which PyYAML knows and cannot read
LARGEST = 2**63 - 1  # what seeds and counts have in torch, in numpy and in parquet
# What PyYAML's own constructors raise for a text behind a tag that it does not fit, such as `!!int x`
NOT_OF_ITS_TAG = (ValueError, KeyError, IndexError, TypeError, AttributeError, OverflowError)


class Loader(yaml.SafeLoader):
    """SafeLoader that reads 2e-4 as the number it is (YAML 1.1 asks for 2.0e-4), and dates as text.

    Values are those of JSON: no bytes, no dates, no sets, no whole number beyond 64 bits.
    """

    yaml_implicit_resolvers: ClassVar = {  # pyright: ignore[reportIncompatibleVariableOverride]
        first: [*((tag, pattern) for tag, pattern in known if tag.rpartition(":")[2] not in AS_TEXT), _EXPONENT]
        for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    yaml_constructors: ClassVar = {  # pyright: ignore[reportIncompatibleVariableOverride]
        tag: make
        for tag, make in yaml.SafeLoader.yaml_constructors.items()
        if tag is None or tag.rpartition(":")[2] in PLAIN
    }

    def get_single_node(self) -> Any:
        """The document, which holds no more than can be walked through.

        Raises:
            yaml.YAMLError: It is no YAML, is nested too deep, or its aliases stand for too much.
        """
        try:
            node: Any = super().get_single_node()
        except RecursionError:
            raise _too_deep(self._mark()) from None
        _measure(node)
        return node

    def fetch_flow_collection_start(self, TokenClass: Any) -> None:  # noqa: N803
        """`[` or `{`: PyYAML's scanner looks at all that are open for each one more."""
        if self.flow_level >= DEEPEST:
            raise _too_deep(self._mark())
        super().fetch_flow_collection_start(TokenClass)  # pyright: ignore[reportUnknownMemberType]

    def _mark(self) -> Any:
        return cast("Any", self.get_mark())  # pyright: ignore[reportUnknownMemberType]

    def document(self, node: Any) -> object:
        """The value of the document that `get_single_node` gave; None for an empty one."""
        return cast("Any", self.construct_document(node)) if node else None  # pyright: ignore[reportUnknownMemberType]

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        """The value of a node.

        Raises:
            yaml.YAMLError: It is not what its tag says, or a whole number that is too large.
        """
        try:
            value = cast("Any", super().construct_object(node, deep))  # pyright: ignore[reportUnknownMemberType]
        except NOT_OF_ITS_TAG:
            value = None
            wrong = f"`{str(node.value)[:40]}` is no {str(node.tag).rpartition(':')[2]}"
        else:
            wrong = "a whole number has more than 64 bits" if isinstance(value, int) and abs(value) > LARGEST else ""
        if wrong:
            raise yaml.constructor.ConstructorError(None, None, wrong, node.start_mark)
        return value


def _measure(top: yaml.Node | None) -> None:
    """Refuse what would not end, or not fit, once every alias is put in its place.

    Raises:
        yaml.YAMLError: It is nested too deep, as what holds itself is, or holds too many values.
    """
    level = [] if top is None else [top]
    left = MOST_VALUES
    for _ in range(DEEPEST):
        if not level:
            return
        left -= len(level)
        if left < 0:
            why = f"it holds more than {MOST_VALUES:,} values, with what its aliases stand for"
            raise yaml.constructor.ConstructorError(None, None, why, level[0].start_mark)
        level = list(islice(chain.from_iterable(map(inside, level)), left + 1))
    if level:
        raise _too_deep(level[0].start_mark)


def inside(node: yaml.Node) -> Iterator[yaml.Node]:
    """The nodes that a node holds, keys and values alike."""
    if isinstance(node, yaml.MappingNode):
        yield from chain.from_iterable(node.value)
    elif isinstance(node, yaml.SequenceNode):
        yield from node.value


def _too_deep(mark: Any) -> yaml.MarkedYAMLError:
    why = f"it is nested deeper than {DEEPEST} levels, or an alias holds itself"
    return yaml.constructor.ConstructorError(None, None, why, mark)
