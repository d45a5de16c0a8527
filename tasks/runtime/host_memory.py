"""Free memory of the host and of the container around this process."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import psutil

CGROUPS = "sys/fs/cgroup"


def free_host_bytes(root: Path = Path("/")) -> int:
    """Free memory of the host; of the control groups around this process, where that is less.

    Args:
        root: Where proc/ and sys/ of the control groups lie.
    """
    return min([psutil.virtual_memory().available, *_left_in_groups(root)])


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
