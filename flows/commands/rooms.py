"""The rooms of the code, as pictures and tables: which room imports which. `python -m flows.commands.docs` writes them.

A room is a direct child of flows/, recipes/, tasks/, tasks/runtime/ or tasks/jobs/. Floors are the layers that
pyproject.toml gives to import-linter; imports are read from the code by grimp, import-linter's own library. The drawing
follows Sugiyama, Tagawa and Toda 1981: an edge that passes a floor gets a place of its own there, each floor is ordered
by the mean place of its neighbours, and then moved under them. Integers only, so the same code gives the same bytes.
"""

from __future__ import annotations

import ast
import re
import textwrap
import tomllib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from html import escape
from itertools import pairwise
from pathlib import Path

import grimp

CHECKOUT = Path(__file__).resolve().parents[2]
HOUSE = (("flows",), ("tasks", "tasks.jobs"), ("tasks.runtime",), ("recipes",))
CAPTIONS = {
    "house": "`tasks` is one file per stage. It names its job in `tasks.jobs` as a string; a child process imports it.",
    "flows": "`flows/`: in which order.",
    "tasks": "`tasks/`: one file per stage, the jobs and the machinery.",
    "tasks.jobs": "`tasks/jobs/`: the heavy bodies, in child processes.",
    "tasks.runtime": "`tasks/runtime/`: the machinery under every stage.",
    "recipes": "`recipes/`: what is wanted.",
}

WIDTH, MARGIN, GAP, FLOOR_GAP = 900, 20, 16, 34
WIDEST_BOX, NARROWEST_WITH_WORDS = 330, 130
PASSING = 14  # room beside the boxes for an edge that passes a floor
LINE, CHAR = 15, 7  # pixels of a line of 12 px text, and of a character in a wide font
COLOURS = {"folder": ("#dbeafe", "#1d4ed8"), "file": ("#f1f5f9", "#64748b")}

Edge = tuple[str, str]


@dataclass(frozen=True)
class Room:
    """A direct child of one of the five folders.

    Attributes:
        name: As import-linter names it: `plan`; in the picture of the whole house a package, `tasks.jobs`.
        words: First paragraph of its docstring.
        folder: Whether it is a folder of modules; otherwise it is one file.
    """

    name: str
    words: str
    folder: bool


@dataclass(frozen=True)
class Plan:
    """The rooms of one folder.

    Attributes:
        floors: Names of rooms, the highest floor first. A room imports only from floors below its own.
        rooms: Room by name.
        imports: (importing room, imported room), within the folder.
        outside: Room -> packages outside of the folder that it imports.
    """

    floors: tuple[tuple[str, ...], ...]
    rooms: Mapping[str, Room]
    imports: frozenset[Edge]
    outside: Mapping[str, Collection[str]]

    def imported_by(self, room: str) -> set[str]:
        """Rooms of the folder that this one imports, directly."""
        return {lower for upper, lower in self.imports if upper == room}

    def below(self, room: str) -> set[str]:
        """Rooms of the folder that this one reaches, over any number of imports."""
        direct = self.imported_by(room)
        return direct.union(*(self.below(lower) for lower in direct))

    def reduced(self) -> list[Edge]:
        """The imports that no chain of other imports implies, in order."""
        return sorted(
            (upper, lower)
            for upper, lower in self.imports
            if not any(lower in self.below(between) for between in self.imported_by(upper))
        )


@cache
def _import_graph() -> grimp.ImportGraph:
    return grimp.build_graph("flows", "tasks", "recipes", cache_dir=None)


def plans() -> dict[str, Plan]:
    """Folder, dotted -> its rooms; `house` -> the five folders themselves."""
    with (CHECKOUT / "pyproject.toml").open("rb") as file:
        contracts = tomllib.load(file)["tool"]["importlinter"]["contracts"]
    layers = {contract["containers"][0]: contract["layers"] for contract in contracts if "containers" in contract}
    floors = {folder: tuple(tuple(layer.split(" | ")) for layer in rows) for folder, rows in layers.items()}
    return {folder: _plan(folder, floors[folder]) if folder in floors else _plan("", HOUSE) for folder in CAPTIONS}


