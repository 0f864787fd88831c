"""Files of other machines that data name: pictures behind a URL, and files of a hub's data set.

A picture is fetched once, from hosts that the recipe names, and kept on this machine once it has been decoded.
"""

from __future__ import annotations

import hashlib
import http.client
import os
import socket
import threading
import urllib.error
import urllib.request
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from mm_moslora.data.faults import Code
from mm_moslora.data.images import MAX_BYTES, ImageError, open_image_bytes, read_picture
from mm_moslora.errors import DataError
from mm_moslora.files import replacing

TIMEOUT = 20.0
"""Seconds without a byte before a host is given up."""
TOTAL_TIMEOUT = 120.0
"""Seconds for a whole fetch, redirects included."""


def picture_cache() -> Path:
    """Where fetched pictures are kept: `MM_MOSLORA_CACHE`, or `~/.cache/mm_moslora`, and `pictures` in it."""
    root = os.environ.get("MM_MOSLORA_CACHE")
    return (Path(root) if root else Path.home() / ".cache" / "mm_moslora") / "pictures"


@dataclass(frozen=True)
class RemotePicture:
    """A picture on another machine."""

    name: str
    """The URL."""
    hosts: tuple[str, ...] = field(compare=False)
    """Hosts that it, and what it redirects to, may lie on."""

    @property
    def path(self) -> Path:
        """Where its bytes are kept."""
        return picture_cache() / hashlib.sha256(self.name.encode("utf-8")).hexdigest()

    @property
    def fetched(self) -> bool:
        """Whether they are there."""
        return self.path.is_file()

    def read(self) -> bytes:
        """The bytes of the picture file, fetched if need be.

        Raises:
            ImageError: the host does not answer in time, redirects elsewhere, breaks off, or sends too much or no
                picture; nothing is kept then.
        """
        if self.fetched:
            return read_picture(self.path)
        data = self._fetch()
        open_image_bytes(data, name=self.name)  # a broken one would be kept for ever
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(self.path) as part:
            part.write_bytes(data)
        return data

    def _fetch(self) -> bytes:
        request = urllib.request.Request(self.name, headers={"User-Agent": "mm_moslora"})  # noqa: S310  (checked)
        limit = _TimeLimit(TOTAL_TIMEOUT)
        opener = urllib.request.build_opener(_SameHosts(self.hosts), _Limited(limit), _LimitedTls(limit))
        try:
            with limit, opener.open(request, timeout=TIMEOUT) as answer:
                data = bytes(answer.read(MAX_BYTES + 1))
                expected = int(answer.headers.get("Content-Length") or len(data))
        except (OSError, ValueError, http.client.HTTPException) as error:
            said = f"no answer within {TOTAL_TIMEOUT:g} seconds" if limit.passed else f"{type(error).__name__}: {error}"
            remedy = "check the URL and the network, or download the pictures first"
            raise ImageError(Code.IMAGE_MISSING, self.name, f"cannot be fetched ({said[:200]})", remedy) from error
        if len(data) > MAX_BYTES:
            raise ImageError(Code.IMAGE_TOO_LARGE, self.name, "sends too much", f"stay below {MAX_BYTES} bytes")
        if limit.passed or len(data) < expected:
            what = f"breaks off after {len(data)} bytes"
            raise ImageError(Code.IMAGE_MISSING, self.name, what, "try again, or download the pictures first")
        return data


def is_of_set(path: str, dataset: str) -> bool:
    """Whether a path is that of a file of a data set on the hub, by one protocol and no chain of them."""
    return path.startswith(f"hf://datasets/{dataset}@") and "::" not in path and ".." not in path.split("/")


def read_hub_file(path: str, dataset: str) -> bytes:
    """A file of a data set on the hub, through the hub's client alone.

    Args:
        path: `hf://datasets/NAME@REVISION/...`.
        dataset: NAME; files of others are not read.

    Raises:
        DataError: the file is another's, too large, or cannot be fetched.
    """
    from huggingface_hub import HfFileSystem
    from huggingface_hub.errors import HfHubHTTPError

    if not is_of_set(path, dataset):
        raise DataError(f"{ascii(path)[:200]} is no file of {dataset}. Name one of its own files.")
    try:
        with HfFileSystem().open(path, "rb") as stream:
            data = bytes(stream.read(MAX_BYTES + 1))
    except (OSError, ValueError, HfHubHTTPError) as error:
        raise DataError(f"{path} cannot be fetched ({type(error).__name__}: {str(error)[:200]}).") from error
    if len(data) > MAX_BYTES:
        raise DataError(f"{path} takes more than {MAX_BYTES} bytes. Leave it out.")
    return data


class _TimeLimit:
    """Ends the connections of a fetch that takes too long as a whole, however often a byte arrives.

    Args:
        seconds: from the start of the block to its end.
    """

    def __init__(self, seconds: float) -> None:
        self.passed = False
        self._sockets: list[socket.socket] = []
        self._timer = threading.Timer(seconds, self._end)
        self._timer.daemon = True

    def __enter__(self) -> _TimeLimit:
        self._timer.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()

    def holds(self, connection: http.client.HTTPConnection) -> None:
        """A connection that has just been made."""
        self._sockets.append(connection.sock)
        if self.passed:
            self._end()

    def _end(self) -> None:
        self.passed = True
        for each in self._sockets:
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)


class _Limited(urllib.request.HTTPHandler):
    """Opens http under a time limit."""

    def __init__(self, limit: _TimeLimit) -> None:
        super().__init__()

        class Connection(http.client.HTTPConnection):
            def connect(self) -> None:
                super().connect()
                limit.holds(self)

        self._connection = Connection

    def http_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        """Open a request."""
        return self.do_open(self._connection, req)


class _LimitedTls(urllib.request.HTTPSHandler):
    """Opens https under a time limit."""

    def __init__(self, limit: _TimeLimit) -> None:
        super().__init__()

        class Connection(http.client.HTTPSConnection):
            def connect(self) -> None:
                super().connect()
                limit.holds(self)

        self._connection = Connection

    def https_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        """Open a request."""
        return self.do_open(self._connection, req)


class _SameHosts(urllib.request.HTTPRedirectHandler):
    """Follows redirects within the allowed hosts only."""

    def __init__(self, hosts: tuple[str, ...]) -> None:
        self.hosts = hosts

    def redirect_request(self, req, fp, code, msg, headers, newurl):  # type: ignore[no-untyped-def]
        """Refuse a redirect to another host or scheme."""
        parts = urlsplit(newurl)
        if parts.scheme not in ("http", "https") or parts.hostname not in self.hosts:
            raise urllib.error.URLError(f"redirects to {newurl[:80]}, which image_hosts does not allow")
        return super().redirect_request(req, fp, code, msg, headers, newurl)
