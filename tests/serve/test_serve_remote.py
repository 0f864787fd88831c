"""Pictures from allowed hosts only: parser tricks, private addresses, redirects, endless replies."""

from __future__ import annotations

import contextlib
import http.server
import io
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from PIL import Image

from mm_moslora.serve.api.api_errors import ApiError
from mm_moslora.serve.inference import request_images
from mm_moslora.serve.inference.request_images import fetch_from
from mm_moslora.utils.network.http_fetch import FetchError, public_address
from tests.serve.serve_tools import asking


def png() -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (20, 20), "red").save(stream, "PNG")
    return stream.getvalue()


@dataclass
class Reply:
    """One canned answer of a host."""

    status: int
    location: str | None = None
    body: bytes = b""
    endless: bool = False
    pause: float = 0.0
    """Seconds after each part of an endless body."""


@pytest.fixture
def hosts(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, list[Reply]]]:
    """Replies by host; each request takes the next one, and its connection is noted under `connected`.

    Names resolve to a public address, and what is connected to on port 443 is a server of this machine without TLS.
    """
    replies: dict[str, Any] = {"connected": []}
    addresses: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            reply = replies[self.headers["Host"]].pop(0)
            self.send_response(reply.status)
            if reply.location is not None:
                self.send_header("Location", reply.location)
            self.end_headers()
            with contextlib.suppress(OSError):
                self.wfile.write(reply.body)
                while reply.endless:
                    time.sleep(reply.pause)
                    self.wfile.write(reply.body)

        def log_message(self, *_: object) -> None: ...

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    connect, resolve = socket.create_connection, socket.getaddrinfo

    def connected(address: tuple[str, int], *more: Any, **named: Any) -> socket.socket:
        if address[1] != 443:
            return connect(address, *more, **named)
        addresses.append(address[0])
        return connect(server.server_address[:2], *more)

    def wrapped(_: ssl.SSLContext, raw: socket.socket, *, server_hostname: str) -> socket.socket:
        replies["connected"].append((server_hostname, addresses[-1]))
        return raw

    def resolved(host: str, port: Any, *more: Any, **named: Any) -> Any:
        return resolve("93.184.215.14" if host.endswith(".example") else host, port, *more, **named)

    monkeypatch.setattr(socket, "create_connection", connected)
    monkeypatch.setattr(socket, "getaddrinfo", resolved)
    monkeypatch.setattr(ssl.SSLContext, "wrap_socket", wrapped)
    yield replies
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    "url",
    [
        "http://ok.example/a.png", "https://evil.example/a.png", "https://ok.example.evil.example/", "ftp://ok.example/",
        "https://ok.example@evil.example/", "https://evil.example\\@ok.example/", "https://ok.example:8443/",
        "https://ok.example:x/", "https://127.0.0.1/", "https://2130706433/", "https://[::1]/", "https:///a", "https://",
        "https://ok.example\t.evil.example/", "https://ok.exampl\u0435/", "https://ok.example /", "//ok.example/a",
    ],
)  # fmt: skip
def test_only_the_allowed_host_over_https_is_connected_to(url: str, hosts: Any) -> None:
    with pytest.raises(ApiError):
        fetch_from(["ok.example"])(url)
    assert hosts["connected"] == []


@pytest.mark.parametrize(
    "addresses",
    [
        ["127.0.0.1"], ["169.254.169.254"], ["10.0.0.5"], ["192.168.1.1"], ["::1"], ["::ffff:127.0.0.1"], ["fe80::1%x"],
        ["0.0.0.0"], ["100.64.0.1"], ["224.0.0.1"], ["fd00::1"], ["93.184.215.14", "127.0.0.1"],
    ],
)  # fmt: skip
def test_addresses_that_are_not_public_are_refused(addresses: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: [(0, 0, 0, "", (item, 443)) for item in addresses])
    with pytest.raises(FetchError, match="not public"):
        public_address("ok.example")
    with pytest.raises(ApiError, match="not public"):
        fetch_from(["ok.example"])("https://ok.example/a.png")


def test_a_public_address_is_given_and_an_unknown_name_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: [(0, 0, 0, "", ("93.184.215.14", 443))])
    assert public_address("ok.example") == "93.184.215.14"

    def unknown(*_: Any, **__: Any) -> Any:
        raise socket.gaierror

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    with pytest.raises(FetchError, match="not known"):
        public_address("ok.example")


def test_the_checked_address_is_connected_to_and_redirects_are_checked_anew(hosts: Any) -> None:
    fetch = fetch_from(["ok.example", "cdn.example"])
    hosts["ok.example"] = [Reply(302, location="https://cdn.example/b.png")]
    hosts["cdn.example"] = [Reply(200, body=png())]
    assert fetch("https://ok.example/a.png") == png()
    assert hosts["connected"] == [("ok.example", "93.184.215.14"), ("cdn.example", "93.184.215.14")]
    for target in ("http://127.0.0.1/", "https://169.254.169.254/", "file:///etc/passwd", "https://evil.example/"):
        hosts["ok.example"] = [Reply(302, location=target)]
        with pytest.raises(ApiError, match="not allowed"):
            fetch("https://ok.example/a.png")
    hosts["ok.example"] = [Reply(302, location="/again")] * 9
    with pytest.raises(ApiError, match="too often"):
        fetch("https://ok.example/a.png")


def test_endless_replies_and_errors_end_the_fetch(hosts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    fetch = fetch_from(["ok.example"])
    hosts["ok.example"] = [Reply(200, body=b"x" * 2**20, endless=True)]
    with pytest.raises(ApiError, match="more than"):
        fetch("https://ok.example/")
    hosts["ok.example"] = [Reply(404)]
    with pytest.raises(ApiError, match="did not answer"):
        fetch("https://ok.example/")
    monkeypatch.setattr(request_images, "FETCH_SECONDS", 0.3)
    hosts["ok.example"] = [Reply(200, body=b"x", endless=True, pause=0.02)]
    with pytest.raises(ApiError, match="takes longer"):
        fetch_from(["ok.example"])("https://ok.example/")


def test_a_proxy_of_the_environment_is_not_asked(hosts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:1")
    hosts["ok.example"] = [Reply(200, body=png())]
    assert fetch_from(["ok.example"])("https://ok.example/a@2x.png?b=c") == png()
    assert hosts["connected"] == [("ok.example", "93.184.215.14")]


def test_the_server_takes_an_allowed_address_like_a_data_url(serve_with: Any, hosts: Any) -> None:
    hosts["ok.example"] = [Reply(200, body=png()), Reply(200, body=b"<html>")]
    with serve_with(fetch=fetch_from(["ok.example"])) as server:
        assert server.post(asking("what?", "https://ok.example/a.png")).status_code == 200
        for url in ("https://ok.example/page", "https://evil.example/", "http://ok.example/a.png"):
            reply = server.post(asking("what?", url))
            assert reply.status_code == 400
            assert reply.json()["error"]["param"] == "messages[0].content[1].image_url"
