"""A server of ONNX Runtime GenAI: converts a model folder by the builder's own command, then answers requests.

The library has no server. This program is one, for the step `serve`: it runs by its path in the environment
`onnxruntime-genai` and imports nothing of ours, listens on loopback, and speaks as much of OpenAI's completions API as
tasks/jobs/serving/client.py asks for: token ids in and out, greedy, log-probabilities of a prompt, streams.

Answers come from the library's Engine, which batches requests as it likes. Log-probabilities come from its Generator:
of the tokens that it is given at once, `get_output("logits")` has all places.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np

BUILDER = "onnxruntime_genai.models.builder"
PLACES = 64  # logits of so many tokens are in fp64 at once
EVENTS = 64  # of one turn of the engine
ITSELF = "_Q4"  # the builder's name for weights that it quantized, as against those of the file (`.qweight`)
KERNEL = "MatMulNBits"
GREEDY = {"temperature": 0, "top_p": 1, "top_k": -1, "min_p": 0, "repetition_penalty": 1}  # nothing else is answered


def convert(command: Sequence[str], model: Path, out: Path, *, cache: Path) -> None:
    """Run the command of serve.json, and look at what it made.

    Args:
        command: `onnxruntime-genai.convert` of serve.json, with $PWD and $OUT.
        model: Stands for $PWD. Nothing is written there.
        out: Stands for $OUT.
        cache: A folder for the builder.

    Raises:
        SystemExit: The builder failed; it quantized weights that the file holds as they are.
    """
    words = [word.replace("$PWD", str(model)).replace("$OUT", str(out)) for word in command[1:]]
    ended = subprocess.run([sys.executable, "-P", *words, "-c", str(cache)], check=False)
    if ended.returncode:
        sys.exit(f"error: the builder of ONNX Runtime GenAI ended with {ended.returncode}")
    look_at(out)


def look_at(out: Path) -> None:
    """Say how many layers are multiplied in their codes, and that no other weight was rounded.

    Raises:
        SystemExit: The builder quantized weights by itself: they are other weights than were measured.
    """
    import onnx  # pyright: ignore[reportMissingImports]

    graph = onnx.load(str(out / "model.onnx"), load_external_data=False).graph
    if names := sorted(weight.name for weight in graph.initializer if weight.name.endswith(ITSELF)):
        sys.exit(f"error: the builder quantized {len(names)} weights that the file holds in bf16: {', '.join(names)}")
    if packed := sum(node.op_type == KERNEL for node in graph.node):
        print(f"Using {KERNEL} for {packed} products", flush=True)


@dataclass
class Asked:
    """One prompt.

    Attributes:
        ids: Its tokens.
        new_tokens: Longest answer.
        ends: Tokens that end it.
        exactly: It goes on past the model's own end tokens.
        scored: Log-probabilities of the prompt are wanted; then the answer has one token.
        out: Gets every token, then None, or an Exception.
        logprobs: Of ids[1:], where they are wanted.
    """

    ids: list[int]
    new_tokens: int
    ends: frozenset[int]
    exactly: bool
    scored: bool
    out: queue.SimpleQueue[Any] = field(default_factory=queue.SimpleQueue)
    logprobs: list[float] = field(default_factory=list)
    request: Any = None
    turn: int = 0
    is_over: bool = False

    def tokens(self) -> Iterator[int]:
        """As they come.

        Raises:
            RuntimeError: The engine failed.
        """
        while (token := self.out.get()) is not None:
            if isinstance(token, Exception):
                raise token
            yield token


class Worker(threading.Thread):
    """The one thread that calls the library: its Engine answers the thread alone that made it.

    Args:
        folder: What the builder made.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(name="engine", daemon=True)
        self._folder = folder
        self._loaded: queue.SimpleQueue[Exception | None] = queue.SimpleQueue()
        self._came: queue.SimpleQueue[Asked] = queue.SimpleQueue()
        self._running: list[Asked] = []

    def start_loaded(self) -> None:
        """Start, and return when the model is loaded.

        Raises:
            SystemExit: It cannot be loaded.
        """
        self.start()
        if error := self._loaded.get():
            sys.exit(f"error: ONNX Runtime GenAI does not load the model: {error}")

    def _load(self) -> None:
        import onnxruntime_genai as og  # pyright: ignore[reportMissingImports]

        og.disable_telemetry_events()
        self._og: Any = og
        self._model: Any = og.Model(str(self._folder))
        self._engine: Any = og.Engine(self._model)
        self._events: Any = self._engine.create_event_buffer(EVENTS)

    def ask(self, asked: Asked) -> Asked:
        """Hand a prompt over."""
        self._came.put(asked)
        return asked

    def run(self) -> None:
        """Load, then take what came and let the engine make a step, for ever."""
        try:
            self._load()
        except (RuntimeError, ImportError) as error:
            self._loaded.put(error)
            return
        self._loaded.put(None)
        while True:
            for asked in self._new():
                try:
                    self._begin(asked)
                except (RuntimeError, ValueError, TypeError) as error:  # what pybind11 makes of the library's errors
                    asked.out.put(error)
            if self._running:
                try:
                    self._step()
                except RuntimeError as error:
                    for asked in self._running:
                        asked.out.put(error)
                    self._running = []

    def _new(self) -> Iterator[Asked]:
        """Waits only where nothing runs."""
        if not self._running:
            yield self._came.get()
        with contextlib.suppress(queue.Empty):
            while True:
                yield self._came.get_nowait()

    def _begin(self, asked: Asked) -> None:
        og = self._og
        ids = np.array(asked.ids, dtype=np.int32)
        if asked.scored:
            asked.logprobs, best = self._scored(ids)
            for last in (best, None):
                asked.out.put(last)
            return
        options = og.RequestOptions()
        options.set_max_session_tokens(len(ids) + asked.new_tokens)
        asked.request = self._engine.create_request(options=options)
        turn = og.TurnOptions(asked.request)
        turn.set_do_sample(False)
        turn.set_max_generated_tokens(asked.new_tokens)
        if asked.exactly:
            turn.set_min_generated_tokens(asked.new_tokens)
        asked.turn = asked.request.begin_turn(ids, turn)
        self._running.append(asked)

    def _scored(self, ids: np.ndarray) -> tuple[list[float], int]:
        """Log-probability of every token but the first, in nats, and the token that would come next."""
        params = self._og.GeneratorParams(self._model)
        params.set_search_options(max_length=len(ids) + 1, do_sample=False)
        generator = self._og.Generator(self._model, params)
        generator.append_tokens(ids)
        logits = generator.get_output("logits")[0]
        if len(logits) != len(ids):
            raise RuntimeError(f"the engine gives logits of {len(logits)} places for {len(ids)} tokens")
        logprobs: list[float] = []
        for start in range(0, len(ids) - 1, PLACES):
            part = logits[start : min(start + PLACES, len(ids) - 1)].astype(np.float64)
            top = part.max(-1, keepdims=True)
            whole = top[:, 0] + np.log(np.exp(part - top).sum(-1))
            chosen = part[np.arange(len(part)), ids[start + 1 : start + 1 + len(part)]]
            logprobs += (chosen - whole).tolist()
        return logprobs, int(logits[-1].argmax())

    def _step(self) -> None:
        flags = self._og.EngineEventFlags
        for event in self._engine.run(self._events):
            asked = next((one for one in self._running if one.request == event.request), None)
            if asked is None:
                continue
            has = int(event.flags)
            if has & int(flags.FAILED.value):
                asked.out.put(RuntimeError(f"the engine failed: {event.error_code}"))
                asked.is_over = True
                continue
            if has & int(flags.TOKEN.value) and not asked.is_over:
                asked.out.put(int(event.token))
                if int(event.token) in asked.ends and not has & int(flags.TURN_FINISHED.value):
                    asked.request.cancel_turn(asked.turn)
                    asked.is_over = True
            if has & int(flags.TURN_FINISHED.value):
                asked.is_over = True
        for asked in [one for one in self._running if one.is_over]:
            asked.out.put(None)
            asked.request.close()
            self._running.remove(asked)


