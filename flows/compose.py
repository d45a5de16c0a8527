"""compose: the pipeline in one sentence. What runs it and what plans it differ only in `do`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from flows.pins import Pins
from recipes.arms import EXTERNAL, TRAINED, Arm, Calibration, arms, controls
from recipes.models.adapters import read_adapter
from recipes.models.headers import read_headers
from recipes.nulls import Machine
from recipes.schema import Recipe
from recipes.schemes.ranks import ServedModel
from recipes.schemes.scheme import Scheme
from tasks import calibrate, choose, evaluate, measure, merge, prepare, quantize, reference, rehearse, serve, train
from tasks.runtime.gpus import device_kind
from tasks.runtime.process.leases import cpu_slots
from tasks.runtime.step import External, Limits, Step, present, resolve_device


@dataclass(frozen=True, kw_only=True)
class ArmSteps:
    """An arm and the steps that make it, score it, time it and serve it.

    `model` is None for the untouched base and for an external model; `evaluate` for an arm that cannot be; `measure`
    also where only the KV cache differs, which no kernel of ours stores smaller, or only the computing; `serve` where
    `unserved` says why.
    """

    arm: Arm
    model: Step | None
    adapter: Step | None
    evaluate: Step | None
    measure: Step | None
    serve: Step | None
    unserved: str | None

    @property
    def steps(self) -> dict[str, Step | None]:
        """What it is for -> the step."""
        return {name: step for name, step in vars(self).items() if name not in ("arm", "unserved")}

    @property
    def keys(self) -> dict[str, str | None]:
        """What it is for -> the key of the step."""
        return {name: step and step.key for name, step in self.steps.items()}


@dataclass(frozen=True, kw_only=True)
class Matrix:
    """All steps in the order in which they were composed, the arms, and the slug of what they are measured against."""

    steps: tuple[Step, ...]
    arms: tuple[ArmSteps, ...]
    reference: str | None


def limits(recipe: Recipe) -> Limits:
    """The recipe's `run:` section with its defaults filled in for this machine."""
    device = resolve_device(recipe.run.device)
    return Limits(
        device=device,
        threads=machine(recipe, device).threads,
        micro_batch=recipe.run.micro_batch,
        processes=recipe.run.processes,
        launcher=recipe.run.launcher,
        time_limit_s=recipe.run.time_limit_s,
        log_level=recipe.run.log_level,
    )


def machine(recipe: Recipe, device: str) -> Machine:
    """What null arms depend on; `device` is `cpu` or `cuda`."""
    threads, slots = recipe.run.threads or (4 if device == "cuda" else 1), cpu_slots()
    return Machine(device=device, threads=min(threads, slots), slots=slots)


def compose(
    recipe: Recipe,
    pins: Pins,
    do: Callable[[Step], object],
    *,
    only: Sequence[str] = (),
    device: str | None = None,
) -> Matrix:
    """Spell the pipeline out, step by step; `do` is called once per step, after the steps that it needs.

    With `do` = submit Prefect runs it, with `do` = a lookup it is the plan: they cannot drift apart.

    Args:
        recipe: The recipe.
        pins: What it reads from outside.
        do: What is done with a step.
        only: Slugs of the arms that are wanted, or `external` for all of those: what they do not need is not done.
        device: Where arms are scored, for a plan of another machine; None for what the recipe says of this one.
    """
    here = machine(recipe, device or limits(recipe).device)
    every = arms(recipe, adapter=read_adapter(pins.adapter.path).config if pins.adapter else None, machine=here)
    wanted = [arm for arm in every if _is_wanted(arm, only)]
    pipeline = _Pipeline(recipe, pins, reference_slug=_reference_slug(recipe, wanted), machine=here)
    possible = [arm for arm in every if arm.unavailable is None]
    own_files = [arm for arm in possible if arm.of is None]
    pipeline.calibrate(controls(possible))
    for arm in own_files:  # before the choice, which may read the scores of the merged models
        if arm.scheme is None:
            pipeline.score(arm, pipeline.merged.get(arm.merge_base or ""))
    chosen = pipeline.choose()
    quantized = [(arm, pipeline.quantize(arm, arm.scheme, chosen)) for arm in own_files if arm.scheme]
    for arm, model in quantized:
        pipeline.score(arm, model)
    for arm in possible:
        if arm.of is not None:
            pipeline.score(arm, pipeline.models[arm.of])
    pipeline.measure(own_files)
    pipeline.serve(possible)
    rows = [pipeline.steps_of(arm) for arm in wanted]
    steps = reached(pipeline.steps, rows) if only else tuple(pipeline.steps)
    for step in steps:
        do(step)
    return Matrix(steps=steps, arms=tuple(rows), reference=pipeline.reference_slug)


