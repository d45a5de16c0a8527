"""A merge in a child: its memory does not grow with the model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tasks.runtime.process.launch import child_env
from tests.jobs.build import make_job
from tests.jobs.synthetic import write_synthetic, write_synthetic_adapter

MIB = 1 << 20
# Measured: 585 MiB for 57 MiB of weights, 591 MiB for 645 MiB; holding them would add 588 MiB.
NOISE_MIB = 100


def peak_mib(folder: Path, *, layers: int) -> float:
    """Peak RSS of the merge's child, from its result.json."""
    base = write_synthetic(folder / "base", hidden=1024, intermediate=2816, layers=layers, vocabulary=2048)
    adapter = write_synthetic_adapter(folder / "adapter", base)
    job = make_job("merge", folder / "out", params={"onto": "dequantized"}, base=base, adapter=adapter)
    job.dump(folder / "job.json")
    subprocess.run(
        [sys.executable, "-P", "-m", "tasks.runtime.process.child", "run", str(folder / "job.json")],
        env={**child_env(threads=1), "QUENCH_PARENT": str(os.getpid())},
        check=True,
    )
    answer = json.loads((folder / "result.json").read_text())
    assert answer["result"]["by"] == "stream" and answer["result"]["four_bit"] == 7 * layers
    return answer["peak_rss_gib"] * 1024


@pytest.mark.slow
def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    short, long = peak_mib(tmp_path / "short", layers=2), peak_mib(tmp_path / "long", layers=26)
    assert long < short + NOISE_MIB, (short, long)
    assert long < 2048  # the rest is imports
