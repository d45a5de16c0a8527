"""A lock in a bucket: one object with its owner and a beat, written by conditional puts alone.

No two clocks are compared. The owner writes a new beat every quarter of the expiry; who waits watches the object's ETag
by his own monotonic clock, and takes it over when it has not changed for the whole expiry. A machine whose clock is
wrong, or an owner that was only slow, costs double work and nothing else: the exclusive put of the manifest decides.
The object stays when the lock is free, since not every server has a conditional delete.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Generator
from typing import Any

from tasks.runtime.store.bucket import Bucket, StoredObject
from tasks.runtime.store.local import StoreTrouble

EXPIRY_S = 60.0
POLL_S = 1.0
JOIN_S = 5.0


@contextlib.contextmanager
def remote_lock(
    bucket: Bucket,
    key: str,
    *,
    home: str,
    expiry_s: float = EXPIRY_S,
    stop: threading.Event | None = None,
    waits: Callable[[str], None] = lambda owner: None,
) -> Generator[None]:
    """Hold the lock while the body runs, as long as this process lives and reaches the bucket.

    Args:
        bucket: Where the lock lies.
        key: Its object.
        home: Names the local home, whose own lock the caller holds: an owner of the same home is dead.
        expiry_s: An owner without a new beat for so long is taken for dead.
        stop: Ends the waiting.
        waits: Is called once with who has the lock.

    Raises:
        InterruptedError: `stop` was set while waiting.
        StoreTrouble: The bucket does not answer while waiting.
    """
    own = _Ownership(bucket, key, home=home)
    own.take(expiry_s, stop=stop, waits=waits)
    done = threading.Event()
    beating = threading.Thread(target=own.beat, args=(done, expiry_s / 4), name="quench-lock", daemon=True)
    beating.start()
    try:
        yield
    finally:
        done.set()
        beating.join(timeout=JOIN_S)  # the bucket may be away: then the lock is free after the expiry
        if not beating.is_alive():
            own.free()


class _Ownership:
    def __init__(self, bucket: Bucket, key: str, *, home: str) -> None:
        self.bucket, self.key = bucket, key
        self.about = {"owner": uuid.uuid4().hex, "home": home, "host": socket.gethostname(), "process": os.getpid()}
        self.beats = 0
        self.etag: str | None = None

    def _body(self, **more: Any) -> bytes:
        """Other bytes each time, so that the ETag changes."""
        self.beats += 1
        return json.dumps({**self.about, "beat": self.beats, **more}, sort_keys=True).encode()

    def take(self, expiry_s: float, *, stop: threading.Event | None, waits: Callable[[str], None]) -> None:
        """Wait for the lock and take it."""
        seen, since, reported = "", time.monotonic(), False
        self.etag = self.bucket.create(self.key, self._body())
        while self.etag is None:
            lock = self.bucket.read(self.key)
            if lock is None:
                self.etag = self.bucket.create(self.key, self._body())
                continue
            if lock.etag != seen:
                seen, since = lock.etag, time.monotonic()
            if self._is_free(lock) or time.monotonic() - since >= expiry_s:
                self.etag = self.bucket.replace(self.key, self._body(), etag=lock.etag)
                continue
            if not reported:
                waits(_owner(lock))
                reported = True
            if (stop or threading.Event()).wait(min(POLL_S, expiry_s / 4)):
                raise InterruptedError(f"stopped while waiting for {self.key}")

    def _is_free(self, lock: StoredObject) -> bool:
        owner = json.loads(lock.body)
        return owner.get("free", False) or owner["home"] == self.about["home"]

    def beat(self, done: threading.Event, every_s: float) -> None:
        """Write a beat now and then; end where somebody else has taken the lock."""
        while self.etag is not None and not done.wait(every_s):
            with contextlib.suppress(StoreTrouble):  # away for a while: the next beat tries again
                self.etag = self.bucket.replace(self.key, self._body(), etag=self.etag)

    def free(self) -> None:
        """Let others have it at once; where the bucket is away, they have it after the expiry."""
        if self.etag is not None:
            with contextlib.suppress(StoreTrouble):
                self.bucket.replace(self.key, self._body(free=True), etag=self.etag)


def _owner(lock: StoredObject) -> str:
    owner = json.loads(lock.body)
    return f"{owner['host']}, process {owner['process']}"
