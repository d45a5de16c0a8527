"""Which store a home has: itself, or the bucket that QUENCH_STORE names, with the home as its cache."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path

from tasks.runtime.store.local import Store


def open_store(
    home: Path, *, stop: threading.Event | None = None, say: Callable[[str], None] = lambda text: None
) -> Store:
    """The store of a home.

    Args:
        home: QUENCH_HOME.
        stop: Ends transfers.
        say: Is called with the progress of long transfers, and with damage in the bucket.

    Raises:
        StoreTrouble: QUENCH_STORE names no bucket.
    """
    url = os.environ.get("QUENCH_STORE")
    if not url:
        return Store(home)
    from tasks.runtime.store.bucket import Bucket  # boto3 takes 0.3 s
    from tasks.runtime.store.s3 import S3Store

    return S3Store(home, Bucket(url, stop=stop, say=say))
