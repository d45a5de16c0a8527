"""What a machine without a driver gives, and what CUDA_VISIBLE_DEVICES means."""

from pathlib import Path

import pytest

from flows.plan.preflight import available
from tasks.runtime.gpus import all_gpus, visible_gpus, visible_indices
from tasks.runtime.step import hardware, resolve_device

without_driver = pytest.mark.skipif(Path("/proc/driver/nvidia/version").exists(), reason="this machine has a driver")


@without_driver
def test_a_machine_without_a_driver_has_no_gpu(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert all_gpus() == () and visible_gpus() == ()
    assert hardware()["gpus"] == []
    assert available().gpu_gib is None
    assert resolve_device("auto") == "cpu"


@pytest.mark.parametrize(
    ("devices", "indices"),
    [
        ("0", (0,)),
        ("2,0", (2, 0)),
        (" 1 , 3", (1, 3)),
        ("", ()),
        ("-1", ()),
        ("GPU-8932f937-d72c-4106-c12f-20bd9faed9f6", ()),
        ("MIG-GPU-8932f937-d72c-4106-c12f-20bd9faed9f6/1/2,0", (0,)),
    ],
)
def test_cuda_visible_devices(devices: str, indices: tuple[int, ...], monkeypatch: pytest.MonkeyPatch):
    assert visible_indices(devices) == indices
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", devices)
    assert visible_gpus() == indices  # the driver is not asked
    assert resolve_device("auto") == ("cuda" if indices else "cpu")
