"""A tiny OpenAI-compatible server for tests: scripted faults, answers that depend on the request."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Server:
    """Answers chat completions with `faults` (HTTP status codes) first, then with `reply(payload)`.

    A reply is the text of an answer, JSON, or a status with headers and JSON or bytes.
    """

    def __init__(self, reply: Callable[[dict[str, Any]], Any], faults: list[int]) -> None:
        self.reply, self.faults = reply, faults
        self.payloads: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.lock = threading.Lock()
        self.url = ""


@contextmanager
def serve(reply: Callable[[dict[str, Any]], Any], *, faults: list[int] | None = None) -> Iterator[Server]:
    server = Server(reply, list(faults or []))

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            payload = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with server.lock:
                server.payloads.append(payload)
                server.headers.append({"path": self.path} | {k.lower(): v for k, v in self.headers.items()})
                fault = server.faults.pop(0) if server.faults else 0
            said = {"error": {"message": "scripted fault"}} if fault else server.reply(payload)
            if isinstance(said, str):
                message = {"role": "assistant", "content": said}
                said = {
                    "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
                    "usage": {"prompt_tokens": 10, "completion_tokens": len(said.split())},
                }
            status, headers, said = said if isinstance(said, tuple) else (fault or 200, {}, said)
            data = said if isinstance(said, bytes) else json.dumps(said).encode()
            with suppress(OSError):  # the client may have given up
                self.send_response(status)
                for name, value in (headers | {"Content-Length": str(len(data))}).items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.daemon_threads = True
    server.url = f"http://127.0.0.1:{http.server_address[1]}/v1"
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        http.shutdown()
        http.server_close()
