"""Pictures behind a URL: fetched once, from hosts that the recipe names, into a folder on this machine."""

from __future__ import annotations

import hashlib
import http.client
import os
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from mm_moslora.data.faults import Code
from mm_moslora.data.images import MAX_BYTES, ImageError

TIMEOUT = 20.0
"""Seconds without a byte before a host is given up."""


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
            ImageError: the host does not answer, redirects elsewhere, or sends too much.
        """
        if not self.fetched:
            data = self._fetch()
            self.path.parent.mkdir(parents=True, exist_ok=True)
            part = self.path.with_suffix(f".{os.urandom(6).hex()}.part")
            part.write_bytes(data)
            part.replace(self.path)
        return self.path.read_bytes()

    def _fetch(self) -> bytes:
        opener = urllib.request.build_opener(_SameHosts(self.hosts))
        request = urllib.request.Request(self.name, headers={"User-Agent": "mm_moslora"})  # noqa: S310  (checked)
        try:
            with opener.open(request, timeout=TIMEOUT) as answer:
                data = bytes(answer.read(MAX_BYTES + 1))
        except (OSError, ValueError, http.client.HTTPException) as error:
            what = f"cannot be fetched ({type(error).__name__}: {str(error)[:200]})"
            remedy = "check the URL and the network, or download the pictures first"
            raise ImageError(Code.IMAGE_MISSING, self.name, what, remedy) from error
        if len(data) > MAX_BYTES:
            raise ImageError(Code.IMAGE_TOO_LARGE, self.name, "sends too much", f"stay below {MAX_BYTES} bytes")
        return data


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
