"""`quench run` and `quench evaluate`: one run of the flow in this process, with the server that there is or its own."""

from __future__ import annotations

import argparse
import contextlib
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

import httpx

from flows.commands.terminal import DONE, FAILED, Output, say, warn
from flows.plan.validate import Validated, validate
from flows.run.server import OwnServer, prefect_settings, there_is
from recipes.problem import Problem
from tasks.runtime.process.disk import full, has_space
from tasks.runtime.process.launch import Launcher
from tasks.runtime.store.local import find_home

if TYPE_CHECKING:  # 2 s of imports
    from prefect import Flow


def command(args: argparse.Namespace) -> Output:
    """Run, show the report; exit code 0, or 1 where a step failed or the run's server went away.

    Raises:
        RecipeError: Something is wrong that can be known before anything is spent.
    """
    clock = time.monotonic()
    home = find_home()
    os.environ["QUENCH_HOME"] = str(home)
    os.environ.update(prefect_settings(home))
    os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "CRITICAL")
    validated = validate(args.recipe, sets=args.set, home=home, only=args.only)  # refuse before a server is started
    warn(validated.warnings)
    if args.runner != "ray" and all(step.hit for step in validated.plan) and not there_is(home):
        return _hits(validated, only=args.only, clock=clock)
    with contextlib.ExitStack() as joined_cluster, Launcher() as launcher:
        if args.runner == "ray":
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
            from flows.cluster.preflight import joined

            joined_cluster.enter_context(joined(args.address))
        server = OwnServer(home, launcher)
        server.start()
        os.environ["PREFECT_API_URL"] = server.api
        from flows.pipeline import drain, finetune_and_quantize  # 8 s of imports while the server starts
        from flows.session.body import RunFailed

        server.wait()
        flow = cast("Flow[..., str]", finetune_and_quantize)
        if args.runner == "ray":
            flow = _on_ray(flow, validated, address=args.address, home=home, api=server.api)
        say(f"Prefect, while this runs: {server.ui}")
        code = DONE
        try:
            folder = Path(flow(recipe=str(args.recipe), sets=args.set, only=args.only))
        except RunFailed as error:
            say(f"error: {error}")
            folder, code = Path(error.folder), FAILED
        except httpx.HTTPError as error:
            say(f"error: {_lost(error, server.api, home)}")
            return Output(json=None, text="", code=FAILED)
        finally:
            drain()
    return _shown(folder, clock=clock, code=code)


def _hits(validated: Validated, *, only: Sequence[str], clock: float) -> Output:
    """Nothing is to be made: no server is started, and Prefect is not asked."""
    from flows.session.body import RunFailed, run_hits

    say("Every step is in the store: this run needs no Prefect, and does not show in its pages.")
    try:
        return _shown(Path(run_hits(validated, only=only)), clock=clock, code=DONE)
    except RunFailed as error:
        say(f"error: {error}")
        return _shown(Path(error.folder), clock=clock, code=FAILED)


def _shown(folder: Path, *, clock: float, code: int) -> Output:
    from flows.commands.report import report_of

    what_to_look_at = (
        f"\n{time.monotonic() - clock:.0f} s. What to look at:\n  {folder / 'report.html'}\n"
        "  quench up, and the pages of MLflow and Prefect that it names"
    )
    return report_of(folder, below=what_to_look_at, code=code)


def _on_ray(flow: Flow[..., str], validated: Validated, *, address: str, home: Path, api: str) -> Flow[..., str]:
    """The flow with Ray's task runner, once every node has shown that it can take a step."""
    from flows.cluster.preflight import check_nodes
    from flows.cluster.session import ClusterRunner

    for answer in check_nodes(validated, home=home, api=api):
        say(f"Ray: {answer.node}")
    runner = ClusterRunner(address=address)
    return flow.with_options(task_runner=runner)  # pyright: ignore[reportArgumentType]


def _lost(error: httpx.HTTPError, api: str, home: Path) -> Problem:
    """The server died, or its disk is full."""
    if not has_space(home):
        return full(home, api)
    return Problem(
        what="the Prefect server of this run went away",
        where=api,
        why=f"{type(error).__name__}: {error}",
        next="the same command again: what had finished is in the store",
    )