def _plan(folder: str, floors: tuple[tuple[str, ...], ...]) -> Plan:
    names = [name for floor in floors for name in floor]
    prefix = f"{folder}." if folder else ""
    imports: set[Edge] = set()
    outside: dict[str, set[str]] = {name: set() for name in names}
    graph = _import_graph()
    packages = [name for floor in HOUSE for name in floor]
    for module in sorted(graph.modules):
        upper = _room_of(module, prefix, names)
        if upper is None:
            continue
        for imported in graph.find_modules_directly_imported_by(module):
            lower = _room_of(imported, prefix, names)
            if lower is None:
                outside[upper].add(_room_of(imported, "", packages) or imported)
            elif lower != upper:
                imports.add((upper, lower))
    rooms = {name: _room(name, CHECKOUT.joinpath(*f"{prefix}{name}".split("."))) for name in names}
    return Plan(floors, rooms, frozenset(imports), {name: sorted(packages) for name, packages in outside.items()})


def _room_of(module: str, prefix: str, names: Sequence[str]) -> str | None:
    """The room that a module lies in: `tasks.jobs` before `tasks`."""
    matches = [name for name in names if f"{module}.".startswith(f"{prefix}{name}.")]
    return max(matches, key=len, default=None)


def _room(name: str, path: Path) -> Room:
    source = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    docstring = ast.get_docstring(ast.parse(source.read_text(encoding="utf-8"))) or ""
    return Room(name, " ".join(docstring.partition("\n\n")[0].split()), folder=path.is_dir())


def page() -> str:
    """docs/rooms.md, below its note: a picture and a table for each folder."""
    lines = [
        "# The rooms",
        "",
        "A room is a direct child of `flows/`, `recipes/`, `tasks/`, `tasks/runtime/` or `tasks/jobs/`: a folder",
        "(blue) or one file (grey). A room imports only from floors below its own. The pictures leave out imports",
        "from other folders, and imports that other arrows imply: A → C beside A → B → C. The tables have all of them.",
    ]
    for folder, plan in plans().items():
        title = "The whole house" if folder == "house" else f"{folder.replace('.', '/')}/"
        lines += ["", f"## {title}", "", f"![{title}]({picture_name(folder)})", "", CAPTIONS[folder]]
        if folder != "house":
            lines += ["", *_table(plan)]
    return "\n".join(lines) + "\n"


def _table(plan: Plan) -> Iterator[str]:
    yield from ["| floor | room | what it does | imports |", "| ---: | --- | --- | --- |"]
    for number, floor in zip(range(len(plan.floors), 0, -1), plan.floors, strict=True):
        for name in floor:
            inside = [f"`{lower}`" for row in plan.floors for lower in row if (name, lower) in plan.imports]
            outside = [f"*{package}*" for package in plan.outside[name]]
            cells = (str(number), f"`{_label(plan.rooms[name])}`", table_cell(plan.rooms[name].words))
            yield f"| {' | '.join(cells)} | {', '.join(inside + outside) or 'nothing of ours'} |"


def table_cell(text: str) -> str:
    """Text as a cell of a Markdown table.

    Code with a bar becomes HTML, since GitHub and MkDocs read a bar in backticks differently.
    """
    parts = text.replace("\n", " ").split("`")
    for index, part in enumerate(parts):
        if index % 2 == 0:
            parts[index] = re.sub(r"<(?=[\w/!])", "&lt;", part.replace("|", "\\|"))
        else:
            code = re.sub(r"[\\*_\[\]|<>&]", lambda sign: f"&#{ord(sign[0])};", part)
            parts[index] = f"<code>{code}</code>" if "|" in part else f"`{part}`"
    return "".join(parts)


def _label(room: Room) -> str:
    return f"{room.name}/" if room.folder else f"{room.name}.py"


def picture_name(folder: str) -> str:
    """Path below docs/."""
    return f"rooms/{folder.replace('.', '-')}.svg"


# --- the drawing ---

Place = str | tuple[str, str, int]  # a room, or where an edge passes a floor: (upper, lower, floor)


@dataclass(frozen=True)
class Layout:
    """Where everything stands, in pixels.

    Attributes:
        rows: Places of each floor, from left to right.
        x: Centre of each place.
        paths: The places that each edge goes through, from its upper to its lower room.
        box: Width of a box.
    """

    rows: list[list[Place]]
    x: Mapping[Place, int]
    paths: list[list[Place]]
    box: int


