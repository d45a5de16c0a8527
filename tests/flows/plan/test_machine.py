"""Free memory inside containers, read from control groups as the kernel writes them."""

from pathlib import Path

import psutil
import pytest

from flows.plan.machine import Memory, available, named
from recipes.problem import RecipeError

GIB = 1 << 30
MIB = 1 << 20


def group(folder: Path, *, limit: int | str, used: int, cache: int = 0) -> None:
    """A group of version 2."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 4096\nfile {cache}\nactive_file 0\ninactive_file {cache}\nslab 12\n")


def machine(root: Path, path: str) -> Path:
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(f"0::{path}\n")
    return root / "sys/fs/cgroup"


def left(root: Path) -> int:
    return round(available(root).host_gib * GIB)


def test_page_cache_that_can_be_dropped_is_free(tmp_path: Path):
    """A file of weights that was just written fills the cache: 100 MiB are used, of which 70 can go."""
    group(machine(tmp_path, "/"), limit=128 * MIB, used=100 * MIB, cache=70 * MIB)
    assert left(tmp_path) == (128 - 30) * MIB


def test_the_smallest_of_nested_groups_counts(tmp_path: Path):
    top = machine(tmp_path, "/slurm/job_7/step_0")
    group(top / "slurm/job_7/step_0", limit="max", used=10 * MIB)
    group(top / "slurm/job_7", limit=64 * MIB, used=24 * MIB)
    group(top / "slurm", limit=256 * MIB, used=100 * MIB)
    group(top / "slurm/job_8", limit=1 * MIB, used=0)  # a neighbour's
    assert left(tmp_path) == 40 * MIB
    group(top / "slurm/job_7/step_0", limit=30 * MIB, used=10 * MIB)
    assert left(tmp_path) == 20 * MIB


def test_a_path_of_the_hosts_leads_to_the_top(tmp_path: Path):
    """A container with the host's group namespace: the path is not there, its own group is what is mounted."""
    group(machine(tmp_path, "/docker/0123abc"), limit=50 * MIB, used=8 * MIB)
    assert left(tmp_path) == 42 * MIB


def test_a_group_over_its_limit_has_nothing(tmp_path: Path):
    group(machine(tmp_path, "/"), limit=50 * MIB, used=60 * MIB)
    assert left(tmp_path) == 0


def test_version_1(tmp_path: Path):
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("12:cpu,cpuacct:/docker/x\n4:memory:/docker/x\n0::/system.slice\n")
    folder = tmp_path / "sys/fs/cgroup/memory/docker/x"
    folder.mkdir(parents=True)
    (folder / "memory.limit_in_bytes").write_text(f"{90 * MIB}\n")
    (folder / "memory.usage_in_bytes").write_text(f"{50 * MIB}\n")
    (folder / "memory.stat").write_text(f"inactive_file 1\ntotal_inactive_file {20 * MIB}\n")
    assert left(tmp_path) == 60 * MIB


@pytest.mark.parametrize("limit", ["max", 1 << 62])
def test_without_a_limit_the_machine_counts(limit: int | str, tmp_path: Path):
    group(machine(tmp_path, "/"), limit=limit, used=MIB)
    assert 0 < left(tmp_path) <= psutil.virtual_memory().total


def test_a_machine_that_is_named():
    assert named(None, gpus=None, host_gib=None) is None
    assert named(24, gpus=None, host_gib=64) == Memory(64, 24, 1)
    assert named(80, gpus=8, host_gib=None) == Memory(float("inf"), 80, 8)
    for gpus, host in ((2, None), (None, 64.0)):
        with pytest.raises(RecipeError, match="without its GPU"):
            named(None, gpus=gpus, host_gib=host)
