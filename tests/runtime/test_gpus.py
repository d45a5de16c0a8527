"""What a machine without a driver gives, and what CUDA_VISIBLE_DEVICES means."""

from pathlib import Path

import pytest

from flows.plan.machine import available
from recipes.problem import RecipeError
from tasks.runtime.gpus import Gpu, all_gpus, no_gpu, visible, visible_gpus
from tasks.runtime.step import hardware, resolve_device

without_driver = pytest.mark.skipif(
    any(map(Path.exists, map(Path, ("/proc/driver/nvidia/version", "/dev/dxg")))), reason="this machine has a driver"
)


def gpu(index: int, uuid: str, **more: object) -> Gpu:
    return Gpu(index=index, uuid=uuid, name="NVIDIA H200", total_bytes=2, free_bytes=1, **more)  # type: ignore[arg-type]


WHOLE = [gpu(0, "GPU-8932f937-d72c"), gpu(1, "GPU-89aa0000-1111"), gpu(2, "GPU-c0ffee00-2222")]
SPLIT = [
    gpu(0, "GPU-8932f937-d72c"),
    gpu(1, "MIG-11111111-aaaa", mig=True, alias="MIG-GPU-89aa0000-1111/1/0"),
    gpu(1, "MIG-22222222-bbbb", mig=True, alias="MIG-GPU-89aa0000-1111/2/0"),
]


@without_driver
def test_a_machine_without_a_driver_has_no_gpu(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert all_gpus() == () and visible_gpus() == ()
    assert hardware()["gpus"] == []
    assert available().gpu_gib is None
    assert resolve_device("auto") == "cpu" and resolve_device("cpu") == "cpu"


@without_driver
@pytest.mark.parametrize("devices", ["0", "GPU-8932f937", None])
def test_cuda_without_a_gpu_is_refused_at_once(devices: str | None, monkeypatch: pytest.MonkeyPatch):
    """A variable that names a GPU makes none."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if devices is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", devices)
    with pytest.raises(RecipeError) as caught:
        resolve_device("cuda", where="--device")
    (problem,) = caught.value.problems
    assert problem == no_gpu("--device") and problem.where == "--device"
    assert "NVML" in problem.why and "cpu" in problem.next
    assert resolve_device("auto") == "cpu"


@pytest.mark.parametrize(
    ("devices", "shown"),
    [
        (None, [0, 1, 2]),
        ("0", [0]),
        ("2,0", [2, 0]),
        (" 1 , 2", [1, 2]),
        ("", []),
        ("-1", []),
        ("0,-1,1", [0]),
        ("0,7,1", [0]),  # CUDA stops at the first entry that names no GPU
        ("1,1", []),
        ("1gpu,2", [1, 2]),  # as strtoul reads it
        ("none", []),
        ("NoDevFiles", []),
        ("0,GPU-c0ffee00-2222", [0]),  # the first entry says what the list has
        ("GPU-c0ffee00-2222", ["GPU-c0ffee00-2222"]),
        ("GPU-c0,GPU-8932f937", ["GPU-c0ffee00-2222", "GPU-8932f937-d72c"]),  # handed on in full
        ("GPU-89", []),  # two begin so
        ("GPU-c0,0", ["GPU-c0ffee00-2222"]),
        ("GPU-", []),
        ("GPU-c0,GPU-c0ffee00", []),  # one GPU twice
        ("MIG-11111111-aaaa", []),
    ],
)
def test_cuda_visible_devices(devices: str | None, shown: list[int | str]):
    assert [one.device for one in visible(WHOLE, devices)] == shown


@pytest.mark.parametrize(
    ("devices", "shown"),
    [
        (None, [0, "MIG-11111111-aaaa", "MIG-22222222-bbbb"]),
        ("0", [0]),
        ("1", ["MIG-11111111-aaaa"]),  # CUDA shows one instance of a GPU that is split
        ("MIG-22222222-bbbb", ["MIG-22222222-bbbb"]),
        ("MIG-2,MIG-1", ["MIG-22222222-bbbb", "MIG-11111111-aaaa"]),
        ("MIG-GPU-89aa0000-1111/2/0", ["MIG-22222222-bbbb"]),  # as drivers before 470 name it
        ("MIG-3", []),
        ("MIG-", []),
        ("GPU-8932f937,MIG-1", ["GPU-8932f937-d72c"]),
        ("GPU-89aa0000-1111", []),  # its instances stand in its place
    ],
)
def test_a_gpu_that_is_split(devices: str | None, shown: list[int | str]):
    assert [one.device for one in visible(SPLIT, devices)] == shown


def test_no_variable_makes_a_gpu():
    assert visible([], None) == visible([], "0") == visible([], "GPU-1") == ()
