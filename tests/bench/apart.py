"""A measurement in a process of its own, on one thread: its peak memory is its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tasks.runtime.process.launch import CHECKOUT, child_env


def apart(module: str, *words: str) -> dict[str, Any]:
    """What `python -m MODULE --child WORDS` prints last, as JSON."""
    done = subprocess.run(
        [sys.executable, "-m", module, "--child", *words],
        env={**child_env(threads=1), "PATH": os.environ["PATH"]},
        cwd=CHECKOUT,
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def peak_kib() -> int:
    """Of this process until now. Not ru_maxrss: that begins with the peak of the process that forked this one."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
