"""Fetching a picture from a host that the server's owner allowed, and from nowhere else.

Off by default. Only https, only named hosts, only public addresses; the address that was checked is the one that is
connected to, and every redirect is checked anew.
"""

from __future__ import annotations

import http.client
import ipaddress
import socket
import ssl
import time
from collections.abc import Collection
from urllib.parse import urljoin, urlsplit

from mm_moslora.serve.faults import ApiError

MOST_BYTES = 10 * 2**20
SECONDS = 5.0
"""For the whole fetch, redirects included."""
REDIRECTS = 3


class _PinnedConnection(http.client.HTTPSConnection):
    """TLS to a checked address, with the certificate checked against the host's name."""

    def __init__(self, host: str, address: str, *, timeout: float, context: ssl.SSLContext) -> None:
        super().__init__(host, 443, timeout=timeout, context=context)
        self._address, self._tls = address, context

    def connect(self) -> None:
        raw = socket.create_connection((self._address, 443), self.timeout)
        self.sock = self._tls.wrap_socket(raw, server_hostname=self.host)


class RemotePictures:
    """Fetches pictures.

    Args:
        hosts: exact host names.
    """

    def __init__(self, hosts: Collection[str]) -> None:
        self._hosts = frozenset(host.lower().rstrip(".") for host in hosts)
        self._context = ssl.create_default_context()

    def __call__(self, url: str) -> bytes:
        """The bytes behind an address.

        Raises:
            ApiError: the host is not allowed, does not answer in time, or sends too much.
        """
        deadline = time.monotonic() + SECONDS
        for _ in range(REDIRECTS + 1):
            host, target = self._checked(url)
            connection = _PinnedConnection(
                host, public_address(host), timeout=max(0.1, deadline - time.monotonic()), context=self._context
            )
            try:
                connection.request("GET", target, headers={"Accept": "image/*", "User-Agent": "mm_moslora"})
                reply = connection.getresponse()
                if reply.status in (301, 302, 303, 307, 308):
                    url = urljoin(url, reply.getheader("Location") or "")
                    continue
                if reply.status != 200:
                    raise _failed("did not answer with a picture")
                return _read(reply, deadline)
            except (OSError, http.client.HTTPException, ValueError):
                raise _failed("could not be fetched") from None
            finally:
                connection.close()
        raise _failed("redirects too often")

    def _checked(self, url: str) -> tuple[str, str]:
        """Host and target of an allowed address."""
        # Parsers disagree about these; whoever sends them wants that.
        if any(character in url for character in "\\@\t\r\n ") or not url.isascii():
            raise _failed("holds characters that are not allowed")
        try:
            parts = urlsplit(url)
            host, port = (parts.hostname or "").lower().rstrip("."), parts.port
        except ValueError:
            raise _failed("is not a valid address") from None
        if parts.scheme.lower() != "https" or port not in (None, 443) or host not in self._hosts:
            raise ApiError(
                "The host of a picture's address is not allowed on this server. Send the picture as a data URL.",
                code="remote_host_not_allowed",
            )
        return host, (parts.path or "/") + (f"?{parts.query}" if parts.query else "")


def public_address(host: str) -> str:
    """One address of a host, all of whose addresses are public.

    Raises:
        ApiError: the name does not resolve, or one of its addresses is not public.
    """
    try:
        found = {str(item[4][0]) for item in socket.getaddrinfo(host, 443, type=socket.SOCK_STREAM)}
    except OSError:
        raise _failed("has a host that is not known") from None
    for address in found:
        number = ipaddress.ip_address(address.partition("%")[0])
        mapped = getattr(number, "ipv4_mapped", None) or number
        if not mapped.is_global or mapped.is_multicast:
            raise _failed("leads to an address that is not public")
    return min(found)


def _read(reply: http.client.HTTPResponse, deadline: float) -> bytes:
    data = bytearray()
    while chunk := reply.read1(65536):
        data += chunk
        if len(data) > MOST_BYTES:
            raise _failed(f"gives more than {MOST_BYTES} bytes")
        if time.monotonic() > deadline:
            raise _failed(f"takes longer than {SECONDS:g} s")
    return bytes(data)


def _failed(what: str) -> ApiError:
    return ApiError(f"A picture's address {what}.", code="remote_image_failed")
