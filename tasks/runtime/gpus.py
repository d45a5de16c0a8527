"""The NVIDIA GPUs of this machine, asked of the driver's own library (NVML); no CUDA library is loaded."""

# pynvml has no types, and makes its error classes while it is imported
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false, reportAttributeAccessIssue=false
from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pynvml


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One GPU.

    Attributes:
        index: Its place in PCI order, among those that this process may open.
        uuid: `GPU-...`.
        name: Its model.
        total_bytes: Its memory; None where the driver does not say, as for one that is split by MIG.
        free_bytes: Its free memory; None as above.
    """

    index: int
    uuid: str
    name: str
    total_bytes: int | None
    free_bytes: int | None


def all_gpus() -> tuple[Gpu, ...]:
    """Every GPU of the machine, whatever CUDA_VISIBLE_DEVICES says; none without a driver."""
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:  # no driver, no GPU, or a library of another version than the driver
        return ()
    try:
        return tuple(_gpu(index, handle) for index, handle in enumerate(_handles()))
    finally:
        pynvml.nvmlShutdown()


def visible_gpus() -> tuple[int, ...]:
    """Indices of the GPUs that steps may lease: those of CUDA_VISIBLE_DEVICES, or all."""
    devices = os.environ.get("CUDA_VISIBLE_DEVICES")
    return tuple(gpu.index for gpu in all_gpus()) if devices is None else visible_indices(devices)


def visible_indices(devices: str) -> tuple[int, ...]:
    """The numbers in a CUDA_VISIBLE_DEVICES. GPUs by UUID, and MIG instances, have no number and are left out."""
    return tuple(int(device) for device in devices.split(",") if device.strip().isdigit())


def _handles() -> Iterator[Any]:
    for number in range(pynvml.nvmlDeviceGetCount()):
        try:
            yield pynvml.nvmlDeviceGetHandleByIndex(number)
        except (pynvml.NVMLError_NoPermission, pynvml.NVMLError_GpuIsLost):  # a container sees not all that are counted
            continue


def _gpu(index: int, handle: Any) -> Gpu:
    try:
        memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
    except pynvml.NVMLError:
        memory = None
    return Gpu(
        index=index,
        uuid=pynvml.nvmlDeviceGetUUID(handle),
        name=pynvml.nvmlDeviceGetName(handle),
        total_bytes=memory and int(memory.total),
        free_bytes=memory and int(memory.free),
    )
