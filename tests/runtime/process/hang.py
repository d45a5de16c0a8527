"""A job body that says its pid and then hangs."""

import os
import time
from typing import Any

from tasks.runtime.process.job import Job


def run(job: Job) -> dict[str, Any]:
    print(os.getpid(), flush=True)
    time.sleep(600)
    return {}
