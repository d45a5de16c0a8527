"""Step: one planned unit. run_step: the only executor, from lookup to commit."""

from __future__ import annotations

import datetime as dt
import functools
import os
import platform
import re
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from recipes.problem import Problem
from tasks.runtime.fingerprint import canonical, fingerprint
from tasks.runtime.gpus import all_gpus, device_kind, no_gpu, visible_gpus
from tasks.runtime.process.disk import full, has_space, is_full
from tasks.runtime.process.environments import described, environment_problem, interpreter, versions
from tasks.runtime.process.errors import StepFailed
from tasks.runtime.process.events import read_events
from tasks.runtime.process.job import Execution, Input, Job
from tasks.runtime.process.launch import Child, Launcher, child_env
from tasks.runtime.process.leases import GrantedLease, Lease, Leases, NoSuchLeaseError, cpu_slots
from tasks.runtime.process.repeat import keep_start
from tasks.runtime.store.attempt import Attempt
from tasks.runtime.store.local import Artifact, Lookup, LostRaceError, Store, StoreTrouble, read_json

FOLLOW_S = 0.2


@dataclass(frozen=True, kw_only=True)
class External:
    """Something from outside the store: a digest and no history. Its fingerprint is its digest."""

    name: str
    path: Path
    digest: str
    source: str

    @property
    def fingerprint(self) -> str:
        """The digest: the same bytes are the same input, wherever they lie."""
        return self.digest

    @property
    def artifact(self) -> Artifact:
        """As an input of a job."""
        return Artifact(fingerprint=self.digest, digest=self.digest, path=self.path)


@dataclass(frozen=True, kw_only=True)
class Step:
    """Identity {stage, version, params, input fingerprints, tool versions} + execution.

    Attributes:
        version: Raised when the job's code changes what it writes.
        tools: Distributions that shape the bytes; with the versions that its environment has.
        lineage: Replaces `inputs` in the identity. Only a choice uses it: what comes after depends on what was
            chosen (its digest), not on how.
        after: Steps that have to be made before this one starts, and shape none of its bytes.
        whole_machine: Runs alone (speed is measured, or nothing can run beside it).
        threads: CPU threads wanted; None for the run's.
        gpus: GPUs wanted where the device is cuda; of each process, where `distributed`.
        distributed: May be made by several processes together (`run.processes`).
        environment: Python environment of the child (`make env-NAME`); None for the main one.
        server: Environment from which the child starts an engine's server; None where it starts none.
    """

    stage: str
    slug: str
    entry: str
    version: int
    params: Mapping[str, Any]
    inputs: Mapping[str, Step | External]
    tools: tuple[str, ...] = ()
    lineage: Mapping[str, Step | External] | None = None
    after: tuple[Step, ...] = ()
    whole_machine: bool = False
    threads: int | None = None
    gpus: int = 0
    distributed: bool = False
    environment: str | None = None
    server: str | None = None

    @property
    def key(self) -> str:
        """`stage/slug`: names the step within a run."""
        return f"{self.stage}/{self.slug}"

    @functools.cached_property
    def identity(self) -> dict[str, Any]:
        """What the fingerprint is made of."""
        origins = self.inputs if self.lineage is None else self.lineage
        return canonical(
            {
                "stage": self.stage,
                "version": self.version,
                "params": dict(self.params),
                "inputs": {name: origin.fingerprint for name, origin in origins.items()},
                "tools": versions(self.tools, self.environment),
            }
        )

    @functools.cached_property
    def fingerprint(self) -> str:
        """sha256 of the identity, 64 hex digits."""
        return fingerprint(self.identity)


def present(**inputs: Step | External | None) -> dict[str, Step | External]:
    """The inputs that there are: an optional one that is None is left out."""
    return {name: origin for name, origin in inputs.items() if origin is not None}


