"""Prefect's start-up hook: `prefect deployment run finetune-and-quantize` works bare in a folder that enables it.

Prefect loads this on every start in a folder whose pyproject.toml enables it (docs/adr/0011).
It names the API of the `quench up` of this home, else of the only one that runs, and acts on one command alone.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from prefect.plugins import HookContext, SetupResult, register_hook

NAMES = ("finetune-and-quantize", "evaluate-only", "retrain")
PROGRAM = ("prefect", "-m")  # -m: what sys.argv has while Python looks for the module of `python -m prefect`
COMMAND = ["deployment", "run"]


@register_hook
def setup_environment(*, ctx: HookContext) -> SetupResult | None:
    """Complete the command, and say where Prefect answers: to the program `prefect`, not to all that imports it."""
    if Path(sys.argv[0]).name not in PROGRAM:
        return None
    ours = complete(sys.argv, Path.cwd())
    if "PREFECT_API_URL" in os.environ:
        return None
    from flows.run.server import serving
    from tasks.runtime.store.local import find_home

    home = find_home()
    servers = serving(home)
    if len(servers) == 1:
        return SetupResult(env={"PREFECT_API_URL": servers[0]["prefect"]}, note=f"quench up of {servers[0]['home']}")
    if ours and ctx.api_url is None:
        raise SystemExit(_several([server["home"] for server in servers]) if servers else _nobody(home))
    return None


def _nobody(home: Path) -> str:
    return (
        f"error: no Prefect server answers for {home}\n"
        "  why: `quench up` starts it, with MLflow and what executes deployments, and it is not running\n"
        "  next: run `quench up` here, in another terminal; or set QUENCH_HOME or PREFECT_API_URL to one that runs"
    )


def _several(homes: list[str]) -> str:
    return (
        f"error: `quench up` runs on {len(homes)} homes, and none is this folder's\n"
        f"  why: {', '.join(homes)}: each has its own runs and its own store\n"
        "  next: set QUENCH_HOME to one of them"
    )


def complete(argv: list[str], folder: Path) -> bool:
    """NAME -> NAME/default, and the current folder for relative paths, in `prefect deployment run NAME ...` alone.

    Args:
        argv: sys.argv; changed in place.
        folder: Where the command is typed.

    Returns:
        Whether it is this command and one of our deployments.
    """
    if Path(argv[0]).name not in PROGRAM or argv[1:3] != COMMAND or len(argv) < 4:
        return False
    if argv[3] not in (*NAMES, *(f"{name}/default" for name in NAMES)):
        return False
    argv[3] = argv[3] if "/" in argv[3] else f"{argv[3]}/default"
    if not any("working_dir=" in word for word in argv[4:]):
        argv[4:4] = ["--job-variable", f"working_dir={folder}"]
    return True
