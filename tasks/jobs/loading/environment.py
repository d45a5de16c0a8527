"""Environment variables for GPTQModel 7.6, which also serves transformers' GPTQ and AWQ layers."""

from __future__ import annotations

import os

GPTQMODEL = {
    # Its pool has half the cores as workers, and loading asks for two of them: on two cores it ends in an error.
    "GPTQMODEL_CPU_WORKERS": "2",
    # Packing would first compile a C++ extension for 31 s, into ~/.cache; plain torch packs the quickstart in 1 s.
    "GPTQMODEL_DISABLE_PACK_EXT": "1",
    # 2- and 3-bit layers would compile their dequantization in the first forward: 18 s, and a compiler is needed.
    "TORCHDYNAMO_DISABLE": "1",
    # Some of its kernels fetch CUTLASS from the net at their first use: kernels.py names others.
    "GPTQMODEL_OFFLINE": "1",
    # Otherwise thousands of redrawn progress bars end up in the log; ours comes from events.
    "TERM": "dumb",
}


def tame_gptqmodel(*, verbose: bool = False) -> None:
    """Set the variables and, unless `verbose`, leave only warnings of its log. Call it before a model is loaded."""
    os.environ.update(GPTQMODEL)
    import logbar  # GPTQModel's logger; 50 ms, and it has to be set before GPTQModel prints its banner

    logbar.LogBar.shared().setLevel("INFO" if verbose else "WARN")
