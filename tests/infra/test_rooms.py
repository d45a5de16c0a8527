"""The pictures of the rooms: every room is there, every arrow points down, nothing overlaps."""

import importlib.util
import sys
import xml.etree.ElementTree as ElementTree
from itertools import pairwise
from typing import Any

import pytest

from tasks.runtime.process.launch import CHECKOUT

spec = importlib.util.spec_from_file_location("rooms", CHECKOUT / "infra" / "rooms.py")
assert spec and spec.loader
rooms: Any = importlib.util.module_from_spec(spec)
sys.modules["rooms"] = rooms  # where its dataclasses look their module up
spec.loader.exec_module(rooms)
PLANS = rooms.plans()


@pytest.mark.parametrize("folder", [folder for folder in PLANS if folder != "house"])
def test_rooms_are_the_children_of_the_folder(folder: str):
    children = {
        path.stem
        for path in CHECKOUT.joinpath(*folder.split(".")).iterdir()
        if (path.suffix == ".py" and path.stem != "__init__") or (path / "__init__.py").exists()
    }
    assert set(PLANS[folder].rooms) == children and len(children) > 5
    assert all(room.words for room in PLANS[folder].rooms.values())


@pytest.mark.parametrize("folder", list(PLANS))
def test_the_drawing(folder: str):
    plan = PLANS[folder]
    floor_of = {name: index for index, floor in enumerate(plan.floors) for name in floor}
    assert plan.imports and all(floor_of[upper] < floor_of[lower] for upper, lower in plan.imports)
    reduced = rooms.Plan(plan.floors, plan.rooms, frozenset(plan.reduced()), plan.outside)
    assert reduced.imports <= plan.imports
    assert all(reduced.below(name) == plan.below(name) for name in plan.rooms), (
        "an import that no chain of arrows shows"
    )

    layout = rooms._layout(plan)
    width = {place: layout.box if isinstance(place, str) else rooms.PASSING for row in layout.rows for place in row}
    for row in layout.rows:
        for left, right in pairwise(row):
            assert layout.x[right] - layout.x[left] >= (width[left] + width[right]) // 2
        assert layout.x[row[0]] >= width[row[0]] // 2 and layout.x[row[-1]] + width[row[-1]] // 2 <= rooms.WIDTH

    svg = rooms.picture(plan)
    assert svg == rooms.picture(rooms.plans()[folder])
    elements = list(ElementTree.fromstring(svg).iter())
    arrows = [element for element in elements if element.get("marker-end")]
    boxes = [element for element in elements if element.get("rx") == "5"]
    assert len(arrows) == len(reduced.imports) and len(boxes) == len(plan.rooms)


def test_imports_are_those_of_the_code():
    flows, house = PLANS["flows"], PLANS["house"]
    assert "pins" in flows.imported_by("compose") and "recipes" in flows.outside["compose"]
    assert house.imported_by("recipes") == set() and house.imported_by("tasks.runtime") == {"recipes"}


def test_the_pages_are_current():
    for name, text in rooms.pages().items():
        assert (CHECKOUT / "docs" / name).read_text(encoding="utf-8") == text, "run `make docs`"