class Refused(ValueError):
    """A request that this server does not answer."""


class Server(ThreadingHTTPServer):
    """The API on a port."""

    daemon_threads = True
    request_queue_size = 128  # clients that connect at once

    def __init__(self, address: tuple[str, int], worker: Worker, *, name: str, context: int) -> None:
        """`name` is what the model is called, `context` the tokens of prompt and answer."""
        self.worker, self.name, self.context = worker, name, context
        super().__init__(address, Handler)

    def prompts(self, body: dict[str, Any]) -> list[Asked]:
        """The prompts of a request.

        Raises:
            Refused: No token ids, too long, or another decoding than greedy.
        """
        given: Any = body.get("prompt") or [[]]
        prompts: list[Any] = given if isinstance(given[0], list) else [given]
        if any(not prompt or not all(isinstance(token, int) for token in prompt) for prompt in prompts):
            raise Refused("this server reads token ids alone")
        other = sorted(name for name, value in GREEDY.items() if body.get(name, value) != value)
        if other:
            raise Refused(f"this server decodes greedily; the request has {', '.join(other)}")
        new, scored = int(body.get("max_tokens", 16)), body.get("prompt_logprobs") is not None
        if (longest := max(map(len, prompts)) + (1 if scored else new)) > self.context:
            raise Refused(f"prompt and answer take {longest} tokens, and the context has {self.context}")
        ends = frozenset(body.get("stop_token_ids") or ())
        exactly = bool(body.get("ignore_eos"))
        return [Asked(prompt, new, frozenset() if exactly else ends, exactly, scored) for prompt in prompts]


