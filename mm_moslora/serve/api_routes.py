"""The server's routes: `/v1/chat/completions`, `/v1/models`, `/health`."""

from __future__ import annotations

import asyncio
import json
import logging
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route, Router

from mm_moslora.data.boxes.box_forms import FoundBox
from mm_moslora.serve.api_errors import ApiError, busy, internal, stopping
from mm_moslora.serve.chat_request import ChatRequest
from mm_moslora.serve.continuous_batching import AnswerPart, Ending, GenerationEngine, GenerationJob
from mm_moslora.serve.http_server import App, Receive, Scope, Send
from mm_moslora.serve.prompt_preparation import Prepared
from mm_moslora.serve.request_guard import Guard
from mm_moslora.serve.request_intake import Intake, unless_left
from mm_moslora.serve.request_limits import Limits
from mm_moslora.serve.text_stream import ThinkingSplit
from mm_moslora.utils.errors import suggestion

DONE = b"data: [DONE]\n\n"
"""The last event of a stream."""


@dataclass(kw_only=True)
class _Choice:
    """One answer so far."""

    text: str = ""
    thoughts: str = ""
    tokens: int = 0
    ending: Ending | None = None
    opened: bool = False
    split: ThinkingSplit = field(default_factory=ThinkingSplit)


@dataclass(kw_only=True)
class Reply:
    """The answers to one request while they are generated."""

    request: ChatRequest
    prompt_tokens: int
    boxes: Callable[[str], list[FoundBox]] = lambda _: []
    """Reads the boxes of an answer."""
    id: str = field(default_factory=lambda: f"chatcmpl-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        self._choices = [_Choice() for _ in range(self.request.choices)]

    @property
    def finished(self) -> bool:
        """Whether every answer has ended."""
        return all(choice.ending for choice in self._choices)

    def add(self, index: int, part: AnswerPart) -> bytes:
        """Record an event of one answer; returns its events where the request asks for a stream."""
        choice = self._choices[index]
        thinking, text = choice.split.add(part.text, last=part.ending is not None)
        choice.thoughts += thinking
        choice.text += text
        choice.tokens, choice.ending = part.tokens, part.ending
        if not self.request.stream:
            return b""
        deltas: list[dict[str, Any]] = [] if choice.opened else [{"role": "assistant", "content": ""}]
        choice.opened = True
        deltas += [{key: new} for key, new in (("reasoning_content", thinking), ("content", text)) if new]
        events = b"".join(self._event(index, delta) for delta in deltas)
        return events + (self._event(index, {}, part.ending) if part.ending else b"")

    def whole(self) -> dict[str, Any]:
        """The reply to a request without streaming."""
        choices = [
            {
                "index": index,
                "message": {"role": "assistant", "refusal": None, "content": choice.text}
                | ({"reasoning_content": choice.thoughts} if choice.thoughts else {})
                | ({"boxes": [asdict(box) for box in boxes]} if (boxes := self.boxes(choice.text)) else {}),
                "finish_reason": choice.ending, "logprobs": None,
            }
            for index, choice in enumerate(self._choices)
        ]  # fmt: skip
        return self._object("chat.completion", choices) | {"usage": self._usage()}

    def closing(self) -> bytes:
        """The events after the last piece."""
        if not self.request.include_usage:
            return DONE
        return frame(self._object("chat.completion.chunk", []) | {"usage": self._usage()}) + DONE

    def _event(self, index: int, delta: dict[str, Any], ending: str | None = None) -> bytes:
        choice = {"index": index, "delta": delta, "finish_reason": ending, "logprobs": None}
        return frame(self._object("chat.completion.chunk", [choice]))

    def _object(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.id, "object": kind, "created": self.created, "model": self.request.model, "choices": choices,
        }  # fmt: skip

    def _usage(self) -> dict[str, int]:
        completion, prompt = sum(choice.tokens for choice in self._choices), self.prompt_tokens
        return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def frame(value: dict[str, Any]) -> bytes:
    """One event of a stream."""
    return b"data: " + json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


logger = logging.getLogger(__name__)

_NOTED = 64
"""Names of fields that the log tells."""


def create_app(engine: GenerationEngine, limits: Limits, *, key: str | None = None, local: bool = True) -> App:
    """The ASGI application around an engine, which it starts and stops."""
    intake, created = Intake(engine.models, limits), int(time.time())

    @asynccontextmanager
    async def lifespan(_: object) -> AsyncIterator[None]:
        engine.start()
        yield
        await asyncio.to_thread(engine.stop)
        intake.close()

    def described(name: str) -> dict[str, Any]:
        source = engine.models.variants[name].source
        about = {"id": name, "object": "model", "created": created, "owned_by": "mm_moslora", "root": source}
        digest = engine.models.preprocessing
        return about | ({"preprocessing": digest} if digest else {})

    async def health(_: Request) -> Response:
        alive = engine.alive
        body = {"status": "ok" if alive else "stopped", "running": engine.running, "waiting": engine.waiting}
        return JSONResponse(body, status_code=200 if alive else 503)

    async def all_models(_: Request) -> Response:
        return JSONResponse({"object": "list", "data": [described(name) for name in engine.models.variants]})

    async def one_model(request: Request) -> Response:
        return JSONResponse(described(_checked_name(engine, request.path_params["name"])))

    routes = [
        Route("/v1/chat/completions", _Chat(engine, limits, intake), methods=["POST"]),
        Route("/v1/models", all_models),
        Route("/v1/models/{name:path}", one_model),
        Route("/health", health),
    ]
    app = Router(routes, lifespan=lifespan, redirect_slashes=False)
    return Guard(app, limits=limits, logged=True, key=key, local=local)


def _checked_name(engine: GenerationEngine, name: str) -> str:
    if name not in engine.models.variants:
        shown = name if len(name) <= 80 else name[:80] + "…"
        raise ApiError(
            f"There is no model {shown!r} here.{suggestion(name[:80], engine.models.variants)} GET /v1/models lists "
            "all.",
            status=404, code="model_not_found", param="model",
        )  # fmt: skip
    return name


class _Chat:
    """The ASGI application of `/v1/chat/completions`; what a request holds is released when its answer is sent."""

    def __init__(self, engine: GenerationEngine, limits: Limits, intake: Intake) -> None:
        self._engine, self._limits, self._intake = engine, limits, intake
        self._busy = 0
        """Requests with a complete body and an unfinished answer."""
        self._noted: set[str] = set()
        """Fields that are not read, of which the log has a line."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        self._refuse_if_busy()
        with self._intake.memory.share() as hold:
            # A slow upload does not count towards the requests that wait for an answer.
            body = await self._intake.body(request, hold)
            self._refuse_if_busy()
            self._busy += 1
            try:
                chat = await self._intake.parsed(request, body)
                _checked_name(self._engine, chat.model)
                self._note(chat.unread)
                prepared = await self._intake.prepared(request, chat, hold)
                chat = replace(chat, messages=())
                reply = Reply(request=chat, prompt_tokens=len(prepared.input_ids), boxes=prepared.boxes)
                last = await unless_left(receive, self._answer(request, prepared, reply, send))
                if chat.stream:
                    await send({"type": "http.response.body", "body": last, "more_body": False})
                else:
                    await JSONResponse(await asyncio.to_thread(reply.whole))(scope, receive, send)
            finally:
                self._busy -= 1

    def _refuse_if_busy(self) -> None:
        if self._busy >= self._limits.queue + self._limits.batch:
            raise busy(f"{self._busy} requests are under way")

    def _note(self, unread: Sequence[str]) -> None:
        if new := sorted({*unread} - self._noted)[: _NOTED - len(self._noted)]:
            self._noted.update(new)
            logger.warning("Requests have fields that are not read: %s.", ", ".join(new))

    async def _answer(self, request: Request, prepared: Prepared, reply: Reply, send: Send) -> bytes:
        """Generate an answer and send all but its end, which is returned; a cancelled call cancels its jobs."""
        events: asyncio.Queue[tuple[int, AnswerPart]] = asyncio.Queue()
        loop, chat = asyncio.get_running_loop(), reply.request

        def deliver(choice: int, part: AnswerPart) -> None:
            loop.call_soon_threadsafe(events.put_nowait, (choice, part))

        jobs = [
            GenerationJob(
                model=chat.model, input_ids=prepared.input_ids, images=prepared.images, sampling=chat.sampling,
                stop=chat.stop, thinking=chat.thinking, choice=choice, deliver=partial(deliver, choice),
                deadline=time.monotonic() + self._limits.request_seconds,
            )
            for choice in range(chat.choices)
        ]  # fmt: skip
        started = False
        self._engine.submit(jobs)
        try:
            while not reply.finished:
                chunk = reply.add(*_checked(await events.get(), request))
                if chat.stream:
                    if not started:  # until then a failure gets its own status
                        headers = [(b"content-type", b"text/event-stream"), (b"cache-control", b"no-store")]
                        await send({"type": "http.response.start", "status": 200, "headers": headers})
                    await send({"type": "http.response.body", "body": chunk, "more_body": True})
                started = True
        except ApiError as error:
            if not (started and chat.stream):
                raise
            return frame(error.body()) + DONE
        finally:
            for job in jobs:
                job.cancelled = True
        return reply.closing()


def _checked(item: tuple[int, AnswerPart], request: Request) -> tuple[int, AnswerPart]:
    """An event of an answer, unless it is a failure."""
    ending = item[1].ending
    if ending == "failed":
        raise internal(request.scope["mm_moslora_request"])
    if ending == "late":
        raise busy("the queue was too long", seconds=5)
    if ending == "cancelled":
        raise stopping()
    return item