def picture(plan: Plan) -> str:
    """An SVG of WIDTH pixels with a white background of its own."""
    layout = _layout(plan)
    words = {name: _wrapped(room, layout.box) for name, room in plan.rooms.items()}
    top, bands = MARGIN, []
    for floor in plan.floors:
        height = 26 + LINE * max(len(words[name]) for name in floor)
        bands.append((top, height))
        top += height + FLOOR_GAP
    total = top - FLOOR_GAP + MARGIN
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {total}" width="{WIDTH}" height="{total}" '
        'font-family="system-ui, Helvetica, Arial, sans-serif" font-size="12">',
        '<defs><marker id="arrow" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0 0L8 4L0 8z" fill="#334155"/></marker></defs>',
        f'<rect width="{WIDTH}" height="{total}" rx="8" fill="#ffffff"/>',
    ]
    lines += [
        f'<rect x="8" y="{y - 8}" width="{WIDTH - 16}" height="{height + 16}" rx="6" fill="#f8fafc"/>'
        for y, height in bands
    ]
    lines += [_arrow(path, layout, bands) for path in layout.paths]
    for row, (y, height) in zip(layout.rows, bands, strict=True):
        for place in row:
            if isinstance(place, str):
                lines += _box(plan.rooms[place], words[place], layout.x[place] - layout.box // 2, y, layout.box, height)
    return "\n".join([*lines, "</svg>"]) + "\n"


def _wrapped(room: Room, box: int) -> list[str]:
    if box < NARROWEST_WITH_WORDS:
        return []
    words = room.words.replace("`", "").rstrip(".")
    return textwrap.wrap(words, (box - 16) // CHAR, max_lines=3 if box > 200 else 4, placeholder=" …")


def _box(room: Room, words: Sequence[str], x: int, y: int, width: int, height: int) -> Iterator[str]:
    fill, stroke = COLOURS["folder" if room.folder else "file"]
    yield f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="5" fill="{fill}" stroke="{stroke}"/>'
    label, size = (_label(room), 14) if width >= NARROWEST_WITH_WORDS else (room.name, 13)
    yield f'<text x="{x + 8}" y="{y + 18}" font-size="{size}" font-weight="700" fill="#0f172a">{escape(label)}</text>'
    for index, line in enumerate(words):
        yield f'<text x="{x + 8}" y="{y + 35 + LINE * index}" fill="#334155">{escape(line)}</text>'


def _arrow(path: Sequence[Place], layout: Layout, bands: Sequence[tuple[int, int]]) -> str:
    floor_of = {place: floor for floor, row in enumerate(layout.rows) for place in row}
    start = path[0]
    y, height = bands[floor_of[start]]
    x, y = _port(path, 0, layout), y + height
    curve = f"M{x} {y}"
    for index, place in enumerate(path[1:], 1):
        top, height = bands[floor_of[place]]
        end = _port(path, index, layout)
        middle = (y + top) // 2
        curve += f"C{x} {middle} {end} {middle} {end} {top - (1 if index == len(path) - 1 else 0)}"
        x, y = end, top + height
        if index < len(path) - 1:
            curve += f"V{y}"
    return f'<path d="{curve}" fill="none" stroke="#334155" stroke-width="1.3" marker-end="url(#arrow)"/>'


def _port(path: Sequence[Place], index: int, layout: Layout) -> int:
    """Where an edge leaves or enters a place: on a box they are spread from left to right, by where they lead."""
    place, last = path[index], index == len(path) - 1
    if not isinstance(place, str):
        return layout.x[place]
    ends = [(other[-1], other[-2]) if last else (other[0], other[1]) for other in layout.paths]
    leads_to = sorted((layout.x[next_place], str(next_place)) for end, next_place in ends if end == place)
    own = path[-2] if last else path[1]
    rank = leads_to.index((layout.x[own], str(own)))
    return layout.x[place] - layout.box // 2 + layout.box * (rank + 1) // (len(leads_to) + 1)


def _layout(plan: Plan) -> Layout:
    floor_of = {name: index for index, floor in enumerate(plan.floors) for name in floor}
    rows: list[list[Place]] = [list(floor) for floor in plan.floors]
    paths: list[list[Place]] = []
    for upper, lower in plan.reduced():
        passed: list[Place] = [(upper, lower, floor) for floor in range(floor_of[upper] + 1, floor_of[lower])]
        for place in passed:
            if isinstance(place, tuple):
                rows[place[2]].append(place)
        paths.append([upper, *passed, lower])
    rows = _ordered(rows, paths)
    fits = (
        (WIDTH - 2 * MARGIN - GAP * (len(row) - 1) - PASSING * (len(row) - len(floor))) // len(floor)
        for row, floor in zip(rows, plan.floors, strict=True)
    )
    box = min(WIDEST_BOX, *fits)
    return Layout(rows, _moved(rows, paths, box), paths, box)


def _neighbours(paths: Sequence[Sequence[Place]]) -> dict[Place, list[Place]]:
    neighbours: dict[Place, list[Place]] = {}
    for path in paths:
        for upper, lower in pairwise(path):
            neighbours.setdefault(upper, []).append(lower)
            neighbours.setdefault(lower, []).append(upper)
    return neighbours


def _crossings(rows: Sequence[Sequence[Place]], paths: Sequence[Sequence[Place]]) -> int:
    at = {place: index for row in rows for index, place in enumerate(row)}
    floor_of = {place: floor for floor, row in enumerate(rows) for place in row}
    pieces = [(floor_of[upper], at[upper], at[lower]) for path in paths for upper, lower in pairwise(path)]
    return sum(
        one_floor == floor and (one_top - top) * (one_bottom - bottom) < 0
        for index, (floor, top, bottom) in enumerate(pieces)
        for one_floor, one_top, one_bottom in pieces[index + 1 :]
    )


def _ordered(rows: list[list[Place]], paths: list[list[Place]]) -> list[list[Place]]:
    """Each floor by the mean place of its neighbours, up and down; the order with the fewest crossings is kept."""
    neighbours, best = _neighbours(paths), rows
    for sweep in range(24):
        at = {place: 1000 * (2 * index + 1) // (2 * len(row)) for row in rows for index, place in enumerate(row)}
        rows = [list(row) for row in rows]
        for row in rows if sweep % 2 else reversed(rows):
            middle = {place: _mean([at[other] for other in neighbours.get(place, [place])]) for place in row}
            row.sort(key=lambda place, middle=middle: (middle[place], str(place)))
            at |= {place: 1000 * (2 * index + 1) // (2 * len(row)) for index, place in enumerate(row)}
        best = min(best, rows, key=lambda candidate: _crossings(candidate, paths))
    return best


def _moved(rows: Sequence[Sequence[Place]], paths: Sequence[Sequence[Place]], box: int) -> dict[Place, int]:
    """Centre of each place: near the mean of its neighbours, in its row's order, without overlap."""
    neighbours = _neighbours(paths)
    x: dict[Place, int] = {place: WIDTH // 2 for row in rows for place in row}
    for sweep in range(40):
        for row in rows if sweep % 2 else reversed(rows):
            wanted = [_mean([x[other] for other in neighbours.get(place, [place])]) for place in row]
            widths = [box if isinstance(place, str) else PASSING for place in row]
            x |= dict(zip(row, _apart(wanted, widths), strict=True))
    halves = {place: (box if isinstance(place, str) else PASSING) // 2 for place in x}
    left, right = min(x[place] - halves[place] for place in x), max(x[place] + halves[place] for place in x)
    return {place: centre + (WIDTH - left - right) // 2 for place, centre in x.items()}


def _apart(wanted: Sequence[int], widths: Sequence[int]) -> list[int]:
    """Centres nearest to the wanted ones that keep their order, GAP between them and MARGIN beside them.

    Pool adjacent violators (Ayer et al. 1955) on what is left when the least distances are taken off.
    """
    offsets = [0]
    for left, right in pairwise(widths):
        offsets.append(offsets[-1] + (left + right) // 2 + GAP)
    pools: list[list[int]] = []
    for centre, offset in zip(wanted, offsets, strict=True):
        pools.append([centre - offset])
        while len(pools) > 1 and _mean(pools[-2]) > _mean(pools[-1]):
            last = pools.pop()
            pools[-1] += last
    lowest, highest = MARGIN + widths[0] // 2, WIDTH - MARGIN - widths[-1] // 2 - offsets[-1]
    shifts = [min(max(_mean(pool), lowest), highest) for pool in pools for _ in pool]
    return [shift + offset for shift, offset in zip(shifts, offsets, strict=True)]


def _mean(numbers: Sequence[int]) -> int:
    return sum(numbers) // len(numbers)
