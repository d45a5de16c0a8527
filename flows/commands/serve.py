"""`quench serve`: an engine's server on an arm's files, in the foreground.

vLLM starts by the command of serve.json, with the recipe's `serve:`. An engine's log goes to a file; the terminal gets
the URL once a request was answered. Ctrl-C and SIGTERM end the engine, and a SIGKILL does through the kernel
(tasks/runtime/process/child.py).
"""

from __future__ import annotations

import argparse
import errno
import json
import os
import shlex
import shutil
import signal
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from flows.commands.servable import ENVIRONMENTS, NAMES, Machine, missing
from flows.commands.serve_target import HELLO, Target, find_target
from flows.commands.terminal import DONE, FAILED, Output, refusal, say
from recipes.problem import Problem, RecipeError
from tasks.runtime.process.environments import interpreter
from tasks.runtime.process.errors import StageError
from tasks.runtime.process.launch import child_env
from tasks.runtime.process.ports import free_port
from tasks.runtime.process.servers import EngineServer, engine_argv, last_telling
from tasks.runtime.store.local import find_home

START_LIMIT_S = 3600.0  # large weights on a network disk; who does not want to wait has Ctrl-C
REQUEST_LIMIT_S = 600.0  # the first request may compile kernels
TELL_EVERY_S = 15.0
POLL_S = 0.5
SHOWN_CHARS = 160
LOOPBACK = ("127.0.0.1", "localhost")
KEY = "VLLM_API_KEY"  # vLLM asks every request for it where it is set
KEPT = ("VLLM_",)  # the engine's own settings, secret or not
ANSWER_TOKENS = 128  # of the example


def command(args: argparse.Namespace) -> Output:
    """Serve until Ctrl-C; exit code 0 after that, 1 where the engine did not start, or ended by itself.

    Raises:
        RecipeError: No such arm, it cannot be served here, no engine, a taken port: all that is wrong.
    """
    signal.signal(signal.SIGINT, signal.getsignal(signal.SIGTERM))  # a shell's background job starts with it ignored
    home = find_home()
    machine = Machine.here(args.engine)
    target = _checked(args, home, machine)
    log = home / "serve" / f"{target.name}-{args.port}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    address = Address(args.host, args.port)
    try:
        _serve(target, machine, address, log=log, as_json=args.json)
    except StageError as error:
        problem = replace(error.problem, where=str(log), next=_next(error.problem, target))
        if not args.json:
            say(f"error: {problem}")
        return Output(json=refusal([problem], log=str(log)), text="", code=FAILED)
    except KeyboardInterrupt:
        say("stopped")
    return Output(json=None, text="", code=DONE)


class Address(NamedTuple):
    """Where the server listens."""

    host: str
    port: int

    @property
    def url(self) -> str:
        """For requests from this machine."""
        return f"http://{'127.0.0.1' if self.host == '0.0.0.0' else self.host}:{self.port}"


def _checked(args: argparse.Namespace, home: Path, machine: Machine) -> Target:
    """What is to be served, after all that can be known before the engine starts."""
    problems = [problem for problem in (missing(machine.engine), _taken(args)) if problem]
    target = None
    try:
        target = find_target(args.words, home, machine, length=args.max_model_len)
    except RecipeError as error:
        problems = [*error.problems, *problems]
    if problems or target is None:
        raise RecipeError(problems)
    return target


def _taken(args: argparse.Namespace) -> Problem | None:
    """Why nothing can listen at the port; None where it is free."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((args.host, args.port))
        except OSError as error:
            trouble = error
        else:
            return None
    engine = "" if args.engine == "vllm" else f" --engine {args.engine}"
    again = f"quench serve {shlex.join(args.words)}{engine}"
    if trouble.errno != errno.EADDRINUSE:
        return Problem(
            what=f"Nothing can listen at {args.host}, port {args.port}.",
            where="--host, --port",
            why=f"{trouble.strerror}.",
            next=f"{again} --port {free_port()}",
        )
    return Problem(
        what=f"Port {args.port} of {args.host} is taken.",
        where="--port",
        why="Another program listens there.",
        next=f"{again} --port {free_port()}",
    )


def _serve(target: Target, machine: Machine, address: Address, *, log: Path, as_json: bool) -> None:
    """Start, ask once, say where, and wait.

    Raises:
        StageError: The engine did not start, does not answer, or ended by itself.
        KeyboardInterrupt: It was told to end.
    """
    argv = _argv(target, machine, address, links=log.parent / "links" / str(address.port))
    for remark in _remarks(target, machine, address, log):
        say(remark)
    with log.open("w", encoding="utf-8") as file:
        file.write(f"{shlex.join(argv)}\n")
        lines = _Log(file)
        with EngineServer(argv, env=child_env(keep=KEPT), on_line=lines.line, **address._asdict()) as server:
            try:
                seconds = server.wait_until_healthy(START_LIMIT_S)
                lines.starting = False
                request = _answered(server, target, machine, address)
                line = curl(f"{address.url}{_path(target)}", request, with_key=_has_key(machine))
                _ready(target, address, line, seconds=seconds, log=log, as_json=as_json)
                while server.ended is None:
                    time.sleep(POLL_S)
                raise server.trouble("the engine ended", f"exit code {server.ended}")
            finally:
                for number in (signal.SIGINT, signal.SIGTERM):
                    signal.signal(number, signal.SIG_IGN)  # it is ending already


def _argv(target: Target, machine: Machine, address: Address, *, links: Path) -> list[str]:
    """The words that start the engine.

    transformers serve takes the path for the model's name, so it starts in a folder where the name is a link.
    """
    python = interpreter(ENVIRONMENTS[machine.engine])
    if machine.engine == "vllm":
        words, folder = target.command, target.folder
        return engine_argv(
            words, folder, python=python, device=machine.device, more=target.options, **address._asdict()
        )
    link = links / target.name
    shutil.rmtree(links, ignore_errors=True)
    links.mkdir(parents=True)
    link.symlink_to(target.folder.resolve())
    words = ["env", "-C", str(links), str(python), "-P", "-m", "transformers.cli.transformers", "serve", target.name]
    words += ["--dtype", target.record["dtype"], "--device", "cpu" if machine.device == "cpu" else "auto"]
    if args := target.record["template_args"]:
        words += ["--chat-template-kwargs", json.dumps(args, ensure_ascii=False)]
    return [*words, "--host", address.host, "--port", str(address.port)]


class _Log:
    """The engine's log: all of it in a file, and while it starts its latest line now and then in the terminal."""

    def __init__(self, file: TextIO) -> None:
        self.starting = True
        self._file, self._started, self._told = file, time.monotonic(), time.monotonic()

    def line(self, text: str) -> None:
        """One line of the engine; called from another thread."""
        self._file.write(f"{text}\n")
        self._file.flush()
        now = time.monotonic()
        if self.starting and text.strip() and now - self._told >= TELL_EVERY_S:
            self._told = now
            say(f"{now - self._started:4.0f} s  {last_telling([text])[0][:SHOWN_CHARS]}")


