"""A job body that says which Python environment it runs in; standard library only."""

import sys
from typing import Any

from tasks.runtime.process.job import Job


def run(job: Job) -> dict[str, Any]:
    return {"prefix": sys.prefix}
