"""What every refusal is made of. Standard library only: everything else may import this."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from recipes.secrets import hide


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One thing that is wrong, in the four parts that let a reader act on it.

    Secrets in them are hidden. They quote recipes, rows and names of files, which are other people's: what cannot be
    printed (an escape sequence that a terminal obeys, a no-break space that nobody sees) stands in them as its escape.

    Attributes:
        what: What is wrong, one sentence.
        where: File and line, recipe field, layer or row: `recipe.yaml:12 train.rank`.
        why: Why Quench cannot go on with it.
        next: What to type or change next.
    """

    what: str
    where: str
    why: str
    next: str

    def __post_init__(self) -> None:
        for part in fields(self):
            object.__setattr__(self, part.name, printable(hide(getattr(self, part.name))))  # frozen: no other way

    def __str__(self) -> str:
        return f"{self.what}\n  where: {self.where}\n  why:   {self.why}\n  next:  {self.next}"

    def as_dict(self) -> dict[str, str]:
        """The four parts as JSON-able strings."""
        return asdict(self)

    def error(self) -> RecipeError:
        """The refusal for this one problem: `raise Problem(...).error()`."""
        return RecipeError([self])


class RecipeError(Exception):
    """Bad input, found before anything was spent: carries every problem at once (exit code 2)."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(str(problem) for problem in self.problems))


def printable(text: str) -> str:
    """The text with the escape of every character that cannot be printed; line feeds stay."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() or char == "\n" else ascii(char)[1:-1] for char in text)


def shown(path: Path) -> str:
    """The path as a reader types it: relative where it lies below the current folder."""
    here = Path.cwd()
    full = path if path.is_absolute() else here / path
    return str(full.relative_to(here)) if full.is_relative_to(here) else str(path)
