"""A server of an engine: its words, its end, what is said when it does not start. The server here is Python's own."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import psutil
import pytest

from tasks.runtime.process.errors import StageError
from tasks.runtime.process.ports import free_port
from tasks.runtime.process.servers import EngineServer, engine_argv, engine_env, last_telling

COMMAND = ["vllm", "serve", "$PWD", "--served-model-name", "arm", "--lora-modules", "arm=$PWD/adapter"]
SERVER = """
import http.server, subprocess, sys
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)  # WORD"])  # as an engine starts its workers
class Healthy(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
http.server.HTTPServer(("127.0.0.1", PORT), Healthy).serve_forever()
"""
LOG = """(APIServer pid=1) WARNING 11-30 03:24:01 [system_utils.py:255] Cannot raise the limit: OSError: too many files
(Worker pid=3) ERROR 11-30 03:27:15 [multiproc_executor.py:1063]   File "cpu.py", line 3, in load
(Worker pid=3) ERROR 11-30 03:27:15 [multiproc_executor.py:1063]     assert loaded.shape[0] == self.size
(Worker pid=3) ERROR 11-30 03:27:15 [multiproc_executor.py:1063]            ^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^
(Worker pid=3) ERROR 11-30 03:27:15 [multiproc_executor.py:1063] AssertionError
(EngineCore pid=2)     raise e from None
(EngineCore pid=2) RuntimeError: Engine core initialization failed. See root cause above.
resource_tracker: There appear to be 1 leaked semaphore objects"""


def alive(word: str) -> list[int]:
    every = psutil.process_iter(["cmdline"])
    return [process.pid for process in every if word in " ".join(process.info["cmdline"] or [])]


def started(code: str, port: int) -> EngineServer:
    return EngineServer([sys.executable, "-c", code.replace("PORT", str(port))], port=port, on_line=lambda line: None)


def test_the_words_are_those_of_the_command_in_another_folder() -> None:
    fp8 = ["--kv-cache-dtype", "fp8"]
    argv = engine_argv(COMMAND, Path("/data/my model"), python=Path("/env/python"), port=8001, more=fp8)
    assert argv[0] == "/env/python" and argv[argv.index("--model") + 1] == "/data/my model"
    assert "arm=/data/my model/adapter" in argv and argv[-2:] == fp8
    assert argv[argv.index("--port") + 1] == "8001" and argv[argv.index("--host") + 1] == "127.0.0.1"
    assert "--enforce-eager" in argv
    assert "--enforce-eager" not in engine_argv(COMMAND, Path("/m"), python=Path("p"), port=1, device="cuda")
    with pytest.raises(ValueError, match="no command of vLLM"):
        engine_argv(["sglang", "serve"], Path("/m"), python=Path("p"), port=1)


def test_the_engine_does_not_see_our_code_and_keeps_what_people_set() -> None:
    env = engine_env({"PYTHONPATH": "/ours", "OMP_NUM_THREADS": "1", "VLLM_CPU_KVCACHE_SPACE": "9", "PATH": "/bin"})
    assert "PYTHONPATH" not in env and "OMP_NUM_THREADS" not in env
    assert (env["VLLM_CPU_KVCACHE_SPACE"], env["HF_HUB_OFFLINE"], env["PATH"]) == ("9", "1", "/bin")


def test_it_is_waited_for_and_its_workers_end_with_it() -> None:
    word, port = f"worker-{os.getpid()}-{time.monotonic_ns()}", free_port()
    with started(SERVER.replace("WORD", word), port) as server:
        assert 0 < server.wait_until_healthy(60) < 60
        assert server.ended is None and alive(word)
    assert server.ended is not None and not alive(word)
    server.end()  # twice is no harm


def test_one_that_ends_at_its_start_says_why() -> None:
    code = "raise ValueError('weights of another shape')"
    with started(code, free_port()) as server, pytest.raises(StageError) as refused:
        server.wait_until_healthy(60)
    problem = refused.value.problem
    assert problem.what == "the engine ended while it started"
    assert problem.why == "exit code 1; its last lines: ValueError: weights of another shape"


def test_one_that_never_answers_is_given_up() -> None:
    word, port = f"worker-{os.getpid()}-{time.monotonic_ns()}", free_port()
    with started(f"import time; time.sleep(600)  # {word}", port) as server, pytest.raises(StageError) as refused:
        server.wait_until_healthy(1)
    assert "did not answer within 1 s" in refused.value.problem.what and not alive(word)


def test_the_cause_is_told_and_not_that_something_failed() -> None:
    assert last_telling(LOG.splitlines()) == ["assert loaded.shape[0] == self.size: AssertionError"]
    assert last_telling(LOG.splitlines()[5:7]) == [
        "RuntimeError: Engine core initialization failed. See root cause above."
    ]
    assert last_telling(["one", "two", "two"]) == ["one", "two"]