@functools.cache
def hardware() -> dict[str, Any]:
    """CPU model, cores, memory and GPUs of this machine; no CUDA library is loaded."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists() and (line := re.search(r"^model name\s*:\s*(.+)$", info.read_text(), flags=re.MULTILINE)):
        model = line[1]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / (1 << 30)
    gpus = [gpu.name for gpu in all_gpus()]
    return {"cpu": model, "cores": cpu_slots(), "memory_gib": round(memory, 1), "gpus": gpus}


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Execution settings of a run (the recipe's `run:` section, resolved)."""

    device: str = "cpu"
    threads: int = 1
    micro_batch: int | None = None
    processes: int = 1
    launcher: str = "ddp"
    time_limit_s: int | None = None
    log_level: str = "INFO"


def resolve_device(device: str, *, where: str = "run.device") -> str:
    """`auto` -> `cuda` where a GPU is visible, else `cpu`.

    Args:
        device: `auto`, `cpu` or `cuda`.
        where: What names it, for the error.

    Raises:
        RecipeError: `cuda` is wanted, and no GPU is visible.
    """
    if device == "cuda" and (problem := no_gpu(where)):
        raise problem.error()
    if device != "auto":
        return device
    return "cuda" if visible_gpus() else "cpu"


@dataclass(kw_only=True)
class Context:
    """Everything run_step works with: store, children, leases, limits, and who is called with events and log lines.

    Attributes:
        urgency: Of the steps that wait for a lease the most urgent one is served first.
    """

    store: Store
    launcher: Launcher
    leases: Leases | GrantedLease
    limits: Limits = field(default_factory=Limits)
    urgency: Callable[[Step], float] = lambda step: 0.0
    on_event: Callable[[Step, dict[str, Any]], None] = lambda step, event: None
    on_line: Callable[[Step, str], None] = lambda step, line: None


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What run_step returns: the artifact, and whether it had been made before."""

    artifact: Artifact
    hit: bool


def lookup(step: Step, inputs: Mapping[str, Artifact], store: Store) -> Lookup:
    """Find a step's artifact for its inputs as they are now."""
    return store.find(step.stage, step.fingerprint, _digests(inputs))


def local_artifact(step: Step, inputs: Mapping[str, Artifact], store: Store) -> Artifact | None:
    """A step's artifact with its files on this machine; None where it has to be made."""
    return store.bring(lookup(step, inputs, store))


def run_step(step: Step, inputs: Mapping[str, Artifact], context: Context) -> Outcome:
    """Return the step's artifact, made now where it was not made before. Commits before it reports to anyone.

    Raises:
        StepFailed: The child ended without a result, and its attempt folder stays, or its environment is not
            installed, or it wants more GPUs than there are, or the bucket behind the store does not answer; nothing
            was stored.
        InterruptedError: The run was stopped.
    """
    try:
        return _find_or_make(step, inputs, context)
    except NoSuchLeaseError as error:
        raise StepFailed(step.key, error.problem, log="none: no child was started", returncode=1) from error
    except StoreTrouble as error:
        log = "none: what a child had finished is kept, and the next run takes it up"
        raise StepFailed(step.key, error.problems[0], log=log, returncode=1) from error


def _find_or_make(step: Step, inputs: Mapping[str, Artifact], context: Context) -> Outcome:
    store, stop = context.store, context.launcher.stop
    if artifact := local_artifact(step, inputs, store):
        return Outcome(artifact=artifact, hit=True)
    if problem := environment_problem(step.environment) or environment_problem(step.server):
        raise StepFailed(step.key, problem, log="none: no child was started", returncode=1)
    say = functools.partial(context.on_line, step)
    with store.lock(step.stage, step.fingerprint, stop=stop, say=say):
        if artifact := local_artifact(step, inputs, store):
            return Outcome(artifact=artifact, hit=True)
        if artifact := store.take_up(step.stage, step.slug, step.fingerprint, inputs=_digests(inputs)):
            return Outcome(artifact=artifact, hit=True)
        needed = resources(step, context.limits)
        with context.leases.take(needed.cpus, needed.gpus, urgency=context.urgency(step), stop=stop, say=say) as lease:
            try:
                return _make(step, inputs, context, lease)
            except OSError as error:
                if not is_full(error):
                    raise
                problem = full(store.home, error.filename or step.key)
                raise StepFailed(step.key, problem, log="none: it could not be written", returncode=1) from error


