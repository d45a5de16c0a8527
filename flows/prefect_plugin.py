"""Prefect's start-up hook: `prefect deployment run finetune-and-quantize` works bare in a folder that enables it.

Prefect loads this on every start below a pyproject.toml with `[tool.prefect.plugins] enabled = true` (docs/adr/0011).
It names the API of the `quench up` of this folder's home, and acts on one command alone.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from prefect.plugins import HookContext, SetupResult, register_hook

NAMES = ("finetune-and-quantize", "evaluate-only")
COMMAND = ["deployment", "run"]


@register_hook
def setup_environment(*, ctx: HookContext) -> SetupResult | None:
    """Complete the command, and say where Prefect answers."""
    ours = complete(sys.argv, Path.cwd())
    if "PREFECT_API_URL" in os.environ:
        return None
    from flows.server import answers
    from tasks.runtime.store import find_home, read_json

    home = find_home()
    told: dict[str, Any] = read_json(home / "up.json") if (home / "up.json").exists() else {}
    if told and answers(told["prefect"], timeout_s=10.0):
        return SetupResult(env={"PREFECT_API_URL": told["prefect"]}, note=f"quench up of {home}")
    if ours and ctx.api_url is None:
        raise SystemExit(
            f"error: no Prefect server answers for {home}\n"
            "  why: `quench up` starts it, with MLflow and what executes deployments, and it is not running\n"
            "  next: run `quench up` here, in another terminal; or set QUENCH_HOME or PREFECT_API_URL to one that runs"
        )
    return None


def complete(argv: list[str], folder: Path) -> bool:
    """NAME -> NAME/default, and the current folder for relative paths, in `prefect deployment run NAME ...` alone.

    Args:
        argv: sys.argv; changed in place.
        folder: Where the command is typed.

    Returns:
        Whether it is this command and one of our deployments.
    """
    if Path(argv[0]).name not in ("prefect", "-m", "__main__.py") or argv[1:3] != COMMAND or len(argv) < 4:
        return False
    if argv[3] not in (*NAMES, *(f"{name}/default" for name in NAMES)):
        return False
    argv[3] = argv[3] if "/" in argv[3] else f"{argv[3]}/default"
    if not any("working_dir=" in word for word in argv[4:]):
        argv[4:4] = ["--job-variable", f"working_dir={folder}"]
    return True
