"""The NVIDIA GPUs of this machine, asked of the driver's own library (NVML); no CUDA library is loaded."""

# pynvml has no types, and makes its error classes while it is imported
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false, reportAttributeAccessIssue=false
from __future__ import annotations

import contextlib
import ctypes
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pynvml

from recipes.problem import Problem

VISIBLE = "CUDA_VISIBLE_DEVICES"
WSL_LIBRARY = Path("/usr/lib/wsl/lib/libnvidia-ml.so.1")  # WSL2: Windows' driver, often in no path of the loader


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One GPU, or one instance of a GPU that is split by MIG: what CUDA counts as one device.

    Attributes:
        index: Its place in PCI order, among those that this process may open; of an instance, that of its GPU.
        uuid: `GPU-...`, or `MIG-...` of an instance.
        name: Its model.
        total_bytes: Its memory; None where the driver does not say.
        free_bytes: Its free memory; None as above.
        mig: An instance of a GPU that is split.
        alias: The instance's name up to driver 450: `MIG-GPU-.../1/0`; None where there is none.
        capability: CUDA's compute capability, `9.0`; None where the driver does not say.
    """

    index: int
    uuid: str
    name: str
    total_bytes: int | None
    free_bytes: int | None
    mig: bool = False
    alias: str | None = None
    capability: str | None = None

    @property
    def kind(self) -> str:
        """What its sums depend on: `NVIDIA H200, compute 9.0`. GPUs of one kind compute the same bits."""
        return f"{self.name}, compute {self.capability}" if self.capability else self.name


@dataclass(frozen=True, kw_only=True)
class Visible:
    """A GPU that steps may lease.

    Attributes:
        gpu: The GPU.
        device: What CUDA_VISIBLE_DEVICES has to say for a child to see it: an index, or a UUID.
    """

    gpu: Gpu
    device: int | str


def all_gpus() -> tuple[Gpu, ...]:
    """Every GPU of the machine, whatever CUDA_VISIBLE_DEVICES says; none without a driver.

    A GPU that is split by MIG is not in it, its instances are.
    """
    return _ask_driver()[0]


def visible_gpus() -> tuple[Visible, ...]:
    """The GPUs that steps may lease: those of CUDA_VISIBLE_DEVICES, or all."""
    return visible(all_gpus(), os.environ.get(VISIBLE))


def device_kind(device: str, leased: Sequence[int | str] | None = None) -> str:
    """What sums depend on: `cpu`, or the kind of GPU; `A or B` where GPUs of several kinds are visible.

    All CPUs are one kind. Their products differ in the last bits with the instructions that they have, as they do with
    the number of threads, which is no part of an identity either; and a home that moves to another CPU machine keeps
    what it has. The jobs record the instructions, and the report says where they differ.

    Args:
        device: `cpu` or `cuda`.
        leased: Only these of the visible GPUs, as CUDA_VISIBLE_DEVICES names them.
    """
    if device == "cpu":
        return device
    shown = visible_gpus()
    names = {str(name) for name in leased or ()}
    own = [one for one in shown if str(one.device) in names or one.gpu.uuid in names] or list(shown)
    return " or ".join(sorted({one.gpu.kind for one in own})) or device


def visible(gpus: Sequence[Gpu], devices: str | None) -> tuple[Visible, ...]:
    """The GPUs that CUDA shows for a value of CUDA_VISIBLE_DEVICES, in its order.

    As torch.cuda reads it (`_parse_visible_devices`): the first entry says whether the list has indices, UUIDs of GPUs
    or names of MIG instances; the list ends before the first entry that is invalid; one GPU named twice shows none.
    Several MIG instances are all given here: CUDA shows a process the first one alone, so each child gets one.

    Args:
        gpus: The machine's, see `all_gpus`.
        devices: The variable; None where it is not set, which shows all.
    """
    if devices is None:
        return tuple(Visible(gpu=gpu, device=gpu.uuid if gpu.mig else gpu.index) for gpu in gpus)
    find = _by_name if devices.startswith(("GPU-", "MIG-")) else _by_index
    shown: list[Visible] = []
    for entry in devices.split(","):
        gpu = find(gpus, entry.strip(), devices[:4])
        if gpu is None:
            break
        if any(earlier.gpu == gpu for earlier in shown):
            return ()
        shown.append(Visible(gpu=gpu, device=gpu.index if find is _by_index and not gpu.mig else gpu.uuid))
    return tuple(shown)


def _by_index(gpus: Sequence[Gpu], entry: str, kind: str) -> Gpu | None:
    """The GPU of a number: what stands behind the digits is not read. Of one that is split, its first instance."""
    number = re.match(r"\+?\d+", entry)
    return next((gpu for gpu in gpus if number and gpu.index == int(number[0])), None)


def _by_name(gpus: Sequence[Gpu], entry: str, kind: str) -> Gpu | None:
    """The one GPU whose UUID begins so; none where several do, and for a name of the other kind."""
    if not entry.startswith(kind) or entry == kind:
        return None
    named = [gpu for gpu in gpus if gpu.uuid.startswith(entry) or (gpu.alias or "").startswith(entry)]
    return named[0] if len(named) == 1 else None


def no_gpu(where: str) -> Problem | None:
    """The problem that `cuda` is wanted and no GPU is visible; None where one is.

    Args:
        where: What wants it: `run.device`, `--device`.
    """
    gpus, trouble = _ask_driver()
    devices = os.environ.get(VISIBLE)
    if visible(gpus, devices):
        return None
    if gpus:
        names = ", ".join(f"{gpu.index} {gpu.uuid}" for gpu in gpus)
        return Problem(
            what="A GPU is wanted, and CUDA_VISIBLE_DEVICES shows none.",
            where=f"{where}, {VISIBLE}={devices}",
            why=f"This machine has {names}. CUDA stops at the first entry that names none of them.",
            next=f"Correct {VISIBLE}, or unset it.",
        )
    return Problem(
        what="A GPU is wanted, and this machine shows none.",
        where=where,
        why=f"NVIDIA's driver library (NVML) says: {trouble}." if trouble else "NVIDIA's driver lists no GPU.",
        next="Take --device cpu or run.device: cpu (or auto), or a machine with a GPU. In a container: --gpus all, and "
        "NVIDIA_DRIVER_CAPABILITIES=compute,utility. `quench plan RECIPE --gpu-gib N` needs none.",
    )


# ---- the driver


def _ask_driver() -> tuple[tuple[Gpu, ...], str]:
    """The GPUs, and what the driver's library complains of; nothing of that where it answered."""
    try:
        _init()
    except pynvml.NVMLError as error:  # no driver, no GPU, or a library of another version than the driver
        return (), str(error)
    try:
        return tuple(gpu for index, handle in enumerate(_handles()) for gpu in _devices(index, handle)), ""
    except pynvml.NVMLError as error:
        return (), str(error)
    finally:
        pynvml.nvmlShutdown()


