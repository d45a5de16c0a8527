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
from tests.mlflow_server import ADMIN, TOKEN, USER, auth_server

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


@pytest.mark.slow
def test_a_server_with_users_has_the_run_once_and_no_secret_is_kept(
    tmp_path: Path, log_in: Login, monkeypatch: pytest.MonkeyPatch
):
    home, served = tmp_path / "home", tmp_path / "served"
    served.mkdir()
    run = write_run(home, status="completed")
    said: list[str] = []
    with auth_server(served) as url:
        log_in(url)
        assert refusal(home).what == "MLflow does not know this user"
        log_in(url, (USER[0], "wrong"))
        assert refusal(home).what == "MLflow does not know this user"

        # Somebody else made the experiment and a model of the same name, with a version 1 of its own.
        log_in(url, ADMIN)
        admin = MlflowClient(url)
        experiment = admin.create_experiment("quickstart")
        admin.create_registered_model("quickstart")
        foreign = {"quench.version": "1", "quench.artifact": "9" * 64}
        admin.create_model_version("quickstart", "s3://elsewhere/model", tags=foreign)
        admin.set_registered_model_alias("quickstart", "champion", "1")

        # User and password in the address, as many services show it.
        log_in(url.replace("//", f"//{USER[0]}:{USER[1]}@"))
        take_out_password()
        assert sync(home, said.append) == [run.name] and sync(home, said.append) == []
        mlflow = MlflowClient(url)
        (parent,) = mlflow.search_runs([experiment], "tags.`quench.kind` = 'run'")
        (trained,) = mlflow.search_runs([experiment], "tags.`quench.key` = 'train/quickstart'")
        assert (trained.info.artifact_uri or "").startswith("mlflow-artifacts:")
        weights = mlflow.download_artifacts(trained.info.run_id, "train/adapter_model.safetensors")
        assert Path(weights).read_bytes() == ADAPTER
        assert {file.path for file in mlflow.list_artifacts(parent.info.run_id)} >= {"report.html", "steps.json"}

        # Written anew by somebody who may not delete: the first writing stays, and no search takes it for the run.
        mlflow.delete_tag(parent.info.run_id, "quench.whole")
        assert sync(home, said.append) == [run.name] and sync(home, said.append) == []
        (again,) = mlflow.search_runs([experiment], "tags.`quench.kind` = 'run'")
        assert again.info.run_id != parent.info.run_id and again.info.run_name == parent.info.run_name
        assert mlflow.get_run(parent.info.run_id).info.run_name == f"{parent.info.run_name} (replaced)"

        # The registry: the other one's version 1 is not taken for ours.
        line = promotion(home, run)
        (trouble,) = registry.sync(home, "quickstart", [line])
        assert trouble.startswith("alias champion was on version 1 of quickstart, which is none of this home's")
        champion = mlflow.get_model_version_by_alias("quickstart", "champion")
        assert (champion.version, champion.tags["quench.artifact"]) == ("2", line.digest)
        assert registry.sync(home, "quickstart", [line]) == []

        # A deleted experiment, and nobody who may restore it.
        log_in(url, ADMIN)
        admin.delete_experiment(experiment)
        log_in(url, token=TOKEN)
        problem = refusal(home)
        assert "was deleted, and MLflow does not restore it for this user" in problem.what
        assert f"MLFLOW_TRACKING_URI={url} mlflow experiments restore --experiment-id {experiment}" in problem.next
        log_in(url, ADMIN)
        admin.restore_experiment(experiment)
        log_in(url, token=TOKEN)
        assert sync(home, said.append) == []
        log_in(url, token="another-token-that-nobody-gave")
        assert refusal(home).what == "MLflow does not know this user"
        said += [str(problem), trouble]
    kept = [path for path in home.rglob("*") if path.is_file()]
    for secret in (USER[1], ADMIN[1], TOKEN):
        assert not any(secret.encode() in path.read_bytes() for path in kept)
        assert secret not in "\n".join(said)


@pytest.mark.slow
def test_who_may_only_read_is_refused_before_anything_is_spent(tmp_path: Path, log_in: Login):
    served = tmp_path / "served"
    served.mkdir()
    with auth_server(served, permission="READ") as url:
        log_in(url, USER)
        assert refusal(tmp_path).what == "MLflow does not let this user do that"


@pytest.mark.slow
def test_an_experiment_that_was_deleted_on_a_server_is_restored(tmp_path: Path, log_in: Login):
    home, served = tmp_path / "home", tmp_path / "served"
    served.mkdir()
    run = write_run(home)
    with auth_server(served, permission="MANAGE") as url:
        log_in(url, USER)
        said: list[str] = []
        assert sync(home, said.append) == [run.name]
        mlflow = MlflowClient(url)
        mlflow.delete_experiment(mlflow.get_experiment_by_name("quickstart").experiment_id)
        assert sync(home, said.append) == []
        assert "the MLflow experiment quickstart was deleted: it is restored, with its runs" in said
