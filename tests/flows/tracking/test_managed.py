"""MLflow as somebody else runs it: users, tokens, artifacts behind its proxy, permission to make and not to delete."""

from __future__ import annotations

import http.server
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from flows.promotion import registry
from flows.run.credentials import take_out_password
from flows.tracking.sync import sync
from flows.tracking.tracker import Tracker
from recipes.problem import Problem, RecipeError
from tests.flows.tracking.test_connection import no_address, promotion
from tests.flows.tracking.tracked import ADAPTER, write_run
from tests.mlflow_server import ADMIN, TOKEN, USER, auth_server, grant

__all__ = ["no_address"]
NAMES = ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD")


@pytest.fixture
def log_in(monkeypatch: pytest.MonkeyPatch) -> Login:
    return Login(monkeypatch)


class Login:
    """Whose secrets the environment has."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.monkeypatch = monkeypatch
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR", "1")

    def __call__(self, url: str, user: tuple[str, str] | None = None, *, token: str | None = None) -> None:
        values = {"MLFLOW_TRACKING_URI": url, "MLFLOW_TRACKING_TOKEN": token}
        for name, value in {**values, **dict(zip(NAMES, user or (None, None), strict=True))}.items():
            self.monkeypatch.setenv(name, "")
            self.monkeypatch.delenv(name) if value is None else self.monkeypatch.setenv(name, value)


def refusal(home: Path, *, experiment: str = "quickstart") -> Problem:
    with pytest.raises(RecipeError) as raised:
        Tracker(home, experiment=experiment, run="a-run")
    (problem,) = raised.value.problems
    return problem


class Answers(http.server.BaseHTTPRequestHandler):
    """Says the server's code, as text and not as JSON: what stands in front of a managed MLflow."""

    def do_GET(self) -> None:
        self.send_response(self.server.code)  # type: ignore[attr-defined]
        self.end_headers()
        self.wfile.write(b"no")

    do_POST = do_GET  # noqa: N815

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


