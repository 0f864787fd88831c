"""The middleware of every web application here: Host, Origin, key, size of the body, slow readers, form of errors."""

from __future__ import annotations

import asyncio
import hmac
import logging
import os
import re
import time
import uuid
from collections.abc import MutableMapping
from contextlib import suppress
from typing import Any

from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from mm_moslora.serve.api_errors import ApiError, internal, stopping
from mm_moslora.serve.http_server import App, Receive, Scope, Send, is_loopback
from mm_moslora.serve.request_limits import Limits
from mm_moslora.utils.errors import ConfigError
from mm_moslora.utils.identity import sha256_of_bytes, sha256_of_text
from mm_moslora.utils.redaction import redacted_traceback

logger = logging.getLogger(__name__)

LINGER_SECONDS = 2.0
"""Seconds in which the rest of a refused body is read and dropped. Closing a connection with unread bytes resets it,
and the client may lose the reply."""
KEY_NAME = "MM_MOSLORA_SERVE_KEY"
"""Environment variable with the key. No option holds the key, since command lines are logged and listed."""
SHORTEST_KEY = 16
_HOST = re.compile(rb"(?:([A-Za-z0-9.-]+)|\[([0-9A-Fa-f.]*:[0-9A-Fa-f:.]*)\])(?::[0-9]{1,5})?")
_ORIGIN = re.compile(rb"https?://" + _HOST.pattern)


class SlowReaderError(Exception):
    """The client does not read its response."""


class Guard:
    """ASGI middleware around all routes; `key`: of `Authorization: Bearer`, `local`: only this machine's names."""

    def __init__(
        self, app: App, *, limits: Limits, logged: bool = False, key: str | None = None, local: bool = True
    ) -> None:
        self._app, self._limits, self._logged, self._local = app, limits, logged, local
        self._key = None if key is None else sha256_of_text(key)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":  # no application here has WebSockets
            await send({"type": "websocket.close", "code": 1008})
            return
        started, status, size = time.monotonic(), 0, 0
        request_id = f"req-{uuid.uuid4().hex[:16]}"
        scope["mm_moslora_request"] = request_id
        scope.setdefault("app", self._app)  # makes the router raise where it would answer in plain text

        async def watched(message: MutableMapping[str, Any]) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = int(message["status"])
                own = (b"x-request-id", request_id.encode())
                message["headers"] = [*message.get("headers", ()), own]
            try:
                async with asyncio.timeout(self._limits.write_seconds):
                    await send(message)
            except TimeoutError:
                raise SlowReaderError from None

        async def counted() -> MutableMapping[str, Any]:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > self._limits.body_bytes:
                raise self._too_large()
            return message

        try:
            self._check(scope)
            await self._app(scope, counted, watched)
        except SlowReaderError:
            logger.warning("%s: the client stopped reading; dropped.", request_id)
            raise
        except (Exception, asyncio.CancelledError) as error:
            refusal = _refusal(error, request_id)
            if status == 0:  # else the status line is already sent
                await self._refuse(refusal, scope, receive, watched)
        finally:
            if self._logged:  # the query is left out, since it may hold a key
                seconds, path = time.monotonic() - started, repr(scope["path"][:80])
                logger.info("%s %s %s %s %.3f s", request_id, scope["method"], path, status or 499, seconds)

    def _check(self, scope: Scope) -> None:
        headers = {bytes(name): bytes(value) for name, value in scope["headers"]}
        # A web page can make its own host name resolve to this machine.
        if self._local and not _is_of_this_machine(_HOST.fullmatch(headers.get(b"host", b""))):
            raise ApiError("The Host header is not a name of this server.", status=403, code="bad_host")
        if self._local and not _is_of_this_machine(_ORIGIN.fullmatch(headers.get(b"origin", b"http://localhost"))):
            raise ApiError("A page of another server may not use this one.", status=403, code="bad_origin")
        if int(headers.get(b"content-length", b"0")) > self._limits.body_bytes:
            raise self._too_large()
        if self._key is None or scope["path"] == "/health":  # load balancers send no key
            return
        scheme, _, token = headers.get(b"authorization", b"").partition(b" ")
        # Digests are compared, so that the duration reveals nothing about the key, not even its length.
        same = hmac.compare_digest(sha256_of_bytes(token.strip()), self._key)
        if scheme.lower() != b"bearer" or not same:
            raise ApiError(
                "A key is required: send the header `Authorization: Bearer KEY`.", status=401, code="invalid_api_key"
            )

    def _too_large(self) -> ApiError:
        return ApiError(f"The body is larger than {self._limits.body_bytes} bytes.", status=413, code="body_too_large")

    async def _refuse(self, error: ApiError, scope: Scope, receive: Receive, send: Send) -> None:
        if error.status in (408, 413) and not any(name == b"expect" for name, _ in scope["headers"]):
            with suppress(TimeoutError):
                async with asyncio.timeout(LINGER_SECONDS):
                    while (await receive()).get("more_body"):
                        pass
        # Unread bytes of a body would be parsed as the next request.
        headers = {**error.headers(), "Connection": "close"} if error.status in (408, 413) else error.headers()
        await JSONResponse(error.body(), status_code=error.status, headers=headers)(scope, receive, send)  # type: ignore[arg-type]


def _refusal(error: BaseException, request_id: str) -> ApiError:
    """What the client gets for an error."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, asyncio.CancelledError):  # the time in which answers may end is over
        return stopping()
    if isinstance(error, HTTPException):
        what = "does not support this method" if error.status_code == 405 else "is not known to this server"
        return ApiError(f"This address {what}.", status=error.status_code, code="not_found")
    logger.error("%s failed: %s", request_id, redacted_traceback(error))
    return internal(request_id)


def read_key() -> str | None:
    """The key from the environment."""
    key = os.environ.get(KEY_NAME) or None
    if key is not None and (len(key) < SHORTEST_KEY or not key.isascii() or key != key.strip()):
        raise ConfigError(f"{KEY_NAME} must hold at least {SHORTEST_KEY} ASCII characters without spaces around them.")
    return key


def _is_of_this_machine(match: re.Match[bytes] | None) -> bool:
    """Whether the host of a matched address is `localhost` or any loopback address, such as 127.0.0.2."""
    return match is not None and is_loopback((match[1] or match[2]).decode("ascii").lower())
