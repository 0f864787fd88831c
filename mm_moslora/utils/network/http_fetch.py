"""Downloads over HTTP from allowed hosts only, within limits."""

from __future__ import annotations

import functools
import http.client
import re
import socket
import ssl
import threading
import urllib.error
import urllib.request
from collections.abc import Collection
from contextlib import suppress
from enum import StrEnum
from typing import Any
from urllib.parse import urljoin, urlsplit, urlunsplit

from mm_moslora.utils.errors import MoSLoRAError

_HEADERS = {"Accept": "image/*, */*;q=0.8", "User-Agent": "mm_moslora"}
_SILENCE = 20.0
"""Seconds without a byte before a download is abandoned."""
_MOST_REDIRECTS = 10
_REDIRECTS = (301, 302, 303, 307, 308)
_BAD = re.compile(r"[^\x21-\x7e]|\\")
"""Characters that URL parsers interpret differently; they occur in attacks only."""


class FetchFault(StrEnum):
    """Why a download was refused or failed."""

    NOT_ALLOWED = "not allowed"
    """The URL, or one that it redirects to, breaks the rules."""
    TOO_LARGE = "too large"
    FAILED = "failed"


class FetchError(MoSLoRAError):
    """A download that was refused or failed.

    Args:
        what: what is wrong with the URL; it continues a sentence after the URL's name, and holds no text of a library.
    """

    def __init__(self, fault: FetchFault, what: str, *, detail: str = "") -> None:
        self.fault, self.what, self.detail = fault, what, detail
        super().__init__(f"The address {what}{f' ({detail})' if detail else ''}.")


def fetch(url: str, *, hosts: Collection[str], most: int, seconds: float) -> bytes:
    """Download the bytes at a URL.

    Args:
        url: http or https.
        hosts: allowed host names, exact and in lower case, for the URL and its redirects.
        most: bytes.
        seconds: for the whole download, redirects included.
    """
    limit = TimeLimit(seconds)
    opener = limit.opener()
    with limit:
        address = ""
        for _ in range(_MOST_REDIRECTS + 1):
            address = _checked(url, hosts, base=address)
            request = urllib.request.Request(address, headers=_HEADERS)  # noqa: S310  (checked)
            try:
                with opener.open(request, timeout=min(_SILENCE, seconds)) as answer:
                    return _content(answer, most, limit)
            except urllib.error.HTTPError as error:
                error.close()
                target = error.headers.get("Location")
                if error.code not in _REDIRECTS or not target:
                    what = "did not answer with a file"
                    raise FetchError(FetchFault.FAILED, what, detail=f"HTTP {error.code}") from error
                url = target
            except (OSError, ValueError, http.client.HTTPException) as error:
                limit.check()
                detail = f"{type(error).__name__}: {error}"[:200]
                raise FetchError(FetchFault.FAILED, "could not be fetched", detail=detail) from error
    raise FetchError(FetchFault.FAILED, "redirects too often")


def _checked(url: str, hosts: Collection[str], *, base: str) -> str:
    """A URL, which may be relative to the one that redirects to it, rebuilt from its checked parts."""
    shown = ascii(url[:80])
    if _BAD.search(url):
        raise FetchError(FetchFault.FAILED, "holds characters that are not allowed", detail=shown)
    try:
        parts = urlsplit(urljoin(base, url))
        host, port = (parts.hostname or "").rstrip("."), parts.port
    except ValueError:
        raise FetchError(FetchFault.FAILED, "is not a valid address", detail=shown) from None
    if parts.scheme not in ("http", "https") or host not in hosts or "@" in parts.netloc:
        raise FetchError(FetchFault.NOT_ALLOWED, "is not of an allowed host", detail=shown)
    netloc = (f"[{host}]" if ":" in host else host) + (f":{port}" if port else "")
    return urlunsplit((parts.scheme, netloc, parts.path or "/", parts.query, ""))


def _content(answer: http.client.HTTPResponse, most: int, limit: TimeLimit) -> bytes:
    data = answer.read(most + 1)
    if len(data) > most:
        raise FetchError(FetchFault.TOO_LARGE, f"gives more than {most} bytes")
    limit.check()
    if len(data) < int(answer.headers.get("Content-Length") or 0):
        raise FetchError(FetchFault.FAILED, f"breaks off after {len(data)} bytes")
    return data


class TimeLimit:
    """Closes the connections of a download at its deadline, even while bytes arrive."""

    def __init__(self, seconds: float) -> None:
        self._seconds, self.passed = seconds, False  # the latter turns true at the deadline
        self._sockets: list[socket.socket] = []
        self._timer = threading.Timer(seconds, self._end)
        self._timer.daemon = True

    def __enter__(self) -> TimeLimit:
        self._timer.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()

    def holds(self, connection: http.client.HTTPConnection) -> None:
        """Register a new connection."""
        self._sockets.append(connection.sock)
        if self.passed:
            self._end()

    def opener(self) -> urllib.request.OpenerDirector:
        """What opens http and https under this deadline, and follows no redirects."""
        return urllib.request.build_opener(_Guarded(self), _NoRedirects())

    def check(self) -> None:
        """Raise a FetchError after the deadline."""
        if self.passed:
            raise FetchError(FetchFault.FAILED, f"takes longer than {self._seconds:g} s")

    def _end(self) -> None:
        self.passed = True
        for each in self._sockets:
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)


class _Guarded(urllib.request.HTTPHandler, urllib.request.HTTPSHandler):
    """Opens http and https under a deadline."""

    def __init__(self, limit: TimeLimit) -> None:
        super().__init__()

        class Plain(http.client.HTTPConnection):
            def connect(self) -> None:
                super().connect()
                limit.holds(self)

        class Tls(http.client.HTTPSConnection):
            def connect(self) -> None:
                super().connect()
                limit.holds(self)

        self._plain, self._tls = Plain, Tls

    def http_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        """Open a request."""
        return self.do_open(self._plain, req)

    def https_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        """Open a request."""
        return self.do_open(self._tls, req, context=_context())


@functools.cache
def _context() -> ssl.SSLContext:
    return ssl.create_default_context()


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """Leaves redirects to the caller: they may lead anywhere, and a key would be sent on."""

    def redirect_request(self, *_: Any) -> None:
        """None follows."""