@pytest.fixture
def gate() -> Iterator[http.server.HTTPServer]:
    with http.server.HTTPServer(("127.0.0.1", 0), Answers) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def test_who_is_not_known_and_who_may_not_are_told_so(tmp_path: Path, gate: http.server.HTTPServer, log_in: Login):
    log_in(f"http://127.0.0.1:{gate.server_port}", USER)
    for code, what in ((401, "does not know this user"), (403, "does not let this user do that")):
        gate.code = code  # type: ignore[attr-defined]
        problem = refusal(tmp_path)
        assert what in problem.what and USER[1] not in str(problem)
    gate.code = 503  # type: ignore[attr-defined]
    assert refusal(tmp_path).what == "MLflow does not answer"


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server with users, on which somebody else made the experiment and a model with a version 1 of its own."""
    with auth_server(tmp_path_factory.mktemp("served")) as url, pytest.MonkeyPatch.context() as patch:
        Login(patch)(url, ADMIN)
        admin = MlflowClient(url)
        grant(url, "experiment", admin.create_experiment("quickstart"), "EDIT")
        admin.create_experiment("only-to-read")
        admin.create_registered_model("quickstart")
        grant(url, "registered_model", "quickstart", "EDIT")
        foreign = {"quench.version": "1", "quench.artifact": "9" * 64}
        admin.create_model_version("quickstart", "s3://elsewhere/model", tags=foreign)
        admin.set_registered_model_alias("quickstart", "champion", "1")
        yield url


@pytest.mark.slow
def test_who_may_not_write_is_refused_before_anything_is_spent(url: str, tmp_path: Path, log_in: Login):
    log_in(url)
    assert refusal(tmp_path).what == "MLflow does not know this user"
    log_in(url, (USER[0], "wrong"))
    assert refusal(tmp_path).what == "MLflow does not know this user"
    log_in(url, token="another-token-that-nobody-gave")
    assert refusal(tmp_path).what == "MLflow does not know this user"
    log_in(url, USER)
    assert refusal(tmp_path, experiment="only-to-read").what == "MLflow does not let this user do that"
    log_in(url, token=TOKEN)
    Tracker(tmp_path, experiment="quickstart", run="a-run").close()


@pytest.mark.slow
def test_a_server_with_users_has_the_run_once_and_no_secret_is_kept(url: str, tmp_path: Path, log_in: Login):
    run = write_run(tmp_path, status="completed")
    said: list[str] = []
    log_in(url.replace("//", f"//{USER[0]}:{USER[1]}@"))  # user and password in the address, as many services show it
    take_out_password()
    assert sync(tmp_path, said.append) == [run.name] and sync(tmp_path, said.append) == []
    mlflow = MlflowClient(url)
    experiment = mlflow.get_experiment_by_name("quickstart").experiment_id
    (parent,) = mlflow.search_runs([experiment], "tags.`quench.kind` = 'run'")
    (trained,) = mlflow.search_runs([experiment], "tags.`quench.key` = 'train/quickstart'")
    assert (trained.info.artifact_uri or "").startswith("mlflow-artifacts:")
    weights = mlflow.download_artifacts(trained.info.run_id, "train/adapter_model.safetensors")
    assert Path(weights).read_bytes() == ADAPTER
    assert {file.path for file in mlflow.list_artifacts(parent.info.run_id)} >= {"report.html", "steps.json"}

    # Written anew by somebody who may not delete: the first writing stays, and no search takes it for the run.
    mlflow.delete_tag(parent.info.run_id, "quench.whole")
    assert sync(tmp_path, said.append) == [run.name] and sync(tmp_path, said.append) == []
    (again,) = mlflow.search_runs([experiment], "tags.`quench.kind` = 'run'")
    assert again.info.run_id != parent.info.run_id and again.info.run_name == parent.info.run_name
    assert mlflow.get_run(parent.info.run_id).info.run_name == f"{parent.info.run_name} (replaced)"

    # The registry: the other one's version 1 is not taken for ours.
    line = promotion(tmp_path, run)
    (trouble,) = registry.sync(tmp_path, "quickstart", [line])
    assert trouble.startswith("alias champion was on version 1 of quickstart, which is none of this home's")
    champion = mlflow.get_model_version_by_alias("quickstart", "champion")
    assert (champion.version, champion.tags["quench.artifact"]) == ("2", line.digest)
    assert registry.sync(tmp_path, "quickstart", [line]) == []

    kept = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(kept) > 10 and not any(USER[1].encode() in path.read_bytes() for path in kept)
    assert USER[1] not in "\n".join([*said, trouble])


@pytest.mark.slow
def test_a_deleted_experiment_is_restored_by_who_may_and_else_the_command_is_said(
    url: str, tmp_path: Path, log_in: Login
):
    log_in(url, token=TOKEN)
    Tracker(tmp_path, experiment="own", run="a-run").close()
    mlflow = MlflowClient(url)
    own = mlflow.get_experiment_by_name("own").experiment_id
    mlflow.delete_experiment(own)
    tracker = Tracker(tmp_path, experiment="own", run="a-run")
    tracker.close()
    assert tracker.experiment == own
    assert tracker.notes == ["the MLflow experiment own was deleted: it is restored, with its runs"]

    log_in(url, ADMIN)
    experiment = MlflowClient(url).create_experiment("of-others")
    grant(url, "experiment", experiment, "EDIT")
    MlflowClient(url).delete_experiment(experiment)
    log_in(url, token=TOKEN)
    problem = refusal(tmp_path, experiment="of-others")
    assert "was deleted, and MLflow does not restore it for this user" in problem.what
    assert f"MLFLOW_TRACKING_URI={url} mlflow experiments restore --experiment-id {experiment}" in problem.next
    assert TOKEN not in str(problem)