class _Pipeline:
    """The steps so far, in their order, and what the next ones need of them.

    Attributes:
        merged: Merge base -> the merge step.
        models: Slug of an arm -> the step that makes its model; None where the base or an external model is loaded.
        calibsets: Calibration -> its step.
        scores: Slug of an arm -> its evaluate step.
        speeds: Slug of an arm -> its measure step.
        served: Slug of an arm -> its serve step.
        unserved: Slug of an arm -> why it has none.
    """

    def __init__(self, recipe: Recipe, pins: Pins, *, reference_slug: str | None, machine: Machine) -> None:
        """Data, rehearsal, training, both merges, the reference and the calibration set: what all arms need."""
        self.recipe, self.pins, self.reference_slug = recipe, pins, reference_slug
        self.machine, self.device = machine, device_kind(machine.device)
        self.steps: list[Step] = []
        self.models: dict[str, Step | None] = {}
        self.scores: dict[str, Step] = {}
        self.speeds: dict[str, Step] = {}
        self.served: dict[str, Step] = {}
        self.unserved: dict[str, str] = {}
        self.dataset = self._add(
            prepare.step(recipe, data=pins.data, tokenizer=pins.tokenizer, general=pins.general, template=pins.template)
        )
        self.rehearsed = self._add(rehearse.step(recipe, dataset=self.dataset, scorers=pins.scorers))
        self.adapter = self._add(
            train.step(recipe, dataset=self.dataset, base=pins.base, adapter=pins.adapter, after=(self.rehearsed,))
        )
        self.merged = {
            onto: self._add(merge.step(recipe, base=pins.base, adapter=self.adapter, onto=onto))
            for onto in ("dequantized", "original")
        }
        self._reference = self._add(self._reference_step(reference_slug)) if reference_slug else None
        self._headers = read_headers(pins.base.path)
        widest = self._headers.largest_in_features
        domain = self._add(calibrate.step(recipe, dataset=self.dataset, largest_in_features=widest))
        self.calibsets: dict[Calibration, Step] = {"domain": domain}

    def _add(self, step: Step) -> Step:
        self.steps.append(step)
        return step

    def _reference_step(self, slug: str) -> Step:
        dataset, device = self.dataset, self.device
        if slug == TRAINED:
            return reference.step(
                self.recipe, dataset=dataset, base=self.pins.base, adapter=self.adapter, device=device
            )
        return reference.external(self.recipe, dataset=dataset, model=self.pins.externals[slug], device=device)

    def calibrate(self, kinds: Sequence[Calibration]) -> None:
        """The control sets."""
        own, general = self.calibsets["domain"], self.pins.calibration_text
        for kind in kinds:
            control = calibrate.control(self.recipe, kind, dataset=self.dataset, calibset=own, general=general)
            self.calibsets[kind] = self._add(control)

    def choose(self) -> Step:
        """Which merged model is quantized."""
        scores = {onto: self.scores[f"merged-{onto}"] for onto in self.merged}
        lineage = {"base": self.pins.base, "adapter": self.adapter}
        return self._add(choose.step(self.recipe, merged=self.merged, scores=scores, lineage=lineage))

    def quantize(self, arm: Arm, scheme: Scheme, chosen: Step) -> Step:
        """The model of an arm that has a scheme."""
        return self._add(
            quantize.step(
                self.recipe,
                scheme,
                model=self.pins.base if arm.on_base else chosen,
                calibset=self.calibsets[arm.calibration],
                arm=arm.slug,
                scales_from=self.pins.base if arm.scales_from_base else None,
            )
        )

    def score(self, arm: Arm, model: Step | None) -> None:
        """Evaluate an arm, whose model is then known."""
        self.models[arm.slug] = model
        calibset = self.calibsets["domain"] if arm.kv == "fp8-calibrated" else None
        more = present(reference=self._reference, calibset=calibset)
        inputs = {**self._loaded(arm), **more, **self.pins.scorers}
        computed = evaluate.Computing.of(arm.null, self.recipe, self.machine, device=self.device)
        self.scores[arm.slug] = self._add(
            evaluate.step(
                self.recipe,
                arm.slug,
                kind=arm.kind,
                kv=arm.kv,
                inputs=inputs,
                computed=computed,
                chosen_by_dev=arm.may_be_promoted,
                after=(self.rehearsed,),
            )
        )

    def measure(self, every: Sequence[Arm]) -> None:
        """Time these arms, where the recipe says so."""
        if not self.recipe.measure.enabled:
            return
        run = limits(self.recipe)
        for arm in every:
            inputs = self._loaded(arm)
            self.speeds[arm.slug] = self._add(
                measure.step(
                    self.recipe, arm.slug, kind=arm.kind, device=run.device, threads=run.threads, inputs=inputs
                )
            )

    def serve(self, every: Sequence[Arm]) -> None:
        """Serve what the engine of the recipe reads on this machine."""
        if self.recipe.serve.engine == "none":
            return
        device, model = limits(self.recipe).device, ServedModel.of(self._headers)
        for arm in every:
            if reason := serve.unserved(self.recipe, arm, model=model, device=device):
                self.unserved[arm.slug] = reason
                continue
            inputs = {**self._loaded(arm), "scores": self.scores[arm.slug], **self.pins.scorers}
            self.served[arm.slug] = self._add(serve.step(self.recipe, arm, device=device, inputs=inputs))

    def _loaded(self, arm: Arm) -> dict[str, Step | External]:
        """What an arm is loaded from, and its rows."""
        model = self.pins.externals[arm.slug] if arm.external else self.models[arm.slug] or self.pins.base
        return present(model=model, dataset=self.dataset, adapter=self.adapter if arm.adapter else None)

    def steps_of(self, arm: Arm) -> ArmSteps:
        """The arm with its steps; an unavailable one has none."""
        return ArmSteps(
            arm=arm,
            model=self.models.get(arm.slug),
            adapter=self.adapter if arm.adapter and arm.unavailable is None else None,
            evaluate=self.scores.get(arm.slug),
            measure=self.speeds.get(arm.slug),
            serve=self.served.get(arm.slug),
            unserved=self.unserved.get(arm.slug),
        )


def _reference_slug(recipe: Recipe, wanted: Sequence[Arm]) -> str | None:
    """What KL is measured against: nf4-adapter only where something trained is wanted anyway."""
    return recipe.evaluate.reference or (TRAINED if any(arm.is_trained for arm in wanted) else None)


def _is_wanted(arm: Arm, only: Sequence[str]) -> bool:
    """All are without `only`; the base goes with the external models, which are compared with it."""
    if not only or arm.slug in only:
        return True
    return EXTERNAL in only and (arm.external or arm.slug == "base")


def reached(steps: Sequence[Step], rows: Sequence[ArmSteps]) -> tuple[Step, ...]:
    """The steps that these arms are made, scored and timed by, in their order."""
    keys: set[str] = set()
    ahead = [step for row in rows for step in row.steps.values() if step]
    while ahead:
        step = ahead.pop()
        if step.key not in keys:
            keys.add(step.key)
            ahead += [before for before in (*step.inputs.values(), *step.after) if isinstance(before, Step)]
    return tuple(step for step in steps if step.key in keys)
