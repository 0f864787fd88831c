"""Turn the bytes of a request into model inputs, within limits on memory and time.

Work that grows with a request (parsing, base64, pictures, tokens) runs in worker threads, so that the event loop stays
responsive. A request is refused as early as possible: by its length, by its commas and brackets while they arrive, by
its characters, by the headers of its pictures. Its memory counts until its answer ends.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import TypeVar

from starlette.requests import ClientDisconnect, Request

from mm_moslora.serve.api.api_errors import ApiError, busy, client_left
from mm_moslora.serve.api.chat_request import ChatRequest, chat_request, read_json
from mm_moslora.serve.api.http_server import Receive
from mm_moslora.serve.api.request_limits import Limits
from mm_moslora.serve.inference.prompt_preparation import Prepared, prepare, refuse_unfit
from mm_moslora.serve.inference.request_images import memory_of, picture_files
from mm_moslora.serve.inference.served_models import Models

_WORKERS = 2
"""Threads that parse, decode pictures and tokenise."""

_Result = TypeVar("_Result")


class Budget:
    """Bytes of memory that requests share. Only the event loop's thread may use it."""

    def __init__(self, most: int) -> None:
        self.most, self.used = most, 0
        self._turn, self._freed = asyncio.Lock(), asyncio.Event()

    def take(self, count: int) -> bool:
        """Reserve bytes if they are free."""
        if self.used + count > self.most:
            return False
        self.used += count
        return True

    def give(self, count: int) -> None:
        """Release bytes."""
        self.used -= count
        self._freed.set()

    async def wait(self, count: int, seconds: float) -> None:
        """Reserve bytes as soon as they are free; the longest waiting request is served first."""
        async with asyncio.timeout(seconds), self._turn:
            while not self.take(count):
                self._freed.clear()
                await self._freed.wait()


class Reservation:
    """The share of a budget that one request holds, released at the end of a `with` block."""

    def __init__(self, budget: Budget) -> None:
        self._budget, self._count = budget, 0

    def set(self, count: int) -> None:
        """Set the number of reserved bytes."""
        if count > self._count and not self._budget.take(count - self._count):
            raise busy("requests fill its memory")
        if count < self._count:
            self._budget.give(self._count - count)
        self._count = count

    def __enter__(self) -> Reservation:
        return self

    def __exit__(self, *_: object) -> None:
        self.set(0)


class Intake:
    """Reads and prepares the requests of one server."""

    def __init__(self, models: Models, limits: Limits) -> None:
        self._models, self._limits = models, limits
        self._workers = ThreadPoolExecutor(_WORKERS, thread_name_prefix="mm-moslora-prepare")
        self.bodies, self.pictures = Budget(limits.bodies_bytes), Budget(limits.pictures_bytes)

    def close(self) -> None:
        """Start no further work."""
        self._workers.shutdown(wait=False, cancel_futures=True)

    async def body(self, request: Request, reservation: Reservation) -> bytearray:
        """Read the body of a request, with limits on its content and time while it arrives; `Guard` limits its size."""
        if request.headers.get("content-encoding", "identity").lower() != "identity":
            raise ApiError("Compressed bodies are not accepted.", status=415, code="unsupported_encoding")
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":  # browsers send this type across origins only after a preflight request
            raise ApiError("Content-Type must be application/json.", status=415, code="unsupported_content_type")
        limits, body, items, escapes = self._limits, bytearray(), 0, 0
        try:
            async with asyncio.timeout(limits.body_seconds):
                async for chunk in request.stream():
                    reservation.set(len(body) + len(chunk))
                    body += chunk
                    items += chunk.count(b",") + chunk.count(b"[") + chunk.count(b"{")
                    escapes += chunk.count(b"\\")
                    if items > limits.json_items or escapes > limits.json_escapes:
                        raise ApiError(
                            f"The body holds more than {limits.json_items} commas and opening brackets, or more than "
                            f"{limits.json_escapes} backslashes; send a shorter conversation.",
                            code="invalid_json",
                        )
        except TimeoutError:
            raise ApiError(
                f"The body did not arrive within {limits.body_seconds:g} s.", status=408, code="body_too_slow"
            ) from None
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

    async def prepared(self, request: Request, chat: ChatRequest, reservation: Reservation) -> Prepared:
        """The tokens and pixels of a request."""
        limits, models, stop = self._limits, self._models, threading.Event()
        deadline = time.monotonic() + limits.prepare_seconds
        refuse_unfit(chat, models, limits)
        reading = self._workers.submit(picture_files, chat.pictures, limits, stop=stop)
        files = await self._in_worker(request, reading, stop, limits.prepare_seconds)
        memory = memory_of(files, limits, squares=models.pads_to_squares)
        reservation.set(sum(len(file.data) for file in files) + chat.characters)
        try:
            await self.pictures.wait(memory, deadline - time.monotonic())
        except TimeoutError:
            raise busy("pictures wait to be opened", seconds=2) from None
        loop = asyncio.get_running_loop()

        def release(_: object) -> None:
            with suppress(RuntimeError):  # the loop has closed
                loop.call_soon_threadsafe(self.pictures.give, memory)

        opening = self._workers.submit(prepare, chat, files, models, limits, stop=stop)
        opening.add_done_callback(release)  # the thread may still run for a moment after its result is abandoned
        result = await self._in_worker(request, opening, stop, deadline - time.monotonic())
        reservation.set(result.bytes)
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
