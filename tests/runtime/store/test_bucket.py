"""What is wrong with a bucket is said in four parts before anything is spent, and costs nothing when it comes later."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from recipes.problem import Problem
from tasks.runtime.process.errors import StepFailed
from tasks.runtime.process.launch import Launcher
from tasks.runtime.process.leases import Leases
from tasks.runtime.process.ports import free_port
from tasks.runtime.step import Context, run_step
from tasks.runtime.store.bucket import Bucket
from tasks.runtime.store.local import Store, StoreTrouble
from tasks.runtime.store.open import open_store
from tests.runtime.test_step import MODEL, choice
from tests.s3_server import S3Server, s3_server, wire

READ = ["s3:ListBucket", "s3:GetObject"]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A server that asks for credentials; user `reader` may read, `nobody` may nothing."""
    with s3_server(tmp_path_factory.mktemp("s3")) as made:
        made.bucket("store")
        iam = made.client("iam")
        keys = {}
        for name, actions in (("owner", ["s3:*"]), ("reader", READ), ("nobody", [])):
            iam.create_user(UserName=name)
            if actions:
                rule = {"Version": "2012-10-17", "Statement": {"Effect": "Allow", "Action": actions, "Resource": "*"}}
                iam.put_user_policy(UserName=name, PolicyName="own", PolicyDocument=json.dumps(rule))
            one = iam.create_access_key(UserName=name)["AccessKey"]
            keys[name] = {"AWS_ACCESS_KEY_ID": one["AccessKeyId"], "AWS_SECRET_ACCESS_KEY": one["SecretAccessKey"]}
        made.enforce()
        made.users.update(keys)
        yield made


@pytest.fixture
def use(server: S3Server, monkeypatch: pytest.MonkeyPatch):
    """Sets the environment of a user of that server."""

    def using(user: str, **more: str) -> None:
        for name, value in {**server.env("s3://store/team"), **server.users[user], **more}.items():
            monkeypatch.setenv(name, value)

    return using


def refusal(url: str) -> Problem:
    with pytest.raises(StoreTrouble) as caught:
        Bucket(url).check()
    (problem,) = caught.value.problems
    assert all((problem.what, problem.where, problem.why, problem.next))
    return problem


def test_an_owner_may_and_checking_twice_is_no_harm(use) -> None:
    use("owner")
    Bucket("s3://store/team").check()
    Bucket("s3://store/team").check()


@pytest.mark.parametrize("url", ["store/team", "/mnt/store", "s3:///team", "https://store.s3.amazonaws.com/team"])
def test_what_is_no_url_of_a_bucket(url: str) -> None:
    assert refusal(url).what == "QUENCH_STORE names no bucket."


def test_a_bucket_that_does_not_exist(use) -> None:
    use("owner")
    assert refusal("s3://stores/team").what == "There is no bucket stores."


def test_a_bucket_that_refuses(use) -> None:
    use("nobody")
    problem = refusal("s3://store/team")
    assert problem.what == "The bucket may not be listed with these credentials." and "s3:PutObject" in problem.next


def test_a_bucket_for_reading_only(use) -> None:
    use("reader")
    assert refusal("s3://store/team").what == "The bucket may not be written to with these credentials."


def test_credentials_that_are_wrong(use) -> None:
    use("owner", AWS_SECRET_ACCESS_KEY="wrong")
    problem = refusal("s3://store/team")
    assert problem.what == "The credentials for the bucket are wrong." and "SignatureDoesNotMatch" in problem.why
    use("owner", AWS_ACCESS_KEY_ID="AKIAUNKNOWN")
    assert refusal("s3://store/team").what == "The credentials for the bucket are wrong."


def test_credentials_that_are_missing(use, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    use("owner", AWS_SHARED_CREDENTIALS_FILE=str(tmp_path / "none"), AWS_CONFIG_FILE=str(tmp_path / "none"))
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    assert refusal("s3://store/team").what == "There are no credentials for the bucket."
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    problem = refusal("s3://store/team")
    assert problem.what == "There are no credentials for the bucket." and "AWS_PROFILE" in problem.next
    monkeypatch.setenv("AWS_PROFILE", "unknown")
    assert refusal("s3://store/team").what == "There are no credentials for the bucket."


def test_an_endpoint_where_nobody_answers(use) -> None:
    use("owner", AWS_ENDPOINT_URL=f"http://127.0.0.1:{free_port()}")
    problem = refusal("s3://store/team")
    assert problem.what == "The bucket's server does not answer." and "AWS_ENDPOINT_URL" in problem.next


def test_a_server_that_ignores_conditions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with s3_server(tmp_path) as server, wire(server.endpoint) as line:
        line.drop = ("if-none-match",)
        for name, value in server.env(url := server.bucket("store")).items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("AWS_ENDPOINT_URL", line.endpoint)
        assert refusal(url).what == "The bucket's server ignores conditional puts."


@pytest.mark.parametrize(("ahead_s", "side"), [(540.0, "behind"), (-540.0, "ahead of")])
def test_clocks_that_are_minutes_apart(
    ahead_s: float, side: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with s3_server(tmp_path) as server, wire(server.endpoint) as line:
        for name, value in server.env(url := server.bucket("store")).items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("AWS_ENDPOINT_URL", line.endpoint)
        line.ahead_s = ahead_s / 9
        Bucket(url).check()
        line.ahead_s = ahead_s
        problem = refusal(url)
        assert problem.what == "This machine's clock is wrong." and f"9 minutes {side} that of" in problem.why
        line.status, line.error = lambda method, path: 403, "RequestTimeTooSkewed"  # what S3 says from 15 minutes on
        assert refusal(url).what == problem.what


def test_an_outage_at_the_end_fails_the_step_and_its_work_is_taken_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with s3_server(tmp_path) as server, wire(server.endpoint) as line, Launcher() as launcher:
        for name, value in server.env(url := server.bucket("store")).items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("AWS_ENDPOINT_URL", line.endpoint)
        home = tmp_path / "home"
        context = Context(store=open_store(home), launcher=launcher, leases=Leases(home))
        line.status = lambda method, path: 503 if method == "PUT" and "/store/" in path.removeprefix("/store") else None
        with pytest.raises(StepFailed) as caught:
            run_step(choice(), {"dequantized": MODEL.artifact}, context)
        assert "could not be used for uploading" in caught.value.problem.what
        assert not list(Store(home).manifests()) and not server.keys(url, "manifests/")
        line.status = lambda method, path: None
        made = run_step(choice(), {"dequantized": MODEL.artifact}, context)
        assert made.hit and made.artifact.manifest["attempts"] == 1  # the child did not run again
        assert server.keys(url, "manifests/")
