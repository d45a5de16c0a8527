"""Free memory of this machine: of the host, of the container around this process, and of the visible GPUs."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import psutil

from recipes.problem import Problem
from tasks.runtime.gpus import visible_gpus

GIB = 1 << 30
CGROUPS = "sys/fs/cgroup"


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
    free = min([psutil.virtual_memory().available, *_left_in_groups(root)])
    shown = visible_gpus()
    gpu_gib = min((one.gpu.free_bytes / GIB for one in shown if one.gpu.free_bytes is not None), default=None)
    return Memory(host_gib=free / GIB, gpu_gib=gpu_gib, gpus=max(1, len(shown)))


def total_gpu_gib() -> float | None:
    """Memory of the smallest visible GPU, free or not; None where the driver does not say."""
    return min((one.gpu.total_bytes / GIB for one in visible_gpus() if one.gpu.total_bytes is not None), default=None)


def _left_in_groups(root: Path) -> Iterator[int]:
    """Bytes that are left in this process's control group and in each one around it that has a limit.

    The kernel drops the page cache of files that were not read lately (inactive_file) before a group is out of memory,
    so it counts as free. In a container the path in proc/self/cgroup may be the host's; then only the top, which is the
    container's own group, is there.
    """
    listing = root / "proc/self/cgroup"
    for line in listing.read_text().splitlines() if listing.exists() else []:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            names = "memory.max", "memory.current", "inactive_file"
            top = root / CGROUPS
        elif "memory" in controllers.split(","):  # version 1
            names = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
            top = root / CGROUPS / "memory"
        else:
            continue
        own = top / path.lstrip("/")
        for group in (own, *own.parents):
            if group.is_relative_to(top) and (left := _left(group, *names)) is not None:
                yield left


def _left(group: Path, limit_name: str, used_name: str, cache_name: str) -> int | None:
    """Bytes that one group has left; None without a limit, which version 2 writes as `max`."""
    limit, used, stat = group / limit_name, group / used_name, group / "memory.stat"
    if not (limit.exists() and used.exists() and (most := limit.read_text().strip()).isdigit()):
        return None
    cached = re.search(rf"^{cache_name} (\d+)$", stat.read_text(), flags=re.MULTILINE) if stat.exists() else None
    return max(0, int(most) - max(0, int(used.read_text()) - (int(cached[1]) if cached else 0)))
