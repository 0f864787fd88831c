"""The server's routes: `/v1/chat/completions`, `/v1/models`, `/health`, `/metrics`."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route, Router

from mm_moslora.serve.api.api_errors import ApiError, busy, internal, stopping
from mm_moslora.serve.api.chat_replies import Reply, error_frame
from mm_moslora.serve.api.chat_request import ChatRequest
from mm_moslora.serve.api.http_server import App, Receive, Scope, Send
from mm_moslora.serve.api.prometheus_metrics import CONTENT_TYPE, Metrics
from mm_moslora.serve.api.request_guard import Guard
from mm_moslora.serve.api.request_intake import Held, Intake, client_left, left
from mm_moslora.serve.api.request_limits import Limits
from mm_moslora.serve.inference.continuous_batching import Engine, Job, Piece
from mm_moslora.serve.inference.prompt_preparation import Prepared, jobs_of
from mm_moslora.serve.inference.request_images import Fetch
from mm_moslora.utils.errors import suggestion


def create_app(
    engine: Engine, limits: Limits, *, key: str | None = None, local: bool = True, fetch: Fetch | None = None
) -> App:
    """The ASGI application around an engine, which it starts and stops.

    Args:
        engine: not started yet.
        limits: the server's.
        key: see `Guard`.
        local: see `Guard`.
        fetch: gives the bytes behind a picture's address; None: addresses are refused.
    """
    metrics = Metrics(engine)
    service = _Service(engine, limits, metrics, fetch)

    @asynccontextmanager
    async def lifespan(_: object) -> AsyncIterator[None]:
        engine.start()
        yield
        await asyncio.to_thread(engine.stop)
        service.intake.close()

    routes = [
        Route("/v1/chat/completions", service.chat, methods=["POST"]),
        Route("/v1/models", service.models, methods=["GET"]),
        Route("/v1/models/{name:path}", service.model, methods=["GET"]),
        Route("/health", service.health, methods=["GET"]),
        Route("/metrics", service.metrics_page, methods=["GET"]),
    ]
    app = Router(routes, lifespan=lifespan, redirect_slashes=False)
    return Guard(app, limits=limits, metrics=metrics, key=key, local=local)


class _Service:
    def __init__(self, engine: Engine, limits: Limits, metrics: Metrics, fetch: Fetch | None) -> None:
        self._engine, self._limits, self._metrics = engine, limits, metrics
        self.intake = Intake(engine.models, limits, fetch)
        metrics.watch(self.intake)
        self._created = int(time.time())
        self._busy = 0
        """Requests with a complete body and an unfinished answer."""

    async def health(self, _: Request) -> Response:
        alive = self._engine.alive
        body = {
            "status": "ok" if alive else "stopped",
            "running": self._engine.running,
            "waiting": self._engine.waiting,
        }
        return JSONResponse(body, status_code=200 if alive else 503)

    async def metrics_page(self, _: Request) -> Response:
        return Response(self._metrics.text(), media_type=CONTENT_TYPE)

    async def models(self, _: Request) -> Response:
        return JSONResponse(
            {"object": "list", "data": [self._described(name) for name in self._engine.models.variants]}
        )

    async def model(self, request: Request) -> Response:
        return JSONResponse(self._described(self._known(request.path_params["name"])))

    async def chat(self, request: Request) -> Response:
        self._refuse_if_busy()
        held = Held(self.intake.bodies)
        answer = None
        try:
            # A slow upload does not count towards the requests that wait for an answer.
            body = await self.intake.body(request, held)
            self._refuse_if_busy()
            self._busy += 1
            try:
                answer = await self._begun(request, body, held)
                return answer
            finally:
                self._busy -= answer is None
        finally:
            if answer is None:
                held.close()

    async def _begun(self, request: Request, body: bytearray, held: Held) -> _Answer:
        """The response to a body, returned once its first token exists."""
        wanted = await self.intake.parsed(request, body)
        self._known(wanted.model)
        self._metrics.images.inc(len(wanted.pictures))
        prepared = await self.intake.prepared(request, wanted, held)

        def done() -> None:
            self._busy -= 1
            held.close()

        answer = _Answer(self._engine, self._metrics, wanted.without_content(), prepared, self._limits, done, request)
        await answer.begin()
        return answer

    def _refuse_if_busy(self) -> None:
        if self._busy >= self._limits.queue + self._limits.batch:
            raise busy(f"{self._busy} requests are under way")

    def _described(self, name: str) -> dict[str, Any]:
        return {
            "id": name, "object": "model", "created": self._created, "owned_by": "mm_moslora",
            "root": self._engine.models.variants[name].source,
        }  # fmt: skip

    def _known(self, name: str) -> str:
        variants = self._engine.models.variants
        if name not in variants:
            shown = name if len(name) <= 80 else name[:80] + "…"
            raise ApiError(
                f"There is no model {shown!r} here.{suggestion(name[:80], variants)} GET /v1/models lists all.",
                status=404, code="model_not_found", param="model",
            )  # fmt: skip
        return name


class _Answer(Response):
    """Sends an answer, whole or as a stream, and cancels the jobs when the client disconnects."""

    def __init__(
        self,
        engine: Engine,
        metrics: Metrics,
        wanted: ChatRequest,
        prepared: Prepared,
        limits: Limits,
        done: Callable[[], None],
        request: Request,
    ) -> None:
        self._engine, self._metrics, self._wanted, self._limits = engine, metrics, wanted, limits
        self._done, self._request = done, request
        self._reply = Reply(request=wanted, prompt_tokens=len(prepared.input_ids))
        self._happened: asyncio.Queue[tuple[int, Piece]] = asyncio.Queue()
        loop = asyncio.get_running_loop()
        self._jobs: list[Job] = jobs_of(
            wanted, prepared, lambda *item: loop.call_soon_threadsafe(self._happened.put_nowait, item),
            seconds=limits.request_seconds,
        )  # fmt: skip
        self.background = None
        self.status_code = 200
        self._first: tuple[int, Piece] | None = None

    async def begin(self) -> None:
        """Queue the jobs and wait for the first piece, so that a failure still gets its own status."""
        self._engine.submit(self._jobs)
        leaving = asyncio.ensure_future(left(self._request.receive))
        first = asyncio.ensure_future(self._next())
        try:
            await asyncio.wait({leaving, first}, return_when=asyncio.FIRST_COMPLETED)
            if not first.done():
                raise client_left()
            self._first = first.result()
            self._metrics.first_token.observe(time.monotonic() - self._jobs[0].submitted)
        except BaseException:
            self._cancel()
            raise
        finally:
            leaving.cancel()
            first.cancel()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # type: ignore[override]
        """See ASGI."""
        work = asyncio.ensure_future(self._stream(send) if self._wanted.stream else self._whole(send))
        leaving = asyncio.ensure_future(left(receive))
        try:
            await asyncio.wait({leaving, work}, return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                await work
        finally:
            self._cancel()
            self._done()
            leaving.cancel()
            work.cancel()
            with suppress(BaseException):
                await work

    async def _pieces(self) -> AsyncIterator[tuple[int, Piece]]:
        assert self._first is not None, "begin() comes first"
        item = self._first
        while True:
            self._reply.add(*item)
            yield item
            if self._reply.finished:
                return
            item = await self._next()

    async def _next(self) -> tuple[int, Piece]:
        choice, piece = await self._happened.get()
        if piece.ending == "failed":
            raise internal(self._request.scope["mm_moslora_request"])
        if piece.ending == "late":
            raise busy("the queue was too long", seconds=5)
        if piece.ending == "cancelled":
            raise stopping()
        return choice, piece

    async def _whole(self, send: Send) -> None:
        async for _ in self._pieces():
            pass
        await JSONResponse(self._reply.whole())(self._request.scope, self._request.receive, send)  # type: ignore[arg-type]

    async def _stream(self, send: Send) -> None:
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-store")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        opened: set[int] = set()
        try:
            async for choice, piece in self._pieces():
                opening = b"" if choice in opened else self._reply.opening(choice)
                opened.add(choice)
                event = opening + self._reply.event(choice, piece)
                await send({"type": "http.response.body", "body": event, "more_body": True})
            closing = self._reply.closing()
        except ApiError as error:
            closing = error_frame(error.body())
        await send({"type": "http.response.body", "body": closing, "more_body": False})

    def _cancel(self) -> None:
        for job in self._jobs:
            job.cancelled = True
