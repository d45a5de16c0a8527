"""What a test starts in an engine's place: the server's words as vLLM has them, and a child, as vLLM has workers.

    stand_in_engine.py BEHAVIOUR [WORDS OF vLLM]

BEHAVIOUR: `serves`; `dies` at the start; `breaks` at the first request; `ends` after it.
"""

import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Handler(BaseHTTPRequestHandler):
    behaviour = ""

    def do_GET(self) -> None:
        self._answer(200 if self.path == "/health" else 404, {})

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
        print("asked", json.dumps(asked), self.headers["authorization"], flush=True)
        if self.behaviour == "breaks":
            self._answer(500, {"error": "'_C' object has no attribute 'cpu_gemm_wna16'"})
            return
        self._answer(200, {"model": asked["model"], "choices": [{"message": {"content": "SELECT 1"}}]})
        if self.behaviour == "ends":
            print("RuntimeError: the worker is gone", flush=True)
            threading.Timer(0.2, os._exit, [7]).start()

    def _answer(self, status: int, body: object) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None: ...


def main(behaviour: str, words: list[str]) -> None:
    """Behave like that at the port that the words name."""
    print("words", json.dumps(words), flush=True)
    if behaviour == "dies":
        raise ValueError("To serve at least one request with max_model_len 4096, a larger KV cache is needed")
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    print("child", child.pid, flush=True)
    Handler.behaviour = behaviour
    port = int(words[words.index("--port") + 1])
    ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
