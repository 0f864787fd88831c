"""Turn the bytes of a request into model inputs, within limits on memory and time.

Work that grows with a request (parsing, base64, pictures, tokens) runs in worker threads, so that the event loop stays
responsive. A request is refused as early as possible: by its length, by its commas and brackets, by its characters, by
the headers of its pictures. Its memory counts until its answer ends.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

from starlette.requests import ClientDisconnect, Request

from mm_moslora.serve.api_errors import ApiError, busy, client_left
from mm_moslora.serve.chat_request import ChatRequest, chat_request, read_json
from mm_moslora.serve.http_server import Receive
from mm_moslora.serve.prompt_preparation import Prepared, picture_files, prepare, refuse_large, refuse_unfit
from mm_moslora.serve.request_limits import Limits
from mm_moslora.serve.served_models import Models

_WORKERS = 2
"""Threads that parse, decode pictures and tokenise."""

_Result = TypeVar("_Result")


class RequestMemory:
    """Bytes that requests hold. Only the event loop's thread may use it."""

    def __init__(self, most: int) -> None:
        self.most, self.used = most, 0

    @contextmanager
    def share(self) -> Iterator[Callable[[int], None]]:
        """A function that sets the bytes of one request, which are released at the end of the block."""
        held = 0

        def hold(count: int) -> None:
            nonlocal held
            if self.used - held + count > self.most:
                raise busy("requests fill its memory")
            self.used += count - held
            held = count

        try:
            yield hold
        finally:
            self.used -= held


class Intake:
    """Reads and prepares the requests of one server."""

    def __init__(self, models: Models, limits: Limits) -> None:
        self._models, self._limits = models, limits
        self._workers = ThreadPoolExecutor(_WORKERS, thread_name_prefix="mm-moslora-prepare")
        self.memory = RequestMemory(limits.bodies_bytes)

    def close(self) -> None:
        """Start no further work."""
        self._workers.shutdown(wait=False, cancel_futures=True)

    async def body(self, request: Request, hold: Callable[[int], None]) -> bytearray:
        """Read the body of a request, with limits on all bodies and its time; `Guard` limits its size."""
        if request.headers.get("content-encoding", "identity").lower() != "identity":
            raise ApiError("Compressed bodies are not accepted.", status=415, code="unsupported_encoding")
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":  # browsers send this type across origins only after a preflight request
            raise ApiError("Content-Type must be application/json.", status=415, code="unsupported_content_type")
        body, seconds = bytearray(), self._limits.body_seconds
        try:
            async with asyncio.timeout(seconds):
                async for chunk in request.stream():
                    hold(len(body) + len(chunk))
                    body += chunk
        except TimeoutError:
            raise ApiError(f"The body did not arrive within {seconds:g} s.", status=408, code="body_too_slow") from None
        except ClientDisconnect:
            raise client_left() from None
        return body

    async def parsed(self, request: Request, body: bytearray) -> ChatRequest:
        """The checked request of a body, which is emptied."""
        limits = self._limits
        work = self._workers.submit(lambda: chat_request(read_json(body, limits), limits))
        parsed = await self._in_worker(request, work, threading.Event(), limits.prepare_seconds)
        body.clear()
        return parsed

    async def prepared(self, request: Request, chat: ChatRequest, hold: Callable[[int], None]) -> Prepared:
        """The tokens and pixels of a request."""
        limits, models, stop = self._limits, self._models, threading.Event()
        deadline = time.monotonic() + limits.prepare_seconds
        refuse_unfit(chat, models, limits)
        reading = self._workers.submit(picture_files, chat.pictures, limits, stop=stop)
        files = await self._in_worker(request, reading, stop, limits.prepare_seconds)
        refuse_large(files, limits, squares=models.pads_to_squares)
        hold(sum(len(file.data) for file in files) + chat.characters)
        opening = self._workers.submit(prepare, chat, files, models, limits, stop=stop)
        result = await self._in_worker(request, opening, stop, deadline - time.monotonic())
        hold(result.bytes)
        return result

    async def _in_worker(
        self, request: Request, work: Future[_Result], stop: threading.Event, seconds: float
    ) -> _Result:
        """The result of a task that is stopped at its deadline or when the client leaves."""
        try:
            return await unless_left(request.receive, asyncio.wrap_future(work), seconds=seconds)
        except TimeoutError:
            raise busy("requests wait to be read", seconds=2) from None
        finally:
            if not work.done() or work.cancelled():
                stop.set()


async def unless_left(receive: Receive, work: Awaitable[_Result], *, seconds: float | None = None) -> _Result:
    """The result of `work`, which is cancelled when the client leaves."""

    async def client_leaves() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    task, leaving = asyncio.ensure_future(work), asyncio.ensure_future(client_leaves())
    try:
        await asyncio.wait((task, leaving), timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise client_left() if leaving.done() else TimeoutError
    finally:
        for future in (task, leaving):
            future.cancel()
        await asyncio.gather(task, leaving, return_exceptions=True)
