"""A run whose steps are made on the nodes of a Ray cluster, through Prefect's Ray task runner.

Ray's resources are the leases and Ray decides where. A worker or node that dies has its step made again elsewhere; a
step that fails by itself is not tried again. The run's folder, MLflow and the report stay with the flow's process.
"""

from __future__ import annotations

import contextlib
import functools
from dataclasses import asdict
from typing import Any

import ray
from prefect_ray import RayTaskRunner
from prefect_ray.context import remote_options
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from flows.cluster.node import FailedOnNode, Handle, Landed, Order, Place, make_on_node
from flows.pipeline import PrefectSession
from flows.plan.lookup import known_inputs, needs
from flows.plan.validate import Validated
from flows.run.folder import RunRecord
from flows.tracking.tracker import Tracker
from recipes.problem import Problem
from tasks.runtime.process.errors import StepFailed
from tasks.runtime.process.launch import Launcher
from tasks.runtime.step import Outcome, Step, lookup, resources
from tasks.runtime.store.local import StoreTrouble

RETRIES = 3  # of a step whose worker or node died
LOOK_S = 0.5
STOP_S = 5.0


class ClusterSession(PrefectSession):
    """Submits steps to Ray, and takes in what lands, in the order of the composition."""

    def __init__(self, validated: Validated, launcher: Launcher, record: RunRecord, tracker: Tracker) -> None:
        super().__init__(validated, launcher, record, tracker)
        self.landed: set[str] = set()

    def do(self, step: Step) -> None:
        """As on one machine; but what this home has and the bucket lacks is uploaded here: no node could see it."""
        inputs = known_inputs(step, self.artifacts)
        if inputs is not None and (stored := lookup(step, inputs, self.store)).remote:
            digests = {name: artifact.digest for name, artifact in inputs.items()}
            lock = self.store.lock(step.stage, step.fingerprint)
            with contextlib.suppress(StoreTrouble), lock:  # a node finds out for itself whether the bucket answers
                if self.store.bring(stored) is None:
                    self.store.take_up(step.stage, step.slug, step.fingerprint, inputs=digests)
        super().do(step)

    def submit(self, step: Step, before: list[Any]) -> Any:
        """Hand one step to Ray, which starts it when what it reads has landed."""
        keys = [source.key for source in _read(step)]
        known = {
            key: Handle.of(self.steps[key], self.artifacts[key], self.store.home)
            for key in keys
            if key in self.artifacts
        }
        awaited = [self.futures[key] for key in keys if key not in known and key in self.futures]
        options, place = self._lease(step), Place.of(self.store.home)
        limits, cpus = self.context.limits, options["num_cpus"]
        order = functools.partial(Order, step=step, known=known, limits=limits, place=place, cpus=cpus)
        unique = {id(future): future for future in (*before, *awaited)}.values()
        with remote_options(**options):
            return make_on_node.submit(key=step.key, order=order, before=list(unique))

    def _lease(self, step: Step) -> dict[str, Any]:
        """What Ray has to lease; speed is measured on the flow's own node, whose hardware its identity names."""
        need = resources(step, self.context.limits)
        if not step.whole_machine:
            return {"num_cpus": need.cpus, "num_gpus": need.gpus, "max_retries": RETRIES}
        own = ray.get_runtime_context().get_node_id()
        (here,) = (node for node in ray.nodes() if node["NodeID"] == own)
        return {
            "num_cpus": int(here["Resources"]["CPU"]),
            "num_gpus": need.gpus,
            "max_retries": RETRIES,
            "scheduling_strategy": NodeAffinitySchedulingStrategy(node_id=own, soft=False),
        }

    def wait(self) -> None:
        """Return when every task that was submitted has ended, taking each in when it does."""
        while left := self._left():
            try:
                ready, _ = ray.wait(list(left.values()), num_returns=len(left), timeout=LOOK_S)
            except SystemError as error:  # how Ray passes on what a signal's handler raised: Prefect's on SIGTERM
                raise (error.__cause__ or error) from None
            for key in [key for key, task in left.items() if task in ready]:  # a step's inputs come before it
                self._land(key)

    def stop(self) -> None:
        """Cancel what is left: its worker is killed, and the kernel ends the worker's child."""
        left = list(self._left().values())
        for task in left:
            with contextlib.suppress(RayError):
                ray.cancel(task, force=True, recursive=True)
        if left:
            ray.wait(left, num_returns=len(left), timeout=STOP_S)

    def _left(self) -> dict[str, Any]:
        return {key: future.wrapped_future for key, future in self.futures.items() if key not in self.landed}

    def _land(self, key: str) -> None:
        step, future = self.steps[key], self.futures[key]
        self.landed.add(key)
        future.wait()
        if any(needed not in self.artifacts for needed in needs(step)):
            self.record.add(step, "skipped", problem=self.skipped(key))
            return
        result = future.result(raise_on_failure=False)
        if isinstance(result, Landed):
            self._take(step, result)
        elif isinstance(result, FailedOnNode):
            self.failed(step, result, node=asdict(result.node))
        elif future.state.is_crashed():
            self.record.add(step, "failed", problem=_lost(key, future.state.message).as_dict())
            self.display.ended(key, f"fail  {key:<36} its node or worker was lost", style="red")

    def _take(self, step: Step, landed: Landed) -> None:
        try:
            artifact = landed.handle.take(self.store)
        except StepFailed as error:  # it was made, and cannot be read here: the next run finds it
            self.failed(step, error, node=asdict(landed.node))
            return
        self.done(step, Outcome(artifact=artifact, hit=landed.hit), node=asdict(landed.node))


class ClusterRunner(RayTaskRunner[Any]):
    """Prefect's Ray task runner, with the session that goes with it."""

    session = ClusterSession


def _read(step: Step) -> list[Step]:
    """Steps whose artifacts a step reads; a choice is read with what it may name."""
    sources = [source for source in step.inputs.values() if isinstance(source, Step)]
    return [*sources, *(other for source in sources if source.stage == "choose" for other in _read(source))]


def _lost(key: str, why: str | None) -> Problem:
    return Problem(
        what=f"The Ray worker or node that made this was lost, {RETRIES + 1} times.",
        where=key,
        why=(why or "Ray does not say why").splitlines()[0],
        next="Look at `ray status` and at Ray's log on that node; the same command again goes on.",
    )
