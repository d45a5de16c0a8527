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
        needs: Keys of the steps that have to be made before it.
    """

    key: str
    fingerprint: str
    hit: bool
    why: str
    fields: tuple[str, ...] = ()
    environment: str | None = None
    download_bytes: int = 0
    needs: tuple[str, ...] = ()

    def __str__(self) -> str:
        line = f"{'hit ' if self.hit else 'make'}  {self.key:<34} {self.fingerprint[:12]}"
        if self.hit:
            return line if self.why == "hit" else f"{line}  {self.why}"
        return f"{line}  {self.why}" + "".join(f"\n{'':>6}{field}" for field in self.fields)


def known_inputs(step: Step, artifacts: dict[str, Artifact]) -> dict[str, Artifact] | None:
    """The step's inputs as artifacts, or None while one of them has not been made."""
    inputs: dict[str, Artifact] = {}
    for name, source in step.inputs.items():
        artifact = source.artifact if isinstance(source, External) else artifacts.get(source.key)
        if artifact is None:
            return None
        inputs[name] = artifact
    return inputs


def needs(step: Step) -> list[str]:
    """Keys of the steps that have to be made before this one."""
    return [source.key for source in (*step.inputs.values(), *step.after) if isinstance(source, Step)]


def plan(recipe: Recipe, pins: Pins, store: Store, *, only: Sequence[str] = ()) -> list[Planned]:
    """Dry run of `compose`: the same lookups as a run, nothing is started; `only` as there."""
    artifacts: dict[str, Artifact] = {}
    lines: list[Planned] = []
    store = store.snapshot()

    def look(step: Step) -> None:
        inputs = known_inputs(step, artifacts)
        if inputs is None:
            sources = [source for source in step.inputs.values() if isinstance(source, Step)]
            why = f"after {', '.join(source.key for source in sources if source.key not in artifacts)}"
        else:
            stored = lookup(step, inputs, store)
            why = stored.why
            if artifact := stored.artifact or stored.remote:
                artifacts[step.key] = artifact
                size = store.download_bytes(stored)
                lines.append(
                    Planned(key=step.key, fingerprint=step.fingerprint, hit=True, why=why, download_bytes=size)
                )
                return
        if step.stage == "choose" and len(between := candidates(step)) > 1:
            why = f"decided at run time: {' or '.join(between)}" + (f", {why}" if inputs is None else "")
        lines.append(
            Planned(
                key=step.key,
                fingerprint=step.fingerprint,
                hit=False,
                why=why,
                fields=tuple(store.nearest(step.stage, step.slug, step.identity)),
                environment=step.environment,
                needs=tuple(needs(step)),
            )
        )

    compose(recipe, pins, look, only=only)
    return lines