def _init() -> None:
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError_LibraryNotFound:
        if not WSL_LIBRARY.exists():
            raise
        with contextlib.suppress(OSError):
            ctypes.CDLL(str(WSL_LIBRARY), mode=ctypes.RTLD_GLOBAL)  # once loaded, pynvml finds it by its bare name
        pynvml.nvmlInit()


def _handles() -> Iterator[Any]:
    for number in range(pynvml.nvmlDeviceGetCount()):
        try:
            yield pynvml.nvmlDeviceGetHandleByIndex(number)
        except (pynvml.NVMLError_NoPermission, pynvml.NVMLError_GpuIsLost):  # a container sees not all that are counted
            continue


def _devices(index: int, handle: Any) -> Iterator[Gpu]:
    """What CUDA counts of one GPU: itself, or its MIG instances."""
    if not _or_none(lambda: pynvml.nvmlDeviceGetMigMode(handle)[0]):  # not supported: no MIG (WSL2, consumer GPUs)
        yield _gpu(index, handle)
        return
    for number in range(pynvml.nvmlDeviceGetMaxMigDeviceCount(handle)):
        instance = _or_none(lambda number=number: pynvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, number))
        if instance is not None:
            yield _gpu(index, instance, parent=handle)


def _gpu(index: int, handle: Any, *, parent: Any = None) -> Gpu:
    memory = _or_none(lambda: pynvml.nvmlDeviceGetMemoryInfo(handle))
    return Gpu(
        index=index,
        uuid=_text(pynvml.nvmlDeviceGetUUID(handle)),
        name=_text(_or_none(lambda: pynvml.nvmlDeviceGetName(handle)) or "NVIDIA GPU"),
        total_bytes=memory and int(memory.total),
        free_bytes=memory and int(memory.free),
        mig=parent is not None,
        alias=None if parent is None else _or_none(lambda: _alias(handle, parent)),
        capability=_or_none(lambda: _capability(handle if parent is None else parent)),
    )


def _capability(handle: Any) -> str:
    return "{}.{}".format(*pynvml.nvmlDeviceGetCudaComputeCapability(handle))


def _alias(instance: Any, parent: Any) -> str:
    numbers = pynvml.nvmlDeviceGetGpuInstanceId(instance), pynvml.nvmlDeviceGetComputeInstanceId(instance)
    return f"MIG-{_text(pynvml.nvmlDeviceGetUUID(parent))}/{numbers[0]}/{numbers[1]}"


def _text(name: str | bytes) -> str:
    return name.decode() if isinstance(name, bytes) else name


def _or_none(ask: Callable[[], Any]) -> Any:
    """What the driver answers; None where it does not know such a thing."""
    try:
        return ask()
    except pynvml.NVMLError:
        return None
