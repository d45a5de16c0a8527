"""What an engine answers is judged as the arm's own answers are: the same ends, the same scores."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from transformers import GenerationConfig

from tasks.jobs import evaluate, serve
from tasks.jobs.loading.load import load_bf16
from tasks.jobs.measuring.decoding import greedy_answers
from tasks.jobs.measuring.teacher_forcing import TokenRow, read_rows
from tasks.jobs.serving.client import Client
from tasks.runtime.process.errors import StageError
from tests.jobs.build import make_job
from tests.jobs.test_evaluate import PARAMS, held_out, lines, reference_size, train_to_answer, world

__all__ = ["world"]  # a fixture


class Engine(BaseHTTPRequestHandler):
    """A model behind as much of vLLM's API as the client asks for; every token of a prompt costs one nat."""

    model: Any

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        choices = self._losses(body) if "prompt_logprobs" in body else self._answers(body)
        text = json.dumps({"choices": choices}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def _losses(self, body: dict[str, Any]) -> list[dict[str, Any]]:
        nats = [[None, *({str(token): {"logprob": -1.0}} for token in ids[1:])] for ids in body["prompt"]]
        return [{"index": index, "prompt_logprobs": one} for index, one in enumerate(nats)]

    def _answers(self, body: dict[str, Any]) -> list[dict[str, Any]]:
        ends, limit = body["stop_token_ids"], body["max_tokens"]
        config = GenerationConfig(max_new_tokens=limit, do_sample=False, eos_token_id=ends, pad_token_id=ends[0])
        rows = [
            TokenRow(row="", group="", split="", ids=ids, counted=[], prompt_ids=ids, answer="")
            for ids in body["prompt"]
        ]
        return [
            {
                "index": index,
                "token_ids": [*one.tokens, *ends[:1]] if one.ended else one.tokens,
                "finish_reason": "stop" if one.ended else "length",
            }
            for index, one in enumerate(greedy_answers(self.model, rows, config))
        ]

    def log_message(self, format: str, *args: Any) -> None: ...


@pytest.fixture(scope="module")
def trained(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_to_answer(world / "base", tmp_path_factory.mktemp("served") / "model", held_out(world))


@pytest.fixture(scope="module")
def client(trained: Path) -> Iterator[Client]:
    handler = type("Handler", (Engine,), {"model": load_bf16(trained, device="cpu")})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield Client(f"http://127.0.0.1:{server.server_port}", "x", trouble=_trouble)
    server.shutdown()
    thread.join()
    server.server_close()


def _trouble(what: str, why: str) -> StageError:
    return StageError.of(what=what, where="here", why=why, next="look")


def test_task_and_served_task_agree_row_by_row(world: Path, trained: Path, client: Client, tmp_path: Path) -> None:
    """With a limit that the longest answers do not keep."""
    limit = sorted({reference_size(row) for row in held_out(world)})[-2]
    params = PARAMS | {"max_new_tokens": limit}
    inputs = {"model": trained, "dataset": world / "dataset"}
    evaluate.run(make_job("evaluate", tmp_path / "scores", params=params, **inputs))
    job = make_job("serve", tmp_path / "out", params=params, scores=tmp_path / "scores", **inputs)
    rows = read_rows(world / "dataset", "test")
    scores, answers = serve._asked(job, client, rows, context=500)
    own = lines(tmp_path / "scores")
    for metric in ("task", "truncated"):
        theirs = {line["row"]: line["sum"] for line in scores if line["metric"] == f"served_{metric}"}
        ours = {line["row"]: line["sum"] for line in own if line["metric"] == metric and line["split"] == "test"}
        assert theirs == ours and 0 < sum(ours.values()) < len(ours), metric
    ends = {line["row"]: line["ending"] for line in pq.read_table(tmp_path / "scores" / "answers.parquet").to_pylist()}
    assert all(line["equal"] and line["ending"] == ends[line["row"]] for line in answers)
    assert len(answers) == len(rows)