def _remarks(target: Target, machine: Machine, address: Address, log: Path) -> Iterator[str]:
    device = "GPU" if machine.device == "cuda" else "CPU"
    yield f"starting {NAMES[machine.engine]} on the {device} with {target.shown}; its log: {log}"
    yield from target.remarks
    if machine.engine == "vllm" and machine.device == "cpu" and not machine.avx512:
        yield "this CPU has no AVX-512: vLLM serves models in bf16 here, and no 4-bit weights"
    if machine.engine == "transformers":
        yield "no serving kernel: for trying an arm, not for its speed"
    if address.host not in LOOPBACK:
        closed = f"with the key that {KEY} holds" if _has_key(machine) else f"without a key{_how_to_close(machine)}"
        yield f"--host {address.host}: whoever reaches this machine at port {address.port} can ask it, {closed}"


def _has_key(machine: Machine) -> bool:
    return machine.engine == "vllm" and KEY in os.environ


def _how_to_close(machine: Machine) -> str:
    return f"; set {KEY} to ask for one" if machine.engine == "vllm" else ""


def _answered(server: EngineServer, target: Target, machine: Machine, address: Address) -> dict[str, Any]:
    """Ask for one token, and return the request of the example: an engine that is healthy may still answer nothing.

    Raises:
        StageError: It answers with an error.
    """
    request = _request(target)
    body = json.dumps({**request, "max_tokens": 1}).encode()
    headers = {"Content-Type": "application/json"}
    headers |= {"Authorization": f"Bearer {os.environ[KEY]}"} if _has_key(machine) else {}
    asked = urllib.request.Request(f"{address.url}{_path(target)}", data=body, headers=headers)
    try:
        with urllib.request.urlopen(asked, timeout=REQUEST_LIMIT_S):
            return request
    except urllib.error.HTTPError as error:
        text = error.read().decode(errors="replace")[:SHOWN_CHARS]
        raise server.trouble("the engine does not answer", f"status {error.code}: {text}") from None
    except OSError as error:
        raise server.trouble("the engine does not answer", str(error)) from None


def _path(target: Target) -> str:
    return "/v1/chat/completions" if target.record["chat_template"] else "/v1/completions"


def _request(target: Target) -> dict[str, Any]:
    """A greedy request, as answers are evaluated."""
    turns = target.example or HELLO
    asked = {"messages": list(turns)} if target.record["chat_template"] else {"prompt": turns[-1]["content"]}
    return {"model": target.name, **asked, "max_tokens": ANSWER_TOKENS, "temperature": 0}


def curl(url: str, request: Mapping[str, Any], *, with_key: bool) -> str:
    """The request as a line for a terminal; the key stays in its variable."""
    body = shlex.quote(json.dumps(request, ensure_ascii=False))
    key = f' -H "Authorization: Bearer ${KEY}"' if with_key else ""
    return f"curl -s {url} -H 'Content-Type: application/json'{key} -d {body}"


def _ready(target: Target, address: Address, line: str, *, seconds: float, log: Path, as_json: bool) -> None:
    """Say where it answers; as JSON on one line, since more may follow."""
    if as_json:
        said = {"ok": True, "url": address.url, "model": target.name, "pid": os.getpid(), "log": str(log), "curl": line}
        print(json.dumps(said), flush=True)
        return
    print(
        f"{target.name} answers at {address.url}/v1 after {seconds:.0f} s; Ctrl-C ends it. Try:\n\n{line}\n", flush=True
    )


def _next(problem: Problem, target: Target) -> str:
    """What a person at a terminal can do."""
    if "max_model_len" in problem.why or "max_num_batched_tokens" in problem.why or "KV cache" in problem.why:
        return f"Name a shorter context than {target.record['max_model_len']}: --max-model-len N"
    return "Read its log. Where memory is the reason: --max-model-len N with less than the model's context."