class Handler(BaseHTTPRequestHandler):
    """One request."""

    server: Server  # pyright: ignore[reportIncompatibleVariableOverride]

    def log_message(self, format: str, *args: Any) -> None:
        """Thousands of lines that say 200 hide the one that says why."""

    def do_GET(self) -> None:
        """/health and /v1/models."""
        if self.path == "/health":
            self._send(200, {})
        elif self.path == "/v1/models":
            self._send(200, {"object": "list", "data": [{"id": self.server.name, "object": "model"}]})
        else:
            self._send(404, {"error": {"message": f"no {self.path} here"}})

    def do_POST(self) -> None:
        """/v1/completions."""
        if self.path != "/v1/completions":
            self._send(404, {"error": {"message": f"no {self.path} here"}})
            return
        try:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            every = [self.server.worker.ask(asked) for asked in self.server.prompts(body)]
        except ValueError as error:
            self._send(400, {"error": {"message": str(error)}})
            return
        try:
            if body.get("stream"):
                self._stream(every[0])
            else:
                self._send(200, {"choices": [choice(index, asked) for index, asked in enumerate(every)]})
        except (RuntimeError, TypeError) as error:
            print(f"error: {error}", flush=True)
            self._send(500, {"error": {"message": str(error)}})

    def _stream(self, asked: Asked) -> None:
        tokens = asked.tokens()
        first = next(tokens)  # where the engine fails, before a 200 is sent
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        for token in itertools.chain([first], tokens):
            self._event(token)
        self.wfile.write(b"data: [DONE]\n\n")

    def _event(self, token: int) -> None:
        line = json.dumps({"choices": [{"index": 0, "token_ids": [token]}]})
        self.wfile.write(f"data: {line}\n\n".encode())
        self.wfile.flush()

    def _send(self, status: int, body: dict[str, Any]) -> None:
        text = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)


def choice(index: int, asked: Asked) -> dict[str, Any]:
    """A whole answer, in the words of vLLM's API."""
    tokens = list(asked.tokens())
    ended = (bool(tokens) and tokens[-1] in asked.ends) or len(tokens) < asked.new_tokens
    answer: dict[str, Any] = {"index": index, "token_ids": tokens, "finish_reason": "stop" if ended else "length"}
    if asked.scored:
        pairs = zip(asked.ids[1:], asked.logprobs, strict=True)
        answer["prompt_logprobs"] = [None, *({str(token): {"logprob": value}} for token, value in pairs)]
    return answer


def context_of(converted: Path, wanted: int | None) -> int:
    """Tokens of prompt and answer: what is wanted, or what the model has."""
    config = json.loads((converted / "genai_config.json").read_text(encoding="utf-8"))
    return wanted or int(config["model"]["context_length"])


def main() -> None:
    """Convert, load, and answer until SIGTERM."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path, required=True, help="folder of the artifact")
    parser.add_argument("--convert", type=json.loads, required=True, help="the builder's command, a JSON list")
    parser.add_argument("--scratch", type=Path, help="where the converted model lies while this runs")
    parser.add_argument("--served-model-name", required=True)
    parser.add_argument("--max-model-len", type=int)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, required=True)
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, _end)
    with tempfile.TemporaryDirectory(dir=args.scratch, prefix="onnx-") as folder:
        converted = Path(folder) / "model"
        convert(args.convert, args.model, converted, cache=Path(folder) / "cache")
        worker = Worker(converted)
        worker.start_loaded()
        context = context_of(converted, args.max_model_len)
        with Server((args.host, args.port), worker, name=args.served_model_name, context=context) as server:
            server.serve_forever()


def _end(_number: int, _frame: FrameType | None) -> None:
    raise SystemExit(0)


if __name__ == "__main__":
    main()
