"""Out of memory: the error names the stage, the GiB that were asked for and the two fields to lower."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tasks.runtime.process.child import GIB, MEMORY_FIELDS, _as_problem, requested_gib
from tests.jobs.build import make_job

# As torch 2.13 words it.
CUDA = (
    "CUDA out of memory. Tried to allocate 1.50 GiB. GPU 0 has a total capacity of 23.64 GiB of which 700.69 MiB is "
    "free. Including non-PyTorch memory, this process has 22.94 GiB memory in use."
)


@pytest.mark.parametrize("stage", MEMORY_FIELDS)
def test_torchs_own_error_on_a_cpu(stage: str, tmp_path: Path):
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 52, dtype=torch.uint8)  # 4 PiB: no machine has them
    assert requested_gib(caught.value) == (1 << 52) / GIB
    problem = _as_problem(make_job(stage, tmp_path / "out", params={}), caught.value)
    assert stage in problem.what and "4194304.00 GiB" in problem.what and "host" in problem.what
    assert all(field in problem.next for field in MEMORY_FIELDS[stage]) and "resumes" in problem.next


@pytest.mark.parametrize(("said", "gib"), [("1.50 GiB", 1.5), ("256.00 MiB", 0.25), ("20.00 KiB", 20 / (1 << 20))])
def test_the_message_of_a_gpu(said: str, gib: float, tmp_path: Path):
    error = torch.OutOfMemoryError(CUDA.replace("1.50 GiB", said))
    assert requested_gib(error) == gib
    problem = _as_problem(make_job("train", tmp_path / "out", params={}), error)
    assert "GPU memory: train" in problem.what and "run.micro_batch or data.max_length" in problem.next
    assert "23.64 GiB" in problem.why


def test_other_errors_are_not_taken_for_it():
    assert requested_gib(RuntimeError("Tried to allocate 1.50 GiB")) is None
