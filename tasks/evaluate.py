"""evaluate: one arm, loaded from its stored artifact in a fresh process -> scores, one line per row and metric."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from recipes.arms import KV
from recipes.nulls import Machine, Null, other_batch, other_threads
from recipes.schema import Recipe
from tasks.arm import readers, scorer_packages, trust
from tasks.runtime.step import External, Step


@dataclass(frozen=True, kw_only=True)
class Computing:
    """How an arm's sums are computed: what its last bits depend on beside the files.

    Which kernel multiplies quantized weights follows from the device, the files and GPTQModel's version, but for
    Marlin, which wants a compiler: the job's result names the kernel that ran.

    Attributes:
        device: `cpu`, or the kind of GPU (tasks/runtime/gpus.py).
        attention: transformers' attn_implementation; None for its own choice.
        batch_size: Rows per forward pass; None for the recipe's.
        threads: CPU threads; None for the run's, which are no part of the identity.
    """

    device: str = "cpu"
    attention: str | None = None
    batch_size: int | None = None
    threads: int | None = None

    @classmethod
    def of(cls, null: Null | None, recipe: Recipe, machine: Machine, *, device: str) -> Computing:
        """That of an arm, or of a null arm, where one thing is other."""
        if null == "batch":
            return cls(device=device, batch_size=other_batch(recipe.evaluate.batch_size))
        if null == "threads":
            return cls(device=device, threads=other_threads(machine))
        return cls(device=device, attention="eager" if null == "attention" else None)

    def params(self) -> dict[str, Any]:
        """For the identity; what is None is the recipe's or nobody's."""
        more = {"batch_size": self.batch_size, "threads": self.threads}
        named = {name: value for name, value in more.items() if value is not None}
        return {"device": self.device, "attention": self.attention, **named}


def step(
    recipe: Recipe,
    arm: str,
    *,
    kind: str,
    inputs: Mapping[str, Step | External],
    kv: KV | None = None,
    computed: Computing | None = None,
    chosen_by_dev: bool = True,
    after: tuple[Step, ...] = (),
) -> Step:
    """Scores of an arm.

    Args:
        recipe: The recipe.
        arm: Its slug.
        kind: How its model is loaded.
        inputs: model, dataset and, where there are, reference, adapter, calibset (KV scales), what scorers read.
        kv: How its KV cache is stored; None for bf16.
        computed: Device, kernel and sizes; None for a CPU and the recipe's.
        chosen_by_dev: Something chooses by its answers to dev; without it they are not decoded, only those to test.
        after: Steps that have to be made before it starts.
    """
    settings = recipe.evaluate
    external = settings.externals.get(arm)
    template = {"chat_template": external.chat_template} if external and external.chat_template else {}
    computing = computed or Computing()
    return Step(
        stage="evaluate",
        slug=arm,
        entry="tasks.jobs.evaluate:run",
        version=5,
        params={
            "kind": kind,
            "kv": kv,
            "scorers": [scorer.params() for scorer in settings.scorers],
            **settings.model_dump(include={"max_new_tokens", "batch_size", "seed"}),
            **computing.params(),
            **({} if chosen_by_dev else {"decoded": ["test"]}),
            **template,
            **trust(recipe, arm),
        },
        inputs=inputs,
        tools=(*readers(inputs["model"]), *scorer_packages(recipe)),
        after=after,
        threads=computing.threads,
        gpus=1,
    )
