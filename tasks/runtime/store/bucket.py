"""A bucket: the few S3 calls that a store makes, their conditions, and their errors in four parts.

Correctness rests on two conditional puts, If-None-Match and If-Match; everything else may be repeated.
"""

# boto3 and its parts have no stubs
# pyright: reportMissingTypeStubs=false
from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Generator, Mapping
from email.utils import mktime_tz, parsedate_tz
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import boto3
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    CredentialRetrievalError,
    FlexibleChecksumError,
    HTTPClientError,
    NoCredentialsError,
    PartialCredentialsError,
    ProfileNotFound,
)
from botocore.exceptions import ConnectionError as NoConnection
from s3transfer.exceptions import RetriesExceededError
from s3transfer.manager import TransferConfig, TransferManager
from s3transfer.subscribers import BaseSubscriber

from recipes.problem import Problem
from tasks.runtime.store.local import StoreTrouble

MULTIPART_BYTES = 64 << 20  # a larger file goes in parts
PART_BYTES = 32 << 20
PARALLEL = 10  # requests of a transfer at once
CONNECTIONS = 64  # kept open: many steps wait, look and transfer side by side
REPORT_EVERY_S = 2.0
CLOCK_S = 120.0  # apart: times of two machines are compared by people; S3 itself refuses at 15 minutes
CHANGED = ("PreconditionFailed", "ConditionalRequestConflict", "412", "409")
ABSENT = ("NoSuchKey", "404")
WRONG_CREDENTIALS = (
    "InvalidAccessKeyId",
    "SignatureDoesNotMatch",
    "ExpiredToken",
    "InvalidToken",
    "InvalidClientTokenId",
)
FORBIDDEN = ("AccessDenied", "403", "AllAccessDisabled", "Forbidden")
OTHER_REGION = ("PermanentRedirect", "301", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException")
RIGHTS = (
    "s3:ListBucket, s3:ListBucketMultipartUploads, s3:GetObject, s3:PutObject, s3:DeleteObject and "
    "s3:AbortMultipartUpload"
)
CREDENTIALS = "Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, or give this machine a role."


class StoredObject(NamedTuple):
    """An object that was read."""

    body: bytes
    etag: str


class ObjectSummary(NamedTuple):
    """An object that was listed; the key is without the store's prefix."""

    key: str
    etag: str
    size: int


class Bucket:
    """One prefix of one bucket. Credentials, region and endpoint are what boto3 finds in the environment."""

    def __init__(
        self,
        url: str,
        *,
        stop: threading.Event | None = None,
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        """Connect to nothing yet.

        Args:
            url: s3://BUCKET or s3://BUCKET/PREFIX.
            stop: Ends a transfer.
            say: Is called with the progress of transfers that take longer than two seconds.

        Raises:
            StoreTrouble: The URL is not one of a bucket, or the profile named in the environment does not exist.
        """
        parts = urlsplit(url)
        if parts.scheme != "s3" or not parts.netloc or parts.query:
            raise _trouble(
                "QUENCH_STORE names no bucket.",
                url,
                "It is s3://BUCKET or s3://BUCKET/PREFIX.",
                "Correct it. A folder that machines share needs no QUENCH_STORE: let QUENCH_HOME name it.",
            )
        self.name, self.prefix = parts.netloc, parts.path.strip("/")
        self.url = f"s3://{self.name}/{self.prefix}".rstrip("/")
        self.stop, self.say = stop, say
        with self._explained("opened"):
            self.client: Any = boto3.session.Session().client("s3", config=_config())  # pyright: ignore

    def check(self) -> None:
        """Read, write, and see a condition refused: what every later call rests on.

        Raises:
            StoreTrouble: The bucket cannot be used as a store.
        """
        key = self._key("conditional-put")
        with self._explained("listed"):
            answer = self.client.list_objects_v2(Bucket=self.name, Prefix=key, MaxKeys=1)
        self._check_clock(answer["ResponseMetadata"]["HTTPHeaders"].get("date", ""))
        for _ in range(2):
            try:
                with self._explained("written to"):
                    self.client.put_object(Bucket=self.name, Key=key, Body=b"kept for ever", IfNoneMatch="*")
            except _Changed:
                return
        raise _trouble(
            "The bucket's server ignores conditional puts.",
            self.url,
            "It wrote the same key twice under If-None-Match: two machines would overwrite each other's artifacts.",
            "Take a server that honours them, as AWS does, or a folder that machines share.",
        )

    def _check_clock(self, date: str) -> None:
        """Compare the server's time, as HTTP's Date header says it, with ours."""
        server_time = parsedate_tz(date)
        if server_time is None:  # no Date, or none that can be read
            return
        off = time.time() - mktime_tz(server_time)
        if abs(off) > CLOCK_S:
            side = "ahead of" if off > 0 else "behind"
            raise _clock(self.url, f"It is {abs(off) / 60:.0f} minutes {side} that of the bucket's server.")

    def read(self, key: str) -> StoredObject | None:
        """An object, or None where there is none."""
        try:
            with self._explained("read"):
                answer = self.client.get_object(Bucket=self.name, Key=self._key(key))
                return StoredObject(answer["Body"].read(), answer["ETag"])
        except _Absent:
            return None

    def create(self, key: str, body: bytes) -> str | None:
        """Write an object that must not be there; returns its ETag, None where somebody was first."""
        return self._put(key, body, IfNoneMatch="*")

    def replace(self, key: str, body: bytes, *, etag: str) -> str | None:
        """Write an object that must still have this ETag; returns the new one, None where it has changed or gone."""
        return self._put(key, body, IfMatch=etag)

    def _put(self, key: str, body: bytes, **condition: str) -> str | None:
        try:
            with self._explained("written to"):
                return self.client.put_object(Bucket=self.name, Key=self._key(key), Body=body, **condition)["ETag"]
        except _Absent:
            return None
        except _Changed:
            stored = self.read(key)  # a repeated request whose first answer was lost: it was ours
            return stored.etag if stored and stored.body == body else None

    def list_objects(self, prefix: str) -> list[ObjectSummary]:
        """Every object whose key begins so."""
        with self._explained("listed"):
            pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=self.name, Prefix=self._key(prefix))
            return [
                ObjectSummary(self._without_prefix(summary["Key"]), summary["ETag"], summary["Size"])
                for page in pages
                for summary in page.get("Contents", ())
            ]

    def remove(self, key: str) -> None:
        """Delete an object."""
        with self._explained("deleted from"):
            self.client.delete_object(Bucket=self.name, Key=self._key(key))

    def drop_unfinished(self, prefix: str) -> None:
        """Abort multipart uploads that somebody began below a prefix and did not finish."""
        with self._explained("asked for unfinished uploads"):
            pages = self.client.get_paginator("list_multipart_uploads")
            for page in pages.paginate(Bucket=self.name, Prefix=self._key(prefix)):
                for upload in page.get("Uploads", ()):
                    key, upload_id = upload["Key"], upload["UploadId"]
                    with contextlib.suppress(_Absent), self._explained("asked to abort an upload"):
                        self.client.abort_multipart_upload(Bucket=self.name, Key=key, UploadId=upload_id)

    # ---- files

    def send(self, files: Mapping[str, Path]) -> None:
        """Upload files to keys, in parallel; the large ones in parts. An object is there whole or not at all."""
        total = sum(path.stat().st_size for path in files.values())

        def start(manager: Any, moved: BaseSubscriber) -> list[Any]:
            return [
                manager.upload(str(path), self.name, self._key(key), subscribers=[moved]) for key, path in files.items()
            ]

        self._transfer(start, total, doing="uploading")

    def receive(self, files: Mapping[str, Path], *, total: int) -> None:
        """Download keys to files, in parallel; a file has its name only when it is whole.

        A file that arrived with other bytes than the server sent is missing: the caller looks, and asks again.
        """
        for path in files.values():
            path.parent.mkdir(parents=True, exist_ok=True)

        def start(manager: Any, moved: BaseSubscriber) -> list[Any]:
            return [
                manager.download(self.name, self._key(key), str(path), subscribers=[moved])
                for key, path in files.items()
            ]

        self._transfer(start, total, doing="downloading")

    def _transfer(self, start: Callable[[Any, BaseSubscriber], list[Any]], total: int, *, doing: str) -> None:
        moved = _Moved()
        reported = time.monotonic()
        config = TransferConfig(
            multipart_threshold=MULTIPART_BYTES, multipart_chunksize=PART_BYTES, max_request_concurrency=PARALLEL
        )
        try:
            with self._explained(f"used for {doing}"), TransferManager(self.client, config) as manager:
                futures = start(manager, moved)
                while not all(future.done() for future in futures):
                    if self.stop is not None and self.stop.is_set():
                        raise InterruptedError(f"stopped while {doing}")
                    if time.monotonic() - reported > REPORT_EVERY_S:
                        reported = time.monotonic()
                        self.say(f"{doing} {moved.size / 1e9:.2f} of {total / 1e9:.2f} GB, {self.url}")
                    time.sleep(0.02)
                for future in futures:
                    with contextlib.suppress(FlexibleChecksumError):  # other bytes arrived: it has no file, see receive
                        future.result()
        except (_Absent, _Changed) as error:
            remedy = "Nobody may remove objects of a store in use; the same command starts over."
            raise _trouble("An object went or changed while it was read.", self.url, f"{error}", remedy) from error

    # ---- keys and errors

    def _key(self, key: str) -> str:
        return f"{self.prefix}/{key}" if self.prefix else key

    def _without_prefix(self, key: str) -> str:
        return key.removeprefix(f"{self.prefix}/") if self.prefix else key

    @contextlib.contextmanager
    def _explained(self, done: str) -> Generator[None]:
        """Turn whatever boto3 raises into StoreTrouble; `done` completes `The bucket could not be ...`."""
        try:
            yield
        except ClientError as error:
            code = str(error.response.get("Error", {}).get("Code", ""))  # pyright: ignore
            if code in CHANGED:
                raise _Changed from error
            if code in ABSENT:
                raise _Absent from error
            raise self._refused(code, done, str(error)) from error
        except (NoCredentialsError, PartialCredentialsError, CredentialRetrievalError, ProfileNotFound) as error:
            raise _trouble("There are no credentials for the bucket.", self.url, f"{error}.", CREDENTIALS) from error
        except (HTTPClientError, NoConnection) as error:
            remedy = "Check the address (AWS_ENDPOINT_URL, or AWS_REGION) and the network; the same command resumes."
            raise _trouble("The bucket's server does not answer.", self.url, str(error), remedy) from error
        except (BotoCoreError, RetriesExceededError) as error:
            remedy = "Mend that; the same command resumes."
            raise _trouble(f"The bucket could not be {done}.", self.url, str(error), remedy) from error

    def _refused(self, code: str, done: str, answer: str) -> StoreTrouble:
        if code == "NoSuchBucket":
            return _trouble(f"There is no bucket {self.name}.", self.url, answer, "Create it, or correct QUENCH_STORE.")
        if code in WRONG_CREDENTIALS:
            return _trouble("The credentials for the bucket are wrong.", self.url, answer, CREDENTIALS)
        if code in FORBIDDEN:
            remedy = f"Give these credentials {RIGHTS} there."
            return _trouble(f"The bucket may not be {done} with these credentials.", self.url, answer, remedy)
        if code == "RequestTimeTooSkewed":
            return _clock(self.url, answer)
        if code in OTHER_REGION:
            return _trouble(
                "The bucket lies in another region.", self.url, answer, "Set AWS_REGION to the bucket's own."
            )
        return _trouble(f"The bucket could not be {done}.", self.url, answer, "Mend that; the same command resumes.")


class _Changed(Exception):
    """A condition did not hold."""


class _Absent(Exception):
    """There is no such object."""


class _Moved(BaseSubscriber):
    """Counts what went over the wire."""

    def __init__(self) -> None:
        self.size = 0

    def on_progress(self, future: Any, bytes_transferred: int, **more: Any) -> None:
        """From many threads: a line of progress may be behind by a chunk."""
        self.size += bytes_transferred


def _config() -> Config:
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    return Config(
        connect_timeout=5,
        read_timeout=60,
        retries={"mode": "standard", "max_attempts": 4},
        max_pool_connections=CONNECTIONS,
        s3={"addressing_style": "path" if endpoint else "auto"},  # a server of one's own seldom has a name per bucket
    )


def _clock(where: str, why: str) -> StoreTrouble:
    remedy = "Set it: timedatectl set-ntp true. S3 itself refuses a clock that is 15 minutes off."
    return _trouble("This machine's clock is wrong.", where, why, remedy)


def _trouble(what: str, where: str, why: str, remedy: str) -> StoreTrouble:
    return StoreTrouble([Problem(what=what, where=where, why=why, next=remedy)])
