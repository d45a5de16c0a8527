"""`quench run` and `quench evaluate`: one run of the flow in this process, with the server that there is or its own."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

import httpx

from flows.plan.validate import validate
from flows.run.server import OwnServer, prefect_settings
from recipes.problem import Problem
from tasks.runtime.process.disk import full, has_space
from tasks.runtime.process.launch import Launcher
from tasks.runtime.store.local import find_home

if TYPE_CHECKING:  # 2 s of imports
    from prefect import Flow


def command(args: argparse.Namespace, *, warn: Callable[[Sequence[Problem]], None]) -> int:
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
    with contextlib.ExitStack() as open_, Launcher() as launcher:
        if args.runner == "ray":
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
            from flows.cluster.preflight import joined

            open_.enter_context(joined(args.address))
        server = OwnServer(home, launcher)
        server.start()
        os.environ["PREFECT_API_URL"] = server.api
        from flows.pipeline import RunFailed, drain, finetune_and_quantize  # 8 s of imports while the server starts

        server.wait()
        flow = cast("Flow[..., str]", finetune_and_quantize)
        if args.runner == "ray":
            from flows.cluster.preflight import check_nodes
            from flows.cluster.session import ClusterRunner

            for one in check_nodes(validated, home=home, api=server.api):
                print(f"Ray: {one.node}", file=sys.stderr)
            runner = ClusterRunner(address=args.address)
            flow = flow.with_options(task_runner=runner)  # pyright: ignore[reportArgumentType]
        print(f"Prefect, while this runs: {server.ui}", file=sys.stderr)
        code = 0
        try:
            folder = Path(flow(recipe=str(args.recipe), sets=args.set, only=args.only))
        except RunFailed as error:
            print(f"error: {error}", file=sys.stderr)
            folder, code = (home / "runs" / "latest").resolve(), 1
        except httpx.HTTPError as error:
            print(f"error: {_lost(error, server.api, home)}", file=sys.stderr)
            return 1
        finally:
            drain()
    show(folder, as_json=args.json)
    if not args.json:
        print(f"\n{time.monotonic() - clock:.0f} s. What to look at:")
        print(f"  {folder / 'report.html'}")
        print("  quench up, and the pages of MLflow and Prefect that it names")
    return code


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


def show(folder: Path, *, as_json: bool) -> None:
    """Print a run's report."""
    from rich.console import Console

    from flows.report.build import print_report

    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    if as_json:
        print(json.dumps(report, indent=2))
    else:
        print_report(report, Console())
