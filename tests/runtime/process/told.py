"""A job body that says what it finds around it, and leaves traces that a later job must not see."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy

from tasks.runtime.process.job import Job

TRACES: list[str] = []


def _is_open(descriptor: int) -> bool:
    try:
        os.fstat(descriptor)
    except OSError:
        return False
    return True


def run(job: Job) -> dict[str, Any]:
    seen = {
        "traces": list(TRACES),
        "planted": os.environ.get("QUENCH_TRACE"),
        "token": os.environ.get("HF_TOKEN"),
        "threads": os.environ["OMP_NUM_THREADS"],
        "cwd": str(Path.cwd()),
        "session": os.getsid(0) == os.getpid() == os.getpgid(0),
        "stdin": sys.stdin.read(),
        "descriptors": sorted(number for number in range(64) if _is_open(number)),
        "draw": float(numpy.random.random()),
        "allocator": os.environ.get("JE_ARROW_MALLOC_CONF"),
    }
    TRACES.append(job.slug)
    os.environ["QUENCH_TRACE"] = job.slug
    print("said", job.slug)
    (job.out / "seen.json").write_text(json.dumps(seen))
    return {"parent": os.getppid()}
