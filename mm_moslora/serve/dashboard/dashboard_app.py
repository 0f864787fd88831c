"""Routes of the dashboard. It listens on this machine alone and only reads files."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Mount, Route, Router
from starlette.staticfiles import StaticFiles

from mm_moslora.reporting.inline_images import thumbnail
from mm_moslora.serve.api.http_server import App, Server, bound
from mm_moslora.serve.api.request_guard import Guard
from mm_moslora.serve.api.request_limits import Limits
from mm_moslora.serve.dashboard.dashboard_runs import Folder
from mm_moslora.utils.text_format import visible

LOOK_SECONDS = 1.0
"""Seconds between two scans of the folder while a page is open."""
_LIMITS = Limits(drain_seconds=3 * LOOK_SECONDS, body_bytes=2**16)
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_STATIC = Path(__file__).with_name("static")


def serve_board(folder: Path, *, port: int) -> None:
    """Serve the dashboard of a folder until a signal comes; port 0 chooses a free one."""
    app = create_board(folder, stopping=lambda: server.should_exit)
    server = Server(app, _LIMITS)
    server.run(bound("127.0.0.1", port))


def create_board(folder: Path, *, stopping: Callable[[], bool] = lambda: False) -> App:
    """The ASGI application; open event streams end when `stopping` says that the server is about to end.

    Raises:
        ConfigError: there is no such folder.
    """
    board = _Board(Folder(folder), stopping)
    routes = [
        Route("/", lambda _: FileResponse(_STATIC / "board.html")),
        Mount("/static", StaticFiles(directory=_STATIC)),
        Route("/api/runs", board.runs),
        Route("/api/run", board.run),
        Route("/api/picture", board.picture),
        Route("/events", board.events),
    ]
    headers = {"content-security-policy": _POLICY, "x-content-type-options": "nosniff", "cache-control": "no-cache"}
    return Guard(Router(routes, redirect_slashes=False), limits=_LIMITS, headers=headers)


class _Board:
    def __init__(self, folder: Folder, stopping: Callable[[], bool]) -> None:
        self._folder, self._stopping = folder, stopping

    async def runs(self, _: Request) -> Response:
        return JSONResponse(await asyncio.to_thread(self._rows))

    def _rows(self) -> dict[str, Any]:
        return {"folder": visible(self._folder.root.name), "runs": self._folder.rows()}

    async def run(self, request: Request) -> Response:
        """`?id=NAME`."""
        detail = await asyncio.to_thread(self._folder.detail, request.query_params.get("id", ""))
        if detail is None:
            return JSONResponse({"error": "There is no such run."}, status_code=404)
        return JSONResponse({key: value for key, value in detail.items() if key != "pictures"})

    async def picture(self, request: Request) -> Response:
        """`?id=NAME&number=N`: the thumbnail of a sample's picture. The client never sends a path."""
        image = await asyncio.to_thread(self._thumbnail, request.query_params)
        return PlainTextResponse("no picture", status_code=404) if image is None else image

    def _thumbnail(self, query: Any) -> Response | None:
        name, number = query.get("id", ""), query.get("number", "")
        detail, path = self._folder.detail(name), self._folder.path(name)
        if detail is None or path is None or not (number.isascii() and number.isdigit() and len(number) < 7):
            return None
        pictures = detail.get("pictures", [])
        if int(number) >= len(pictures) or not pictures[int(number)]:
            return None
        url = thumbnail(path, pictures[int(number)])
        if url is None:
            return None
        kind, _, data = url.removeprefix("data:").partition(";base64,")
        return Response(base64.b64decode(data), media_type=kind, headers={"Cache-Control": "max-age=60"})

    async def events(self, request: Request) -> Response:
        """Server-sent events: all rows, whenever one of them has changed."""

        async def watch() -> AsyncIterator[str]:
            before = ""
            quiet = 0.0
            while not self._stopping() and not await request.is_disconnected():
                text = json.dumps(await asyncio.to_thread(self._rows))
                if text != before:
                    before, quiet = text, 0.0
                    yield f"event: runs\ndata: {text}\n\n"
                elif quiet > 15:  # proxies and browsers close silent connections
                    quiet = 0.0
                    yield ": still here\n\n"
                await asyncio.sleep(LOOK_SECONDS)
                quiet += LOOK_SECONDS

        return StreamingResponse(watch(), media_type="text/event-stream", headers={"Cache-Control": "no-store"})
