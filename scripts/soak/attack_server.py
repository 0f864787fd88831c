"""Attack a running server with bodies that are expensive to read, and measure latency, memory and other answers.

    python scripts/soak/attack_server.py --seconds 180 [--clients 12] [--seed 0]

The server runs in a separate process with a tiny random model and its default limits. Clients send lists of millions
of items, deep nesting, escapes, endless texts, small picture files that are large in memory, pictures that grow when
they are padded, slow uploads, and uploads that are aborted. Meanwhile, the script requests `/health` 20 times a
second, sends ordinary requests one after the other, and reads the server's memory.

The exit code is 0 only when no reply was a 5xx, `/health` never took longer than `--health` seconds, memory stayed
below its start plus `bodies_bytes`, `pictures_bytes` and ten bodies (the two parsing threads hold up to five copies
each), and all reserved memory is released at the end.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import http.client
import io
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
from fuzz_server import tiny_models

MIB = 2**20
HEAD = (
    "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    "Content-Length: {}\r\n\r\n"
)


def request(text: str, *pictures: bytes, kind: str = "png", **more: Any) -> bytes:
    """A body."""
    urls = (f"data:image/{kind};base64,{base64.b64encode(data).decode()}" for data in pictures)
    parts = [{"type": "text", "text": text}, *({"type": "image_url", "image_url": {"url": url}} for url in urls)]
    body = {"model": "tiny", "max_tokens": 4, "messages": [{"role": "user", "content": parts}]}
    return json.dumps(body | more).encode()


def picture(mode: str, width: int, height: int, kind: str = "png", colour: Any = 0) -> bytes:
    """A picture file of one colour: small on disk."""
    from PIL import Image

    stream = io.BytesIO()
    Image.new(mode, (width, height), colour).save(stream, kind)
    return stream.getvalue()


def bodies() -> dict[str, bytes]:
    """Attacks that consist of one body."""
    start = b'{"model": "tiny", "messages": ['
    return {
        "a list of millions": start + b"[]," * (6 * MIB),
        "millions of numbers": start + b"1," * (9 * MIB),
        "deep lists": start + b"[" * 95_000,
        "deep objects": b'{"a":' * 95_000,
        "as many keys as are allowed": json.dumps({f"key {number}": 0 for number in range(95_000)}).encode(),
        "the same key again and again": b"{" + b'"a":0,' * 95_000 + b'"a":0}',
        "escapes": request("\n" * 900_000),
        "an endless text": request("a" * (19 * MIB)),
        "a long text that is tokenised": request("red blue " * 200, max_tokens=1),
        "40 million transparent pixels": request("what?", picture("RGBA", 6300, 6300, colour=(9, 9, 9, 9))),
        "40 million wide pixels": request("what?", picture("I;16", 6300, 6300)),
        "40 million pixels": request("what?", picture("RGB", 6300, 6300)),
        "sixteen pictures": request("what?", *[picture("L", 2400, 2500)] * 16),
        "a strip that becomes a square": request("what?", picture("L", 16_000, 100)),
        "a smaller strip": request("what?", picture("L", 9_000, 100)),
        "a picture as large as a body may be": request("what?", picture("RGB", 2200, 2200, "bmp"), kind="bmp", n=8),
        "an ordinary request": request("what is red?", picture("RGB", 60, 40)),
    }


class Attack:
    """Clients, and the outcomes of their requests.

    Args:
        port: the server's.
        seed: seed of the clients' choices.
    """

    def __init__(self, port: int, seed: int) -> None:
        self.port, self.seed, self.bodies = port, seed, bodies()
        self.over = threading.Event()
        self.statuses: Counter[str] = Counter()
        self.health: list[float] = []
        self.ordinary: Counter[int] = Counter()
        self.faults: list[str] = []
        self._lock = threading.Lock()

    def client(self, number: int) -> None:
        """Sends one attack after the other."""
        draw = random.Random(f"{self.seed} {number}")
        ways: list[Callable[[bytes], int]] = [self._send, self._send, self._send, self._trickle, self._leave]
        while not self.over.is_set():
            name = draw.choice(sorted(self.bodies))
            way = draw.choice(ways)
            try:
                status = way(self.bodies[name])
            except OSError:  # the server may close the connection of an excessive request
                status = 0
            with self._lock:
                self.statuses[f"{name}: {status or 'closed'}"] += 1
                if status >= 500:
                    self.faults.append(f"{name}: {status}")

    def ask_health(self) -> None:
        """Requests `/health` on a new connection each time, as a load balancer may."""
        while not self.over.is_set():
            began = time.monotonic()
            try:
                status = self._get("/health")[0]
            except OSError as error:
                status = 0
                self.faults.append(f"/health: {type(error).__name__}")
            self.health.append(time.monotonic() - began)
            if status not in (0, 200):
                self.faults.append(f"/health: {status}")
            self.over.wait(0.05)

    def ask_ordinary(self) -> None:
        """Sends ordinary requests."""
        while not self.over.is_set():
            with contextlib.suppress(OSError):
                self.ordinary[self._send(self.bodies["an ordinary request"])] += 1
            self.over.wait(0.5)

    def wait_for_start(self) -> None:
        """Returns once the server listens."""
        deadline = time.monotonic() + 120
        while True:
            try:
                self._get("/health")
                return
            except OSError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.1)

    def metric(self, name: str) -> float:
        """A value of `/metrics`."""
        page = self._get("/metrics")[1].decode()
        return next(float(line.split()[1]) for line in page.splitlines() if line.startswith(f"mm_moslora_{name} "))

    def _get(self, path: str) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request("GET", path)
            reply = connection.getresponse()
            return reply.status, reply.read()
        finally:
            connection.close()

    def _send(self, body: bytes) -> int:
        with self._connected() as connection:
            connection.sendall(HEAD.format(len(body)).encode())
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                connection.sendall(body)
            head = connection.recv(200)
            while connection.recv(MIB):  # to the end, so that this request does not count against the next one
                if b"chunked" not in head:
                    break
            return int(head.split()[1]) if head else 0

    def _trickle(self, body: bytes) -> int:
        with self._connected() as connection:
            connection.sendall(HEAD.format(len(body)).encode())
            for start in range(0, min(len(body), 4000), 100):
                if self.over.wait(0.1):
                    return 0
                connection.sendall(body[start : start + 100])
        return 0

    def _leave(self, body: bytes) -> int:
        with self._connected() as connection:
            connection.sendall(HEAD.format(len(body)).encode() + body)
            self.over.wait(0.05)
        return 0

    @contextlib.contextmanager
    def _connected(self) -> Iterator[socket.socket]:
        with socket.create_connection(("127.0.0.1", self.port), timeout=60) as connection:
            yield connection


def memory_mib(process: int, key: str = "VmRSS") -> float:
    """Resident memory of a process; `VmHWM` is its peak."""
    lines = Path(f"/proc/{process}/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{key}:"))


def attack(*, seconds: float, clients: int, seed: int, health: float) -> dict[str, Any]:
    """Start a server, attack it, and report.

    Args:
        seconds: duration of the attack.
        clients: number of concurrent clients.
        seed: seed of their choices.
        health: limit for `/health`, seconds.
    """
    from mm_moslora.serve.api.request_limits import Limits

    limits = Limits()
    allowed = (limits.bodies_bytes + limits.pictures_bytes + 10 * limits.body_bytes) / MIB
    with tempfile.TemporaryDirectory() as folder:
        process = subprocess.Popen([sys.executable, __file__, "--serve", folder], stdout=subprocess.PIPE, text=True)
        try:
            assert process.stdout is not None
            port, server = map(int, process.stdout.readline().split())
            run = Attack(port, seed)
            run.wait_for_start()
            run._send(run.bodies["an ordinary request"])
            before = memory_mib(server)
            works = [lambda number=number: run.client(number) for number in range(clients)]
            threads = [threading.Thread(target=work) for work in (*works, run.ask_health, run.ask_ordinary)]
            for thread in threads:
                thread.start()
            time.sleep(seconds)
            run.over.set()
            for thread in threads:
                thread.join(120)
            deadline = time.monotonic() + 60
            while (left := run.metric("bodies_bytes") + run.metric("pictures_bytes")) and time.monotonic() < deadline:
                time.sleep(0.2)
            after = run._send(run.bodies["an ordinary request"])
            most = memory_mib(server, "VmHWM")
        finally:
            process.terminate()
            process.wait(60)
    slow = sorted(run.health)
    result = {
        "seconds": seconds, "clients": clients, "seed": seed, "attacks": run.statuses.total(),
        "health_asked": len(slow), "health_median": round(slow[len(slow) // 2], 4),
        "health_99_percent": round(slow[len(slow) * 99 // 100], 4), "health_slowest": round(slow[-1], 4),
        "memory_before_mib": round(before), "memory_most_mib": round(most),
        "memory_allowed_mib": round(before + allowed), "held_at_the_end": left, "answers_after": after == 200,
        "ordinary": {str(status): count for status, count in sorted(run.ordinary.items())},
        "statuses": dict(sorted(run.statuses.items())), "faults": run.faults[:20],
    }  # fmt: skip
    result["good"] = (
        not run.faults
        and slow[-1] <= health
        and most <= before + allowed
        and left == 0
        and bool(result["answers_after"])
    )
    return result


def serve(folder: Path) -> None:
    """The server's process: print its port and number, and run until it is stopped."""
    import logging

    import torch

    from mm_moslora.serve.api.api_routes import create_app
    from mm_moslora.serve.api.http_server import bound, run_app
    from mm_moslora.serve.api.request_limits import Limits
    from mm_moslora.serve.inference.continuous_batching import GenerationEngine

    torch.set_num_threads(1)
    logging.disable(logging.CRITICAL)
    limits = Limits()
    sockets = bound("127.0.0.1", 0)
    engine = GenerationEngine(tiny_models(folder, longest=8192), limits)
    app = create_app(engine, limits)
    print(sockets[0].getsockname()[1], os.getpid(), flush=True)
    run_app(app, sockets, limits=limits, end=engine.stop)


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=180)
    parser.add_argument("--clients", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--health", type=float, default=0.5, help="seconds that /health may take")
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    root = Path(__file__).resolve().parents[2]
    sys.path[:0] = [str(root), str(root / "eval")]
    if options.serve is not None:
        serve(options.serve)
        return 0
    result = attack(seconds=options.seconds, clients=options.clients, seed=options.seed, health=options.health)
    for name, value in result.items():
        print(f"{name}: {json.dumps(value, indent=2) if isinstance(value, dict) else value}")
    return 0 if result["good"] else 1


if __name__ == "__main__":
    sys.exit(main())
