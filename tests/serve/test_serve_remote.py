"""Pictures from allowed hosts, and nothing from anywhere else: parser tricks, inner addresses, redirects, floods."""

from __future__ import annotations

import io
import socket
from typing import Any

import pytest
from PIL import Image
from serve.serve_tools import asking

from mm_moslora.serve import remote
from mm_moslora.serve.faults import ApiError
from mm_moslora.serve.remote import RemotePictures, public_address


def png() -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (20, 20), "red").save(stream, "PNG")
    return stream.getvalue()


class Reply:
    """One canned answer of a host."""

    def __init__(self, status: int, *, location: str | None = None, body: bytes = b"", endless: bool = False) -> None:
        self.status, self._location, self._body, self._endless = status, location, body, endless

    def getheader(self, name: str) -> str | None:
        return self._location

    def read1(self, _: int) -> bytes:
        chunk, self._body = self._body, self._body if self._endless else b""
        return chunk


@pytest.fixture
def hosts(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Reply]]:
    """Replies by host; each connection takes the next one, and is noted under `connected`."""
    replies: dict[str, list[Reply]] = {}
    connected: list[tuple[str, str]] = []

    class Connection:
        def __init__(self, host: str, address: str, **_: Any) -> None:
            self._host = host
            connected.append((host, address))

        def request(self, *_: Any, **__: Any) -> None: ...

        def getresponse(self) -> Reply:
            return replies[self._host].pop(0)

        def close(self) -> None: ...

    monkeypatch.setattr(remote, "_PinnedConnection", Connection)
    monkeypatch.setattr(remote, "public_address", lambda _: "93.184.215.14")
    replies["connected"] = connected  # type: ignore[assignment]
    return replies


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
        RemotePictures(["ok.example"])(url)
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
    with pytest.raises(ApiError, match="not public"):
        public_address("ok.example")


def test_a_public_address_is_given_and_an_unknown_name_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: [(0, 0, 0, "", ("93.184.215.14", 443))])
    assert public_address("ok.example") == "93.184.215.14"

    def unknown(*_: Any, **__: Any) -> Any:
        raise socket.gaierror

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    with pytest.raises(ApiError, match="not known"):
        public_address("ok.example")


def test_the_checked_address_is_connected_to_and_redirects_are_checked_anew(hosts: Any) -> None:
    fetch = RemotePictures(["ok.example", "cdn.example"])
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


def test_floods_and_errors_end(hosts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    fetch = RemotePictures(["ok.example"])
    hosts["ok.example"] = [Reply(200, body=b"x" * 2**20, endless=True)]
    with pytest.raises(ApiError, match="more than"):
        fetch("https://ok.example/")
    hosts["ok.example"] = [Reply(404)]
    with pytest.raises(ApiError, match="did not answer"):
        fetch("https://ok.example/")
    monkeypatch.setattr(remote, "SECONDS", -1.0)
    hosts["ok.example"] = [Reply(200, body=b"x", endless=True)]
    with pytest.raises(ApiError, match="takes longer"):
        fetch("https://ok.example/")


def test_the_server_takes_an_allowed_address_like_a_data_url(serve_with: Any, hosts: Any) -> None:
    hosts["ok.example"] = [Reply(200, body=png()), Reply(200, body=b"<html>")]
    with serve_with(fetch=RemotePictures(["ok.example"])) as server:
        assert server.post(asking("what?", "https://ok.example/a.png")).status_code == 200
        for url in ("https://ok.example/page", "https://evil.example/", "http://ok.example/a.png"):
            reply = server.post(asking("what?", url))
            assert reply.status_code == 400
            assert reply.json()["error"]["param"] == "messages[0].content[1].image_url"
