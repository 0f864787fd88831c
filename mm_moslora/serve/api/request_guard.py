"""Middleware before every route: checks the Host header and the key, drops slow readers, formats errors."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import time
import uuid
from collections.abc import MutableMapping
from typing import Any

from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from mm_moslora.serve.api.api_errors import ApiError, internal
from mm_moslora.serve.api.http_server import App, Receive, Scope, Send, names_this_machine
from mm_moslora.serve.api.prometheus_metrics import Metrics
from mm_moslora.serve.api.request_limits import Limits
from mm_moslora.utils.redaction import redacted_traceback

logger = logging.getLogger(__name__)

OPEN_ROUTES = frozenset({"/health"})
"""Routes that need no key, since load balancers send none."""
KNOWN_ROUTES = frozenset({"/health", "/metrics", "/v1/models", "/v1/chat/completions"})


class SlowReaderError(Exception):
    """The client does not read its response."""


class Guard:
    """ASGI middleware around all routes.

    Args:
        app: the routes.
        limits: the server's.
        metrics: counts every request.
        key: the expected token of `Authorization: Bearer`; None: no key.
        local: accept only this machine's names as Host, so that no web page reaches the server by making its own host
            name resolve to this machine.
    """

    def __init__(self, app: App, *, limits: Limits, metrics: Metrics, key: str | None, local: bool) -> None:
        self._app, self._limits, self._metrics, self._local = app, limits, metrics, local
        self._key = None if key is None else hashlib.sha256(key.encode()).digest()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, status = time.monotonic(), 0
        request_id = f"req-{uuid.uuid4().hex[:16]}"
        scope["mm_moslora_request"] = request_id
        scope["app"] = self._app  # makes the router raise where it would answer in plain text

        async def watched(message: MutableMapping[str, Any]) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = int(message["status"])
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", request_id.encode())]
            try:
                await asyncio.wait_for(send(message), self._limits.write_seconds)
            except TimeoutError:
                raise SlowReaderError from None

        try:
            self._check(scope)
            await self._app(scope, receive, watched)
        except SlowReaderError:
            logger.warning("%s: the client stopped reading; dropped.", request_id)
            raise
        except ApiError as error:
            await self._refuse(error, scope, receive, watched, started=status != 0)
        except HTTPException as error:
            await self._refuse(_no_route(error.status_code), scope, receive, watched, started=status != 0)
        except Exception as error:
            logger.error("%s failed: %s", request_id, redacted_traceback(error))
            await self._refuse(internal(request_id), scope, receive, watched, started=status != 0)
        finally:
            self._count(scope, status, time.monotonic() - started, request_id)

    def _check(self, scope: Scope) -> None:
        headers = {bytes(name): bytes(value) for name, value in scope["headers"]}
        if self._local and not names_this_machine(scope):
            raise ApiError("The Host header is not a name of this server.", status=403, code="bad_host")
        if self._key is None or scope["path"] in OPEN_ROUTES:
            return
        scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
        # Digests are compared, so that the duration reveals nothing about the key, not even its length.
        same = hmac.compare_digest(hashlib.sha256(given.strip()).digest(), self._key)
        if scheme.lower() != b"bearer" or not same:
            raise ApiError(
                "A key is required: send the header `Authorization: Bearer KEY`.", status=401, code="invalid_api_key"
            )

    async def _refuse(self, error: ApiError, scope: Scope, receive: Receive, send: Send, *, started: bool) -> None:
        self._metrics.refused.labels(code=error.code).inc()
        if started:  # the status line is already sent
            return
        # Unread bytes of a body would be parsed as the next request.
        headers = {**error.headers(), "Connection": "close"} if error.status in (408, 413) else error.headers()
        await JSONResponse(error.body(), status_code=error.status, headers=headers)(scope, receive, send)  # type: ignore[arg-type]

    def _count(self, scope: Scope, status: int, seconds: float, request_id: str) -> None:
        route = scope["path"] if scope["path"] in KNOWN_ROUTES else "other"
        self._metrics.requests.labels(route=route, status=str(status or 499)).inc()
        self._metrics.request_seconds.labels(route=route).observe(seconds)
        # The query is left out, since it may hold a key.
        logger.info("%s %s %s %s %.3f s", request_id, scope["method"], repr(scope["path"][:80]), status or 499, seconds)


def _no_route(status: int) -> ApiError:
    what = "does not support this method" if status == 405 else "is not known to this server"
    return ApiError(f"This address {what}. It serves POST /v1/chat/completions.", status=status, code="not_found")
