"""One machine as a process: works on the store that its environment names, and says what came of it as JSON."""

import json
import sys
import threading

from tasks.runtime.process.launch import Launcher
from tasks.runtime.process.leases import Leases
from tasks.runtime.step import Context, run_step
from tasks.runtime.store import bucket
from tasks.runtime.store.local import Artifact, Store, find_home
from tasks.runtime.store.open import open_store

PRINT = "ab" * 32


def written(
    store: Store, files: dict[str, bytes], *, inputs: dict[str, str], fingerprint: str = PRINT, stage: str = "train"
) -> Artifact:
    """Begin, write, commit."""
    attempt = store.begin(stage, "tiny", fingerprint, inputs=inputs)
    for name, data in {**files, "events.jsonl": b"{}\n"}.items():
        (attempt.files / name).parent.mkdir(parents=True, exist_ok=True)
        (attempt.files / name).write_bytes(data)
    return store.commit(attempt, manifest(inputs, fingerprint, stage))


def manifest(inputs: dict[str, str], fingerprint: str = PRINT, stage: str = "train") -> dict[str, object]:
    return {
        "stage": stage,
        "slug": "tiny",
        "fingerprint": fingerprint,
        "identity": {"params": {"rank": 8}},
        "inputs": {name: {"fingerprint": "f", "digest": one, "path": "p"} for name, one in inputs.items()},
        "result": {},
    }


def make() -> None:
    """run_step of the lightest real step."""
    from tests.runtime.test_step import MODEL, choice

    home = find_home()
    with Launcher() as launcher:
        context = Context(store=open_store(home), launcher=launcher, leases=Leases(home))
        made = run_step(choice(), {"dequantized": MODEL.artifact}, context)
    attempts = len(list(made.artifact.folder.glob("attempt-*")))  # type: ignore[union-attr]
    said = {"hit": made.hit, "manifest": made.artifact.manifest, "attempts": attempts}
    print(json.dumps(said), flush=True)


def commit() -> None:
    """Commit one large and one small file under the step's lock, in parts of 5 MiB."""
    bucket.MULTIPART_BYTES, bucket.PART_BYTES = 6 << 20, 5 << 20
    store = open_store(find_home())
    with store.lock("train", PRINT):
        written(store, {"small.json": b"{}", "weights.bin": bytes(range(256)) * (48 << 10)}, inputs={"base": "1"})
    print(json.dumps({}), flush=True)


def hold() -> None:
    """Take the step's lock and keep it."""
    home = find_home()
    home.mkdir(parents=True, exist_ok=True)
    store = open_store(home)
    if len(sys.argv) > 2:
        store.expiry_s = float(sys.argv[2])  # type: ignore[attr-defined]
    with store.lock("train", PRINT):
        print("held", flush=True)
        threading.Event().wait(120)


if __name__ == "__main__":
    {"make": make, "commit": commit, "hold": hold}[sys.argv[1]]()