def _digests(inputs: Mapping[str, Artifact]) -> dict[str, str]:
    return {name: artifact.digest for name, artifact in inputs.items()}


def _make(step: Step, inputs: Mapping[str, Artifact], context: Context, lease: Lease) -> Outcome:
    """Run the step's child in a new attempt and commit what it made."""
    execution = _execution(step, context.limits, lease)
    started, clock = dt.datetime.now(dt.UTC), time.monotonic()
    attempt, child, code = _attempt(step, inputs, context, lease, execution)
    if child.lost and not context.launcher.stop.is_set():
        context.on_line(step, "the process that jobs are forked from was killed, and this step with it: once more")
        attempt, child, code = _attempt(step, inputs, context, lease, execution)
    answer = _answer(step, context, attempt, code)
    manifest = {
        "stage": step.stage,
        "slug": step.slug,
        "fingerprint": step.fingerprint,
        "identity": step.identity,
        "inputs": {name: origin(artifact, context.store.home) for name, artifact in inputs.items()},
        "result": answer["result"],
        "seconds": round(time.monotonic() - clock, 3),
        "peak_rss_gib": answer["peak_rss_gib"],
        "peak_gpu_gib": answer["peak_gpu_gib"],
        "started_at": started.isoformat(timespec="seconds"),
        "finished_at": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        "hardware": hardware(),
        "environment": described(step.environment),
        **({"server": described(step.server)} if step.server else {}),
        "execution": {
            "device": execution.device,
            "kind": execution.kind,
            "threads": execution.threads,
            "micro_batch": execution.micro_batch,
            "processes": execution.processes,
        },
    }
    return _commit(step, inputs, context.store, attempt, manifest)


def _attempt(
    step: Step, inputs: Mapping[str, Artifact], context: Context, lease: Lease, execution: Execution
) -> tuple[Attempt, Child, int]:
    """Run the step's child to its end, in a new attempt; returns its exit code. One that failed keeps its start."""
    attempt = context.store.begin(step.stage, step.slug, step.fingerprint, inputs=_digests(inputs))
    _job(step, inputs, attempt, execution).dump(attempt.own / "job.json")
    env, python = child_env(threads=execution.threads, gpus=lease.gpus), interpreter(step.environment)
    child = context.launcher.start(
        ["run", str(attempt.own / "job.json")],
        env=env,
        cwd=attempt.own,
        log=attempt.own / "log.txt",
        python=python,
        # A fork loses threads, so what is imported may have none: no pool of more than one, no CUDA.
        warm=step.environment is None and execution.device == "cpu" and execution.processes * execution.threads == 1,
    )
    code = _follow(step, context, child, attempt)
    if code != 0:
        keep_start(attempt.own, python=python, env=env)
    return attempt, child, code


