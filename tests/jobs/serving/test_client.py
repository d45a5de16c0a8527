"""The client of an engine's server: which answers have an end, and how long each may be."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from tasks.jobs.measuring.decoding import Decoded
from tasks.jobs.measuring.teacher_forcing import TokenRow
from tasks.jobs.serving import onnx_genai
from tasks.jobs.serving.client import Client
from tasks.runtime.process.errors import StageError

END, WORD = 2, 9


class Engine(BaseHTTPRequestHandler):
    """Answers a prompt with as many words as its first token says, and the end; a prompt that begins with 0 loops.

    Attributes:
        says_end: The token that ended an answer is among its tokens; engines may leave it out.
        asked: `max_tokens` and number of prompts of each request.
    """

    says_end = True
    asked: list[tuple[int, int]]

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        limit = body["max_tokens"]
        self.asked.append((limit, len(body["prompt"])))
        text = json.dumps({"choices": [self._choice(*one, limit) for one in enumerate(body["prompt"])]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def _choice(self, index: int, prompt: list[int], limit: int) -> dict[str, Any]:
        words = prompt[0] or 10**6
        if words >= limit:
            return {"index": index, "token_ids": [WORD] * limit, "finish_reason": "length"}
        ids = [WORD] * words + [END] * self.says_end
        return {"index": index, "token_ids": ids, "finish_reason": "stop"}

    def log_message(self, format: str, *args: Any) -> None: ...


@pytest.fixture(params=[True, False])
def engine(request: pytest.FixtureRequest) -> Iterator[tuple[Client, list[tuple[int, int]]]]:
    """A client, and what its server was asked."""
    handler = type("Handler", (Engine,), {"says_end": request.param, "asked": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield Client(f"http://127.0.0.1:{server.server_port}", "x", trouble=_trouble), handler.asked
    server.shutdown()
    thread.join()
    server.server_close()


def _trouble(what: str, why: str) -> StageError:
    return StageError.of(what=what, where="here", why=why, next="look")


def row(name: str, words: int, prompt: int) -> TokenRow:
    """A row whose prompt has so many tokens, and whose answer will have so many words."""
    ids = [words, *[5] * (prompt - 1)]
    return TokenRow(row=name, group=name, split="test", ids=ids, counted=[False] * prompt, prompt_ids=ids, answer="a")


def answers(client: Client, rows: list[TokenRow], *, context: int) -> dict[str, Decoded]:
    batches: list[int] = []
    found = client.answers(rows, [END], max_tokens=6, context=context, on_batch=lambda: batches.append(1))
    decoded = {one.row: answer for one, answer in found}
    assert sum(batches) == 1  # of progress: a batch, however many requests it takes
    return decoded


def test_an_answer_at_the_limit_has_no_end(engine: tuple[Client, list[tuple[int, int]]]) -> None:
    client, asked = engine
    rows = [row("short", 2, 4), row("just", 5, 4), row("over", 6, 4), row("loops", 0, 4)]
    decoded = answers(client, rows, context=100)
    assert {name: (len(one.tokens), one.ended) for name, one in decoded.items()} == {
        **{"short": (2, True), "just": (5, True)},
        **{"over": (6, False), "loops": (6, False)},
    }
    assert asked == [(6, 4)]


def test_a_long_prompt_cuts_off_no_answer_but_its_own(engine: tuple[Client, list[tuple[int, int]]]) -> None:
    client, asked = engine
    decoded = answers(client, [row("long", 4, 17), row("beside", 4, 4), row("full", 0, 14)], context=20)
    assert decoded["beside"] == ([WORD] * 4, True)
    assert decoded["long"] == ([WORD] * 3, False)  # no room behind its prompt
    assert decoded["full"] == ([WORD] * 6, False)
    assert sorted(asked) == [(3, 1), (6, 2)]


def test_our_server_of_onnx_says_why_an_answer_stopped() -> None:
    for tokens, reason in (([9, 9, 2], "stop"), ([9, 9, 9], "length"), ([9, 9], "stop")):
        asked = onnx_genai.Asked([1], 3, frozenset({2}), False, False)
        for token in (*tokens, None):
            asked.out.put(token)
        assert onnx_genai.choice(0, asked) == {"index": 0, "token_ids": tokens, "finish_reason": reason}
