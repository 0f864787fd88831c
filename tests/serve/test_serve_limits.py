"""The limits of the server: memory counts until a request ends, and other requests do not wait for it."""

from __future__ import annotations

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from PIL import Image
from waiting import wait_until

from mm_moslora.serve.request_limits import Limits
from tests.serve.serve_tools import HEAD, asking, data_url

MIB = 2**20


@pytest.mark.parametrize(
    ("body", "what"),
    [
        (b'{"model": "tiny", "messages": [' + b"[]," * (6 * MIB), "commas"),
        (b'{"a": "' + b"\\n" * (5 * MIB), "backslashes"),
        (b'{"model": "tiny", "messages": ' + b"[" * 95_000 + b"]" * 95_000 + b"}", "levels"),
        (b'{"model": "tiny", "messages": ' + b"[" * 60 + b"]" * 60 + b"}", "32 levels"),
        (b"{" + b'"a":0,' * 95_000 + b'"a":0}', "twice"),
        (b"{" + b",".join(b'"%d":0' % (number % 94_999) for number in range(95_000)) + b"}", "twice"),
        (json.dumps(asking("a" * (15 * MIB))).encode(), "characters"),
        (json.dumps(asking("\U0001f600" * (MIB // 2 + MIB // 8))).encode(), "backslashes"),
        (json.dumps(asking("\U0001f600" * (4 * MIB)), ensure_ascii=False).encode(), "characters"),
    ],
    ids=["items", "escapes", "deep", "rather deep", "one key", "far keys", "text", "escaped text", "wide text"],
)  # fmt: skip
def test_expensive_bodies_are_refused_while_others_are_answered(server: Any, body: bytes, what: str) -> None:
    over = threading.Event()

    def watch() -> None:
        while not over.is_set():
            assert server.get("/health").status_code == 200

    began = loop_seconds(server)
    with ThreadPoolExecutor(1) as pool:
        watching = pool.submit(watch)
        reply = server.post(body)
        over.set()
        watching.result()
    assert reply.status_code == 400
    assert what in reply.json()["error"]["message"]
    assert loop_seconds(server) - began < 2  # 8.5 s where lists are parsed on the event loop


def loop_seconds(server: Any) -> float:
    """Seconds that a server's event loop has computed, however busy the machine is."""
    (thread,) = (thread for thread in threading.enumerate() if thread.name == f"server-{server.port}")
    return time.clock_gettime(time.pthread_getcpuclockid(thread.ident))


def test_requests_above_the_limits_are_refused_before_tokenising_or_decoding(
    serve_with: Any, models: Any, monkeypatch: Any
) -> None:
    with serve_with() as server:
        asked: list[Any] = []
        monkeypatch.setattr(models, "prompt", lambda *arguments: asked.append(arguments))
        monkeypatch.setattr("mm_moslora.serve.prompt_preparation.open_pictures", lambda *a, **k: asked.append(a))
        reply = server.post(asking("red " * 3000)).json()["error"]
        assert reply["code"] == "context_length_exceeded"
        pictures = [data_url(Image.new("RGB", (20, 20), (number, 0, 0))) for number in range(16)]
        tokens = models.assembly.tokens_per_image
        reply = server.post(asking("what?", *pictures, max_tokens=64 if 16 * tokens + 64 > 512 else 6))
        assert (reply.json()["error"]["code"] == "context_length_exceeded") == (16 * tokens + 64 > 512)
        assert asked == [] or 16 * tokens + 64 <= 512


@pytest.mark.parametrize(
    ("mode", "size", "allowed"),
    [
        ("RGB", (1200, 1200), True), ("RGBA", (1200, 1200), False), ("I;16", (1200, 1200), False),
        ("L", (3000, 100), False), ("L", (1500, 100), True),
    ],
)  # fmt: skip
def test_pictures_are_counted_by_their_memory(serve_with: Any, mode: str, size: tuple[int, int], allowed: bool) -> None:
    """Intermediate copies and the square around a strip count; the size of the file does not."""
    with serve_with(pictures_bytes=20 * MIB) as server:
        reply = server.post(asking("what?", data_url(Image.new(mode, size))))
        assert reply.status_code == (200 if allowed else 400), reply.text
        if not allowed:
            assert "MiB of memory" in reply.json()["error"]["message"]


def test_abandoned_work_stops_and_releases_its_memory(serve_with: Any, monkeypatch: Any) -> None:
    """The deadline passes while the first of two pictures is opened; the second one is not opened."""
    from mm_moslora.serve import prompt_preparation as pictures

    opened, go = [], threading.Event()
    real = pictures.open_image_bytes

    def slow(data: bytes, *, name: str) -> Any:
        opened.append(name)
        assert go.wait(60)
        return real(data, name=name)

    monkeypatch.setattr(pictures, "open_image_bytes", slow)
    body = asking("what?", *[data_url(Image.new("RGB", (30, 30), colour)) for colour in ("red", "blue")])
    with serve_with(prepare_seconds=3) as server:
        assert server.post(body).status_code == 429
        go.set()
        wait_until(lambda: server.intake.memory.used == 0)
        assert len(opened) == 1
        assert server.post(asking("hello")).status_code == 200


def test_a_client_that_leaves_while_its_pictures_are_opened_frees_its_place(serve_with: Any, monkeypatch: Any) -> None:
    from mm_moslora.serve import prompt_preparation as pictures

    opened, go = threading.Event(), threading.Event()
    real = pictures.open_image_bytes

    def slow(data: bytes, *, name: str) -> Any:
        opened.set()
        assert go.wait(60)
        return real(data, name=name)

    monkeypatch.setattr(pictures, "open_image_bytes", slow)
    body = json.dumps(asking("what?", data_url(Image.new("RGB", (30, 30))))).encode()
    with serve_with() as server:
        with server.socket() as connection:
            connection.sendall(HEAD + f"Content-Length: {len(body)}\r\n\r\n".encode() + body)
            assert opened.wait(60)
        wait_until(lambda: server.intake.memory.used == 0)
        go.set()
        wait_until(lambda: server.intake.memory.used == 0)


def test_slow_uploads_do_not_count_as_waiting_requests(serve_with: Any) -> None:
    """Forty bodies without an end, where 3 requests may be in progress."""
    with serve_with(queue=2, batch=1) as server:
        slow = [server.socket() for _ in range(40)]
        try:
            for connection in slow:
                connection.sendall(HEAD + b"Content-Length: 5000\r\n\r\n{")
            wait_until(lambda: server.intake.memory.used == len(slow))
            assert server.post(asking("hello")).status_code == 200
        finally:
            for connection in slow:
                connection.close()
        wait_until(lambda: server.intake.memory.used == 0)


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.2", 200), ("127.0.0.2:8000", 200), ("[::1]:80", 200), ("LOCALHOST", 200), ("127.0.0.1.evil.net", 403),
        ("127.1", 403), ("10.0.0.1", 403), ("[::2]", 403), ("evil.net", 403), ("localhost/.evil.net", 403),
        ("localhost#.evil.net", 403), ("localhost?evil.net", 403), ("127.0.0.1:x", 403), ("127.0.0.1:", 403),
        ("user@localhost", 403), ("[127.0.0.1]", 403), ("[::1].evil.net", 403), ("localhost:80:80", 403), ("", 403),
    ],
)  # fmt: skip
def test_any_loopback_address_is_a_name_of_this_machine(server: Any, host: str, status: int) -> None:
    assert server.get("/health", headers={"Host": host}).status_code == status
    assert server.get("/health", headers={"Origin": f"http://{host}"}).status_code == status
    assert server.get("/health", headers={"Origin": f"chrome-extension://{host}"}).status_code == 403


def test_the_largest_allowed_picture_fits_the_memory_limit() -> None:
    assert Limits().pictures_bytes >= 24 * Limits().image_pixels  # the largest allowed picture fits with transparency
