"""Fetch pictures from hosts that the server's owner allowed, and from no others. Off by default."""

from __future__ import annotations

from collections.abc import Collection

from mm_moslora.serve.api.api_errors import ApiError
from mm_moslora.utils.http_fetch import FetchError, FetchFault, Rules, fetch

MOST_BYTES = 10 * 2**20
SECONDS = 5.0
"""Seconds for the whole fetch, redirects included."""
REDIRECTS = 3


class RemotePictures:
    """Fetches pictures over https, only from public addresses of these host names."""

    def __init__(self, hosts: Collection[str]) -> None:
        names = frozenset(host.lower().rstrip(".") for host in hosts)
        self._rules = Rules(hosts=names, most=MOST_BYTES, seconds=SECONDS, redirects=REDIRECTS, public=True)

    def __call__(self, url: str) -> bytes:
        """Fetch the bytes at a URL.

        Raises:
            ApiError: the host is not allowed, does not answer in time, or sends too much.
        """
        try:
            return fetch(url, self._rules)
        except FetchError as error:
            if error.fault == FetchFault.NOT_ALLOWED:
                raise ApiError(
                    "The host of a picture's address is not allowed on this server. Send the picture as a data URL.",
                    code="remote_host_not_allowed",
                ) from None
            raise ApiError(f"A picture's address {error.what}.", code="remote_image_failed") from None
