"""Several machines on one store: a home on a path that all see, and homes of their own before one bucket.

One suite for both. A machine is a Store object or a process; on the shared path all have one home, before the bucket
each has its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from tasks.runtime.process.launch import CHECKOUT
from tasks.runtime.process.leases import Leases, this_machine
from tasks.runtime.store.bucket import Bucket
from tasks.runtime.store.local import Artifact, LostRaceError, Store, StoreTrouble
from tasks.runtime.store.open import open_store
from tasks.runtime.store.s3 import S3Store
from tests.runtime.store.machine import PRINT, manifest, written
from tests.s3_server import S3Server, Wire, s3_server, wire

WAIT_S = 60


@dataclass(frozen=True, kw_only=True)
class Machines:
    """Makes machines that share one store. bucket: its URL; None where they share a path."""

    folder: Path
    bucket: str | None
    env: dict[str, str]

    def home(self, name: str) -> Path:
        return self.folder / (name if self.bucket else "shared")

    def store(self, name: str) -> Store:
        return open_store(self.home(name))

    def start(self, name: str, *words: str, **more: str) -> subprocess.Popen[str]:
        env = {**os.environ, **self.env, "QUENCH_HOME": str(self.home(name)), **more}
        argv = [sys.executable, "-m", "tests.runtime.store.machine", *words]
        return subprocess.Popen(argv, env=env, cwd=CHECKOUT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def ended(process: subprocess.Popen[str]) -> dict[str, object]:
    out, err = process.communicate(timeout=WAIT_S)
    assert process.returncode == 0, err
    return json.loads(out.splitlines()[-1])


def downloaded(store: Store, inputs: dict[str, str]) -> Artifact | None:
    return store.bring(store.find("train", PRINT, inputs))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with s3_server(tmp_path_factory.mktemp("s3")) as made:
        yield made


@pytest.fixture
def in_bucket(server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machines:
    url = server.bucket(f"store-{time.monotonic_ns()}")
    for name, value in (env := server.env(url)).items():
        monkeypatch.setenv(name, value)
    return Machines(folder=tmp_path, bucket=url, env=env)


@pytest.fixture(params=["path", "bucket"])
def machines(request: pytest.FixtureRequest, tmp_path: Path) -> Machines:
    if request.param == "bucket":
        return request.getfixturevalue("in_bucket")
    return Machines(folder=tmp_path, bucket=None, env={})


# ---- the contract


def test_what_one_machine_made_is_a_hit_on_another_with_the_same_bytes(machines: Machines) -> None:
    one, two = machines.store("one"), machines.store("two")
    assert downloaded(two, {"base": "1"}) is None
    made = written(one, {"weights.bin": b"w" * 999, "tokenizer/a ü.json": b"{}", "empty": b""}, inputs={"base": "1"})
    found = downloaded(two, {"base": "1"})
    assert found is not None and found.digest == made.digest and found.fingerprint == made.fingerprint
    files = {path.relative_to(made.path): path.read_bytes() for path in made.path.rglob("*") if path.is_file()}
    assert len(files) == 4
    assert files == {
        path.relative_to(found.path): path.read_bytes() for path in found.path.rglob("*") if path.is_file()
    }
    assert found.manifest == made.manifest
    assert {path.stat().st_mode & 0o222 for path in found.path.rglob("*") if path.is_file()} == {0}
    assert two.find("train", PRINT, {"base": "1"}).artifact == found  # now it is here


def test_a_remade_input_is_no_hit_and_both_stay(machines: Machines) -> None:
    one, two = machines.store("one"), machines.store("two")
    old = written(one, {"w": b"x"}, inputs={"base": "1"})
    assert two.find("train", PRINT, {"base": "2"}).why.startswith("input was remade")
    new = written(two, {"w": b"y"}, inputs={"base": "2"})
    digests = [(downloaded(store, {"base": base}) or new).digest for store in (one, two) for base in "12"]
    assert digests == [old.digest, new.digest] * 2 and old.digest != new.digest


def test_another_print_is_no_hit(machines: Machines) -> None:
    written(machines.store("one"), {"w": b"x"}, inputs={})
    assert machines.store("two").find("train", "cd" * 32, {}).why == "not made yet"


def test_unfinished_work_is_seen_by_nobody(machines: Machines) -> None:
    attempt = machines.store("one").begin("train", "tiny", PRINT, inputs={})
    (attempt.files / "w").write_bytes(b"x")
    assert downloaded(machines.store("two"), {}) is None
    assert downloaded(machines.store("one"), {}) is None


def test_a_missing_file_is_damage_and_comes_back_or_is_made_again(machines: Machines) -> None:
    one = machines.store("one")
    made = written(one, {"w": b"x"}, inputs={})
    (made.path / "w").unlink()
    again = downloaded(one, {})
    if machines.bucket:
        assert again is not None and (again.path / "w").read_bytes() == b"x"
    else:
        assert again is None and one.find("train", PRINT, {}).why == "damaged: w is missing"
        assert (written(one, {"w": b"x"}, inputs={}).path / "w").read_bytes() == b"x"
    assert list((one.home / "damaged").iterdir())


def test_the_first_commit_wins_and_the_second_takes_the_winners(machines: Machines) -> None:
    one, two = machines.store("one"), machines.store("two")
    mine = one.begin("train", "tiny", PRINT, inputs={})
    (mine.files / "w").write_bytes(b"mine")
    written(two, {"w": b"theirs"}, inputs={})
    with pytest.raises((LostRaceError, FileNotFoundError)):
        one.commit(mine, manifest({}))
    won = downloaded(one, {})
    assert won is not None and (won.path / "w").read_bytes() == b"theirs"


def test_a_choice_stands_for_what_it_names_on_every_machine(machines: Machines) -> None:
    one, two = machines.store("one"), machines.store("two")
    model = written(one, {"w": b"x"}, inputs={})
    attempt = one.begin("choose", "tiny", "ef" * 32, inputs={"dequantized": model.digest})
    (attempt.files / "choice.json").write_text('{"candidate": "dequantized"}')
    raw = manifest({"dequantized": model.digest}, "ef" * 32, "choose") | {"result": {"candidate": "dequantized"}}
    raw["inputs"]["dequantized"]["path"] = str(model.path.relative_to(one.home))  # type: ignore[index]
    choice = one.commit(attempt, raw)
    there = downloaded(two, {})
    looked = two.find("choose", "ef" * 32, {"dequantized": model.digest})
    found = two.bring(looked)
    assert there is not None and found is not None
    assert choice.digest == (looked.artifact or looked.remote or choice).digest == found.digest == there.digest
    assert found.path == there.path and (found.path / "w").read_bytes() == b"x"


def test_eight_writers_of_one_step_make_one_artifact(machines: Machines) -> None:
    writers = [machines.start(f"machine-{number}", "make") for number in range(8)]
    with ThreadPoolExecutor(8) as pool:
        said = list(pool.map(ended, writers))
    assert sorted(one["hit"] for one in said) == [False] + 7 * [True]
    assert all(one["manifest"] == said[0]["manifest"] for one in said)
    assert len(list(machines.store("machine-0").manifests())) == 1


def test_a_lock_waits_and_a_stop_ends_the_waiting(machines: Machines) -> None:
    one, two = machines.store("one"), machines.store("two")
    for store in (one, two):
        store.home.mkdir(parents=True, exist_ok=True)
    lines: list[str] = []
    stop = threading.Event()
    with one.lock("train", PRINT):
        threading.Timer(0.5, stop.set).start()
        with pytest.raises(InterruptedError), two.lock("train", PRINT, stop=stop, say=lines.append):
            pass
    assert len(lines) == 1 and lines[0].startswith("waiting for another")
    with two.lock("train", PRINT, stop=stop):  # free, so that a stop does not matter
        pass


def test_a_dead_owners_lock_is_free(machines: Machines) -> None:
    owner = machines.start("one", "hold")
    assert owner.stdout is not None and owner.stdout.readline() == "held\n"
    owner.kill()
    owner.wait()
    clock = time.monotonic()
    with machines.store("one").lock("train", PRINT):  # on its own machine at once: the kernel has freed the home's lock
        assert time.monotonic() - clock < 10


def test_machines_on_one_path_have_slots_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUENCH_CPU_SLOTS", "1")
    (stop := threading.Event()).set()
    one, two = (Leases(tmp_path, machine=name) for name in "ab")
    with one.take(1), two.take(1, stop=stop), pytest.raises(InterruptedError), one.take(1, stop=stop):
        pass
    assert Leases(tmp_path).folder.name == this_machine()


# ---- the bucket alone


def test_a_living_owner_keeps_its_lock_beyond_the_expiry_and_a_dead_machines_is_free_after_it(
    in_bucket: Machines,
) -> None:
    owner = in_bucket.start("one", "hold", "2")
    assert owner.stdout is not None and owner.stdout.readline() == "held\n"
    two = in_bucket.store("two")
    assert isinstance(two, S3Store)
    two.home.mkdir()
    two.expiry_s = 2.0
    stop = threading.Event()
    threading.Timer(5, stop.set).start()  # two and a half expiries
    with pytest.raises(InterruptedError), two.lock("train", PRINT, stop=stop):
        pass
    owner.kill()
    owner.wait()
    clock = time.monotonic()
    with two.lock("train", PRINT):
        assert time.monotonic() - clock >= 2.0 - 0.1  # no sooner: it could be alive


def test_an_owner_that_lost_its_lock_harms_nobody(in_bucket: Machines, server: S3Server) -> None:
    one, two = in_bucket.store("one"), in_bucket.store("two")
    assert isinstance(one, S3Store) and isinstance(two, S3Store) and in_bucket.bucket
    for store in (one, two):
        store.home.mkdir()
    two.expiry_s = 0.5  # while one beats every 15 s: for two it looks dead
    with one.lock("train", PRINT):
        mine = one.begin("train", "tiny", PRINT, inputs={})
        (mine.files / "w").write_bytes(b"mine")
        with two.lock("train", PRINT):
            theirs = written(two, {"w": b"theirs"}, inputs={})
            with pytest.raises(LostRaceError):
                one.commit(mine, manifest({}))
    won = downloaded(one, {})
    assert won is not None and won.digest == theirs.digest
    assert {key.split("/")[2] for key in server.keys(in_bucket.bucket, "store/")} == {theirs.folder.name}  # type: ignore[union-attr]
    assert len(server.keys(in_bucket.bucket, "manifests/")) == 1


def test_a_killed_upload_leaves_nothing_visible_and_is_taken_up(in_bucket: Machines, server: S3Server) -> None:
    assert in_bucket.bucket
    name = in_bucket.bucket.removeprefix("s3://").split("/")[0]
    with wire(server.endpoint) as line:
        line.hold = lambda method, path: "partNumber=3" in path  # the others may arrive
        first = in_bucket.start("one", "commit", AWS_ENDPOINT_URL=line.endpoint)
        assert line.held.wait(WAIT_S)
        first.kill()
        first.wait()
        assert not server.keys(in_bucket.bucket, "manifests/")
        assert len(server.client().list_multipart_uploads(Bucket=name)["Uploads"]) == 1
        assert downloaded(in_bucket.store("two"), {"base": "1"}) is None
        one = in_bucket.store("one")
        assert downloaded(one, {"base": "1"}) is None
        line.seen.clear()
    with one.lock("train", PRINT):
        taken = one.take_up("train", "tiny", PRINT, inputs={"base": "1"})
    assert taken is not None and taken.manifest["attempts"] == 1
    assert "Uploads" not in server.client().list_multipart_uploads(Bucket=name)
    found = downloaded(in_bucket.store("two"), {"base": "1"})
    assert found is not None
    assert (
        (found.path / "weights.bin").read_bytes()
        == (taken.path / "weights.bin").read_bytes()
        == bytes(range(256)) * (48 << 10)
    )


def test_a_kill_after_the_manifest_is_taken_up_without_a_download(
    in_bucket: Machines, server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = in_bucket.store("one")
    with monkeypatch.context() as patch:  # a kill between the bucket's manifest and the cache
        patch.setattr(Path, "rename", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            written(one, {"w": b"x"}, inputs={})
    assert one.find("train", PRINT, {}).why == "in the bucket"
    with wire(server.endpoint) as line:
        monkeypatch.setenv("AWS_ENDPOINT_URL", line.endpoint)
        taken = in_bucket.store("one").take_up("train", "tiny", PRINT, inputs={})
    assert taken is not None and (taken.path / "w").read_bytes() == b"x"
    assert not [path for _, path in line.seen if path.partition("?")[0].endswith("/files/w")]


def test_a_manifest_that_names_files_elsewhere_is_refused(in_bucket: Machines, server: S3Server) -> None:
    assert in_bucket.bucket
    written(in_bucket.store("one"), {"w": b"x"}, inputs={})
    (key,) = server.keys(in_bucket.bucket, "manifests/")
    name = in_bucket.bucket.removeprefix("s3://").split("/")[0]
    there = {"Bucket": name, "Key": f"team/{key}"}
    made = json.loads(server.client().get_object(**there)["Body"].read())
    made["files"]["../../../../outside"] = made["files"]["w"]
    server.client().put_object(**there, Body=json.dumps(made).encode())
    with pytest.raises(StoreTrouble, match="outside of its folder"):
        downloaded(in_bucket.store("two"), {})


def test_what_an_upload_of_a_lost_machine_left_is_removed_by_the_next(in_bucket: Machines, server: S3Server) -> None:
    assert in_bucket.bucket
    with wire(server.endpoint) as line:
        line.hold = lambda method, path: "/manifests/" in path and method == "PUT"
        first = in_bucket.start("one", "commit", AWS_ENDPOINT_URL=line.endpoint)
        assert line.held.wait(WAIT_S)  # all files are there, the manifest is not
        first.kill()
        first.wait()
    left = server.keys(in_bucket.bucket, "store/")
    assert len(left) == 3
    made = written(in_bucket.store("two"), {"w": b"made again, with other bytes"}, inputs={"base": "1"})
    assert {key.split("/")[2] for key in server.keys(in_bucket.bucket, "store/")} == {made.folder.name}  # type: ignore[union-attr]


def _bent_once(path_part: str, log: list[str]) -> Wire.__class__:  # type: ignore[valid-type]
    def bend(method: str, path: str, body: bytes) -> bytes:
        if method == "GET" and path_part in path and not log:
            log.append(path)
            return body[:-1] + bytes([body[-1] ^ 1])
        return body

    return bend  # type: ignore[return-value]


def test_a_download_with_other_bytes_is_refused_and_repeated(
    in_bucket: Machines, server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert in_bucket.bucket
    written(in_bucket.store("one"), {"w": b"0123456789", "v": b"v"}, inputs={})
    lines: list[str] = []
    with wire(server.endpoint) as line:
        bent: list[str] = []
        line.bend = _bent_once("/files/w", bent)
        monkeypatch.setenv("AWS_ENDPOINT_URL", line.endpoint)
        found = downloaded(S3Store(in_bucket.home("two"), Bucket(in_bucket.bucket, say=lines.append)), {})
        got = [path for method, path in line.seen if method == "GET" and "/files/" in path]
    assert bent and found is not None and (found.path / "w").read_bytes() == b"0123456789"
    assert "arrived with other bytes" in lines[0]
    assert [path.rsplit("/", 1)[1] for path in got].count("v") == 1  # what was whole is not asked for again


def test_a_download_that_was_cut_goes_on_from_what_is_whole(
    in_bucket: Machines, server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert in_bucket.bucket
    written(in_bucket.store("one"), {"a": b"a", "w": b"w" * 1000}, inputs={})
    with wire(server.endpoint) as line:
        line.hold = lambda method, path: method == "GET" and "/files/w" in path
        monkeypatch.setenv("AWS_ENDPOINT_URL", line.endpoint)
        stop = threading.Event()
        store = S3Store(in_bucket.home("two"), Bucket(in_bucket.bucket, stop=stop))
        threading.Thread(target=lambda: (line.held.wait(WAIT_S), time.sleep(0.5), stop.set()), daemon=True).start()
        with pytest.raises(InterruptedError):
            downloaded(store, {})
        assert not list(store.manifests())
        line.hold = lambda method, path: False
        line.seen.clear()
        stop.clear()
        found = downloaded(store, {})
    assert found is not None and (found.path / "w").read_bytes() == b"w" * 1000
    assert not [path for method, path in line.seen if method == "GET" and path.endswith("/files/a")]


def test_damage_in_the_bucket_is_said_and_made_again_for_all(in_bucket: Machines, server: S3Server) -> None:
    assert in_bucket.bucket
    written(in_bucket.store("one"), {"w": b"0123456789"}, inputs={})
    (key,) = (key for key in server.keys(in_bucket.bucket, "store/") if key.endswith("/w"))
    name = in_bucket.bucket.removeprefix("s3://").split("/")[0]
    server.client().put_object(Bucket=name, Key=f"team/{key}", Body=b"0123456780")
    lines: list[str] = []
    two = S3Store(in_bucket.home("two"), Bucket(in_bucket.bucket, say=lines.append))
    assert two.find("train", PRINT, {}).why == "in the bucket"
    assert downloaded(two, {}) is None
    assert "damaged in the bucket, made again" in lines[-1]
    assert two.find("train", PRINT, {}).why == "damaged in the bucket"
    written(two, {"w": b"9876543210"}, inputs={})
    found = downloaded(in_bucket.store("three"), {})
    assert found is not None and (found.path / "w").read_bytes() == b"9876543210"


def test_what_a_home_made_before_it_had_a_bucket_is_uploaded_and_paths_are_the_same_everywhere(
    in_bucket: Machines, server: S3Server
) -> None:
    assert in_bucket.bucket
    plain = Store(in_bucket.home("one"))
    below = written(plain, {"w": b"x"}, inputs={}, fingerprint="cd" * 32)
    attempt = plain.begin("train", "tiny", PRINT, inputs={"base": below.digest})
    (attempt.files / "w").write_bytes(b"y")
    raw = manifest({"base": below.digest})
    raw["inputs"]["base"]["path"] = str(below.path.relative_to(plain.home))  # type: ignore[index]
    above = plain.commit(attempt, raw)
    one, two = in_bucket.store("one"), in_bucket.store("two")
    found = one.find("train", PRINT, {"base": below.digest})
    assert found.artifact is None and found.remote == above and found.why == "made here, not in the bucket yet"
    assert one.bring(found) is None  # not before it is uploaded, under the lock
    for fingerprint, inputs in (("cd" * 32, {}), (PRINT, {"base": below.digest})):
        taken = one.take_up("train", "tiny", fingerprint, inputs=inputs)
        there = two.bring(two.find("train", fingerprint, inputs))
        assert taken is not None and there is not None and taken.digest == there.digest
        assert taken.path.relative_to(one.home) == there.path.relative_to(two.home)
    path = there.manifest["inputs"]["base"]["path"]
    assert (two.home / path / "w").read_bytes() == (one.home / path / "w").read_bytes() == b"x"
    assert (above.path / "w").stat().st_ino == (taken.path / "w").stat().st_ino  # no second copy


def test_the_cache_of_one_bucket_is_no_hit_in_another(in_bucket: Machines, server: S3Server) -> None:
    assert in_bucket.bucket
    made = written(in_bucket.store("one"), {"w": b"x"}, inputs={})
    other = S3Store(in_bucket.home("one"), Bucket(in_bucket.bucket + "-other"))
    assert other.find("train", PRINT, {}).why == "made here, not in the bucket yet"
    assert other.take_up("train", "tiny", PRINT, inputs={}) == made
    assert server.keys(in_bucket.bucket + "-other", "manifests/")
