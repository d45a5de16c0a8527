"""Products of bf16 matrices on a CPU that has no instructions for them: computed in fp32, rounded to bf16 once.

PyTorch 2.13 hands bf16 products to oneDNN where the CPU has AVX-512. Elsewhere a plain loop computes them, also in fp32
with one rounding at the end. Measured on one core of an AVX2 machine, 2,048 x 256 by 768 x 256: forward 142 ms by that
loop and 20 ms by the way here, forward and backward 1,827 and 77 ms (docs/adr/0016).
"""

from __future__ import annotations

import platform
import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from tasks.runtime.process.job import Job

OPERATORS = ("mm", "addmm", "bmm", "baddbmm")  # what linear layers, attention and their gradients come down to
MULTIPLYING = ("train", "reference", "quantize", "evaluate", "measure", "reload")
NOTE = (
    "computed in fp32 and rounded once: this CPU has no AVX-512, and PyTorch's own loop is five to twenty times slower"
)


def lacks_bf16() -> bool:
    """Whether PyTorch would multiply bf16 matrices by its plain loop here."""
    return platform.machine() == "x86_64" and not torch.ops.mkldnn._is_mkldnn_bf16_supported()


def setup_bf16(job: Job) -> None:
    """Put the fp32 kernels in place where this CPU needs them, and note it in the jobs that multiply."""
    if not lacks_bf16():
        return
    use_fp32_products()
    if job.stage in MULTIPLYING and job.execution.device == "cpu":
        job.events.note("bf16 products", NOTE)


@cache
def use_fp32_products() -> torch.library.Library:
    """Register the kernels for all CPU tensors of this process; other types than bf16 are computed as before."""
    library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Warning only once for all operators")  # replacing is what is wanted
        for name in OPERATORS:
            library.impl(name, _kernel(getattr(torch.ops.aten, name).out), "CPU")
    return library  # the kernels live as long as this does


def _kernel(out: Any) -> Callable[..., Tensor]:
    """The operator by its variant with `out`, which is not replaced."""

    def kernel(*args: Any, **scalars: Any) -> Tensor:
        if args[0].dtype is not torch.bfloat16:
            return out(*args, **scalars, out=torch.empty(0, dtype=args[0].dtype))
        wide = [arg.float() if isinstance(arg, Tensor) else arg for arg in args]
        return out(*wide, **scalars, out=torch.empty(0)).bfloat16()

    return kernel
