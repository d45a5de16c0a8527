"""plan: every step of a recipe as hit or make, with the reason, before anything runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from flows.compose import compose
from flows.pins import Pins
from recipes.schema import Recipe
from tasks.choose import candidates
from tasks.runtime.step import External, Step, lookup
from tasks.runtime.store.local import Artifact, Store


@dataclass(frozen=True, kw_only=True)
class Planned:
    """One line of the plan.

    Attributes:
        fields: What differs from the nearest artifact of the same step.
        download_bytes: Of a hit that is in the bucket and not here.
        environment: Python environment that makes it; None for the main one.
    """

    key: str
    fingerprint: str
    hit: bool
    why: str
    fields: tuple[str, ...] = ()
    environment: str | None = None
    download_bytes: int = 0

    def __str__(self) -> str:
        line = f"{'hit ' if self.hit else 'make'}  {self.key:<34} {self.fingerprint[:12]}"
        if self.hit:
            return line if self.why == "hit" else f"{line}  {self.why}"
        return f"{line}  {self.why}" + "".join(f"\n{'':>6}{one}" for one in self.fields)


def known_inputs(step: Step, artifacts: dict[str, Artifact]) -> dict[str, Artifact] | None:
    """The step's inputs as artifacts, or None while one of them has not been made."""
    found: dict[str, Artifact] = {}
    for name, one in step.inputs.items():
        artifact = one.artifact if isinstance(one, External) else artifacts.get(one.key)
        if artifact is None:
            return None
        found[name] = artifact
    return found


def plan(recipe: Recipe, pins: Pins, store: Store, *, only: Sequence[str] = ()) -> list[Planned]:
    """Dry run of `compose`: the same lookups as a run, nothing is started; `only` as there."""
    artifacts: dict[str, Artifact] = {}
    lines: list[Planned] = []
    store = store.snapshot()

    def look(step: Step) -> None:
        inputs = known_inputs(step, artifacts)
        if inputs is None:
            waits = [one.key for one in step.inputs.values() if isinstance(one, Step) and one.key not in artifacts]
            why = f"after {', '.join(waits)}"
        else:
            found = lookup(step, inputs, store)
            if there := found.artifact or found.remote:
                artifacts[step.key] = there
                size = store.download_bytes(found)
                hit = Planned(key=step.key, fingerprint=step.fingerprint, hit=True, why=found.why, download_bytes=size)
                lines.append(hit)
                return
            why = found.why
        if step.stage == "choose" and len(between := candidates(step)) > 1:
            why = f"decided at run time: {' or '.join(between)}" + (f", {why}" if inputs is None else "")
        fields = tuple(store.nearest(step.stage, step.slug, step.identity))
        line = Planned(
            key=step.key,
            fingerprint=step.fingerprint,
            hit=False,
            why=why,
            fields=fields,
            environment=step.environment,
        )
        lines.append(line)

    compose(recipe, pins, look, only=only)
    return lines
