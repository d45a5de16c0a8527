"""Free memory of this machine: of the host, of the container around this process, and of the visible GPUs."""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

from flows.plan.sizes import GIB
from recipes.problem import Problem
from tasks.runtime.gpus import visible_gpus
from tasks.runtime.host_memory import free_host_bytes


class Memory(NamedTuple):
    """Free memory of a machine, GiB; gpu_gib is that of the smallest of its GPUs, None without one."""

    host_gib: float
    gpu_gib: float | None
    gpus: int = 1


def named(gpu_gib: float | None, *, gpus: int | None, host_gib: float | None) -> Memory | None:
    """The machine that --gpu-gib, --gpus and --host-gib name; None where they are not given.

    Without --host-gib the host counts as large enough.

    Raises:
        RecipeError: --gpus or --host-gib without --gpu-gib.
    """
    if gpu_gib is not None:
        return Memory(host_gib=math.inf if host_gib is None else host_gib, gpu_gib=gpu_gib, gpus=gpus or 1)
    if gpus is None and host_gib is None:
        return None
    raise Problem(
        what="A machine is named without its GPU.",
        where="--gpus, --host-gib",
        why="They describe the machine around the card of --gpu-gib.",
        next="Add --gpu-gib GIB, the memory of one GPU.",
    ).error()


def available(root: Path = Path("/")) -> Memory:
    """Free host memory (of the control groups, where it is smaller), and free memory of the smallest visible GPU.

    Args:
        root: Where proc/ and sys/ of the control groups lie.
    """
    shown = visible_gpus()
    gpu_gib = min((one.gpu.free_bytes / GIB for one in shown if one.gpu.free_bytes is not None), default=None)
    return Memory(host_gib=free_host_bytes(root) / GIB, gpu_gib=gpu_gib, gpus=max(1, len(shown)))


def total_gpu_gib() -> float | None:
    """Memory of the smallest visible GPU, free or not; None where the driver does not say."""
    return min((one.gpu.total_bytes / GIB for one in visible_gpus() if one.gpu.total_bytes is not None), default=None)