def _execution(step: Step, limits: Limits, lease: Lease) -> Execution:
    processes, device = _processes(step, limits), "cuda" if lease.gpus else "cpu"
    return Execution(
        device=device,
        kind=device_kind(device, lease.gpus),
        threads=limits.threads if step.whole_machine else max(1, len(lease.cpus) // processes),
        micro_batch=limits.micro_batch,
        processes=processes,
        launcher=limits.launcher,
        log_level=limits.log_level,
        server_python=str(interpreter(step.server)) if step.server else None,
    )


def _job(step: Step, inputs: Mapping[str, Artifact], attempt: Attempt, execution: Execution) -> Job:
    return Job(
        stage=step.stage,
        slug=step.slug,
        fingerprint=step.fingerprint,
        entry=step.entry,
        params=canonical(dict(step.params)),
        inputs={
            name: Input(path=artifact.path, digest=artifact.digest, fingerprint=artifact.fingerprint)
            for name, artifact in inputs.items()
        },
        out=attempt.files,
        checkpoint=attempt.checkpoint,
        execution=execution,
    )


def origin(artifact: Artifact, home: Path) -> dict[str, str]:
    """What a manifest says of an input; its path is relative to QUENCH_HOME inside it, absolute outside."""
    path = artifact.path.relative_to(home) if artifact.path.is_relative_to(home) else artifact.path
    return {"fingerprint": artifact.fingerprint, "digest": artifact.digest, "path": str(path)}


def _commit(
    step: Step, inputs: Mapping[str, Artifact], store: Store, attempt: Attempt, manifest: dict[str, Any]
) -> Outcome:
    """Commit an attempt; where another process was first, its artifact is the outcome."""
    try:
        return Outcome(artifact=store.commit(attempt, manifest), hit=False)
    except LostRaceError:
        shutil.rmtree(attempt.folder, ignore_errors=True)
        winner = local_artifact(step, inputs, store)
        if winner is None:
            raise
        return Outcome(artifact=winner, hit=True)


class Resources(NamedTuple):
    """CPU slots (0: the whole machine) and GPUs of a step."""

    cpus: int
    gpus: int


def resources(step: Step, limits: Limits) -> Resources:
    """What a step has to lease."""
    processes = _processes(step, limits)
    cpus = 0 if step.whole_machine else (step.threads or limits.threads) * processes
    return Resources(cpus=cpus, gpus=step.gpus * processes if limits.device == "cuda" else 0)


def _processes(step: Step, limits: Limits) -> int:
    """Ranks of a step: all but train have one."""
    return limits.processes if step.distributed else 1


def _follow(step: Step, context: Context, child: Child, attempt: Attempt) -> int:
    """Pass the child's events and log lines on while it runs; end it at the time limit."""
    events = attempt.files / "events.jsonl"
    log = attempt.own / "log.txt"
    limit = context.limits.time_limit_s
    deadline = time.monotonic() + limit if limit else None
    seen_events = seen_log = 0
    code: int | None = None
    while code is None:
        try:
            code = child.wait(FOLLOW_S)
        except TimeoutError:
            if deadline is not None and time.monotonic() > deadline:
                context.launcher.end(child)
        for event, after in read_events(events, offset=seen_events):
            seen_events = after
            context.on_event(step, event)
        seen_log = _pass_lines(step, context, log, seen_log)
    return code


def _pass_lines(step: Step, context: Context, log: Path, offset: int) -> int:
    with log.open("rb") as file:
        file.seek(offset)
        chunk = file.read()
    whole = chunk.rfind(b"\n") + 1
    for line in chunk[:whole].decode("utf-8", errors="replace").splitlines():
        context.on_line(step, line)
    return offset + whole


def _answer(step: Step, context: Context, attempt: Attempt, code: int) -> dict[str, Any]:
    """The child's result.json. Raises StepFailed where the child failed or left none."""
    if context.launcher.stop.is_set():
        raise InterruptedError(f"{step.key}: the run was stopped")
    log = attempt.own / "log.txt"
    path = attempt.own / "result.json"
    if path.exists():
        answer = read_json(path)
        if answer["ok"]:
            return answer
        problem = Problem(**answer["problem"])
    else:
        problem = _no_result(step, context, code, log)
    raise StepFailed(step.key, problem, log=str(log), returncode=code)


def _no_result(step: Step, context: Context, code: int, log: Path) -> Problem:
    tail = log.read_text(encoding="utf-8", errors="replace").splitlines()[-3:]
    limit = context.limits.time_limit_s
    if not has_space(log.parent):
        return full(context.store.home, step.key)
    if code == -15 and limit:
        what = f"the child was ended at run.time_limit_s = {limit}"
    elif code == -9:
        what = "the child was killed (SIGKILL): by somebody, or by the kernel because memory ran out"
    else:
        what = f"the child ended with exit code {code} and left no result"
    return Problem(
        what=what,
        where=step.key,
        why=" | ".join(tail) or "its log is empty",
        next="read the log named below; running the same command again resumes from what is finished",
    )
