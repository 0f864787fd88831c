"""OpenAI-compatible endpoints: a client with retries, and a model behind the runner's `Model` protocol.

Standard library only. The key is read from the environment and never written.
"""

from __future__ import annotations

import base64
import http.client
import io
import json
import math
import os
import queue
import random
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from mm_moslora.utils.errors import EvalError
from mm_moslora.utils.redaction import redact_text
from mm_moslora.utils.untrusted_data import parse_json
from mm_moslora_eval.protocol.model_interface import Answer, Message, OptionRequest, OptionScore, Request
from mm_moslora_eval.sources.document import ImageLike, StoredImage, digest

KEY_NAMES = ("MM_MOSLORA_API_KEY", "OPENAI_API_KEY")
"""Environment variables for the key, in order of priority."""

TIMEOUT, ATTEMPTS = 300.0, 6
"""Default patience with a request: seconds for one attempt, and attempts."""
_MOST_WAIT = 60.0
_MOST_REPLY_BYTES = 2**26
_HOPELESS_ROW = 4
"""Nothing more is asked after this many failures without a success between them."""
_PASSING = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})
_HOPELESS = frozenset({401, 403, 404, 405})
_FIRST_BYTES = {b"\x89PNG": "png", b"\xff\xd8": "jpeg", b"GIF8": "gif", b"RIFF": "webp", b"BM": "bmp"}

_T = TypeVar("_T")


@dataclass
class Usage:
    """Counts of an endpoint's calls and tokens; thread-safe."""

    calls: int = 0
    retries: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def add(self, reply: dict[str, Any], *, retries: int) -> None:
        """Count one call."""
        with self._lock:
            self.calls += 1
            self.retries += retries
            self.prompt_tokens += tokens_of(reply, "prompt_tokens")
            self.completion_tokens += tokens_of(reply, "completion_tokens")

    def to_dict(self) -> dict[str, int]:
        """The counts."""
        names = ("calls", "retries", "prompt_tokens", "completion_tokens")
        return {name: getattr(self, name) for name in names}


def tokens_of(reply: dict[str, Any], name: str) -> int:
    """A count of a reply's `usage`; 0 if the server does not report it."""
    used = reply.get("usage")
    count = used.get(name) if isinstance(used, dict) else None
    return count if isinstance(count, int) else 0


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """An OpenAI-compatible server and the name of its model."""

    url: str
    """Up to and including `/v1`."""
    model: str
    timeout: float = TIMEOUT
    """Seconds for one attempt."""
    attempts: int = ATTEMPTS
    first_wait: float = 1.0
    """Seconds before the second attempt, doubled for each further one, up to a minute. `Retry-After` takes priority."""
    usage: Usage = field(default_factory=Usage, compare=False)

    def __post_init__(self) -> None:
        if not (0 < self.timeout < math.inf and self.attempts >= 1):
            raise EvalError(
                f"timeout is {self.timeout} and attempts {self.attempts}; expected seconds above 0, and 1 or more."
            )

    @classmethod
    def parse(cls, text: str, *, timeout: float = TIMEOUT, attempts: int = ATTEMPTS) -> Endpoint:
        """Read `URL#MODEL`.

        Raises:
            EvalError: no URL, no model, or a key within the URL.
        """
        url, separator, model = text.partition("#")
        if not url.startswith(("http://", "https://")) or not separator or not model:
            raise EvalError(
                f"{redact_text(text)!r} names no endpoint; expected URL#MODEL, such as http://127.0.0.1:8000/v1#my-model."
            )
        if "@" in url.split("//", 1)[1].split("/", 1)[0]:
            raise EvalError(f"An endpoint's URL holds no password; put the key into {KEY_NAMES[0]} instead.")
        return cls(url=url.rstrip("/"), model=model, timeout=timeout, attempts=attempts)

    def chat(self, payload: dict[str, Any]) -> dict[str, Any]:
        """One chat completion; waits and tries again where that can help.

        Raises:
            EvalError: the server refuses the key, the model or the address, or no server answers. The latter is raised
                at once if the server has not answered before, else after all attempts.
            ServerError: the server was at fault in every attempt.
            RuntimeError: this request failed.
        """
        body = json.dumps({"model": self.model, **payload}).encode()
        wait = self.first_wait
        for attempt in range(self.attempts):
            try:
                reply = self._post(body)
            except _TryAgainError as error:
                last = attempt + 1 == self.attempts
                if error.unreachable and (last or not self.usage.calls):
                    raise EvalError(
                        f"No server answers at {self.url} ({error}). Start it, or check the address."
                    ) from error
                if last:
                    raise ServerError(f"{self.url}: {error} after {self.attempts} attempts") from error
                # Jitter spreads the retries of parallel requests.
                time.sleep(min(_MOST_WAIT, error.wait if error.wait is not None else wait * random.uniform(0.75, 1.25)))
                wait *= 2
            else:
                self.usage.add(reply, retries=attempt)
                return reply
        raise AssertionError("unreachable")

    def _post(self, body: bytes) -> dict[str, Any]:
        key = next((value for name in KEY_NAMES if (value := os.environ.get(name))), None)
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        request = urllib.request.Request(f"{self.url}/chat/completions", data=body, headers=headers)  # noqa: S310
        try:
            with _OPENER.open(request, timeout=self.timeout) as response:
                reply = parse_json(self._body(response))
        except urllib.error.HTTPError as error:
            text = redact_text(error.read(2000).decode("utf-8", "replace")).strip()
            if error.code in _PASSING:
                raise _TryAgainError(
                    f"HTTP {error.code}: {text}", wait=_retry_after(error.headers.get("Retry-After"))
                ) from error
            if error.code in _HOPELESS:
                raise EvalError(
                    f"{self.url} answered HTTP {error.code}: {text}. Check the address, the model {self.model!r} and "
                    f"the key in {' or '.join(KEY_NAMES)}."
                ) from error
            raise RuntimeError(f"{self.url} answered HTTP {error.code}: {text}") from error
        except (OSError, http.client.HTTPException) as error:  # no connection, or an incomplete reply
            reason = getattr(error, "reason", error)
            unreachable = isinstance(reason, ConnectionRefusedError | socket.gaierror)
            raise _TryAgainError(str(reason) or type(error).__name__, unreachable=unreachable) from error
        except ValueError as error:  # no JSON, or no UTF-8
            raise _TryAgainError(f"the reply {error}") from error
        if not _has_message(reply):
            raise RuntimeError(f"{self.url} answered without a message: {redact_text(json.dumps(reply))[:500]}")
        return reply  # type: ignore[no-any-return]

    def _body(self, response: http.client.HTTPResponse) -> bytes:
        """The body of a reply. The socket's own timeout starts again with every byte that arrives."""
        ends, body = time.monotonic() + self.timeout, bytearray()
        while data := response.read1(2**16):
            body += data
            if len(body) > _MOST_REPLY_BYTES:
                raise RuntimeError(f"{self.url} sent a reply of more than {_MOST_REPLY_BYTES} bytes")
            if time.monotonic() > ends:
                raise TimeoutError(f"no whole reply within {self.timeout:g} seconds")
        if response.length:
            raise http.client.IncompleteRead(bytes(body), response.length)
        return bytes(body)


class ServerError(RuntimeError):
    """A server that is overloaded, broken or silent; the request itself may be sound."""


class _Stays(urllib.request.HTTPRedirectHandler):
    """Refuses redirects, because Python would send the key to the new host."""

    def redirect_request(self, req, fp, code, msg, headers, newurl):  # type: ignore[no-untyped-def]
        """Refuse."""


_OPENER = urllib.request.build_opener(_Stays)


def _has_message(reply: Any) -> bool:
    choices = reply.get("choices") if isinstance(reply, dict) else None
    first = choices[0] if isinstance(choices, list) and choices else None
    message = first.get("message") if isinstance(first, dict) else None
    return isinstance(message, dict) and isinstance(message.get("content"), str | list | None)


def reply_text(reply: dict[str, Any]) -> str:
    """The text of a reply; its content is a text, a list of parts, of which those of type `text` are read, or null."""
    content = reply["choices"][0]["message"].get("content")
    if isinstance(content, list):
        texts = [part.get("text") for part in content if isinstance(part, dict) and part.get("type") == "text"]
        return "".join(text for text in texts if isinstance(text, str))
    return content or ""


def is_cut_off(reply: dict[str, Any]) -> bool:
    """Whether the reply ended because of `max_tokens`."""
    return bool(reply["choices"][0].get("finish_reason") == "length")


class _TryAgainError(Exception):
    def __init__(self, text: str, *, wait: float | None = None, unreachable: bool = False) -> None:
        super().__init__(text)
        self.wait, self.unreachable = wait, unreachable


def _retry_after(text: str | None) -> float | None:
    try:
        return max(0.0, float(text)) if text else None
    except ValueError:  # a date: use the doubling wait
        return None


def in_parallel(
    call: Callable[[_T], Any], items: Sequence[_T], *, workers: int, fatal: type[Exception] = ServerError
) -> Iterator[tuple[int, Any]]:
    """Call a function on every item in threads; yields (number, result) as they finish, then raises the last failure.

    After a failure the other items are still processed, unless several fail without a success between them. An
    `EvalError` stops everything at once. The threads are daemons, so that an interrupted program does not wait for a
    server that hangs.

    Args:
        call: takes an item, in a thread.
        items: all items.
        workers: number of threads.
        fatal: failures that may concern all items.

    Raises:
        EvalError: too many such failures in a row.
    """
    left = iter(enumerate(items))
    taking, stopped = threading.Lock(), threading.Event()
    done: queue.SimpleQueue[tuple[int, Any, BaseException | None]] = queue.SimpleQueue()

    def work() -> None:
        while True:
            with taking:
                taken = None if stopped.is_set() else next(left, None)
            if taken is None:
                return
            try:
                done.put((taken[0], call(taken[1]), None))
            except BaseException as error:  # handed to the caller
                if isinstance(error, EvalError):
                    stopped.set()
                done.put((taken[0], None, error))

    for _ in range(min(max(1, workers), len(items))):
        threading.Thread(target=work, name="endpoint", daemon=True).start()
    failure: Exception | None = None
    row = 0
    try:
        for _ in items:
            number, result, error = done.get()
            if error is None:
                row = 0
                yield number, result
            elif isinstance(error, EvalError) or not isinstance(error, Exception):
                raise error
            else:
                failure, row = error, row + isinstance(error, fatal)
                if row == _HOPELESS_ROW:
                    raise EvalError(
                        f"{row} requests in a row failed, so nothing more is asked. The last one: {error}. What was "
                        "answered is kept: mend the server (or change --timeout and --attempts), then run this again."
                    ) from error
    finally:
        stopped.set()
    if failure is not None:
        raise failure


class EndpointModel:
    """A model behind an OpenAI-compatible server (vLLM, SGLang, `mm-moslora serve`, a provider).

    Its fingerprint covers only the address and the model's name. A client cannot detect changed weights under the same
    name.

    Args:
        endpoint: where to ask.
        reference: one request at a time.
    """

    def __init__(self, endpoint: Endpoint, *, reference: bool = False) -> None:
        self.endpoint, self._reference = endpoint, reference

    @property
    def name(self) -> str:
        """Display name."""
        return f"{self.endpoint.model} at {self.endpoint.url}"

    @property
    def fingerprint(self) -> str:
        """Hash over address and model name."""
        return digest(["endpoint", self.endpoint.url, self.endpoint.model])

    def generate(self, requests: Sequence[Request], *, batch_size: int) -> Iterator[tuple[int, Answer]]:
        """See `Model.generate`; `batch_size` is the number of concurrent requests."""
        yield from in_parallel(self._answer, requests, workers=1 if self._reference else batch_size)

    def loglikelihood(
        self, requests: Sequence[OptionRequest], *, batch_size: int
    ) -> Iterator[tuple[int, tuple[OptionScore, ...]]]:
        """Score options of one token by the 20 most likely first tokens.

        Raises:
            RuntimeError: an option is not among them, so the endpoint does not give its probability.
        """
        yield from in_parallel(self._score, requests, workers=1 if self._reference else batch_size)

    def close(self) -> None:
        """Nothing to free."""

    def _answer(self, request: Request) -> Answer:
        if request.beams > 1:
            raise EvalError(
                f"The protocol decodes with {request.beams} beams, which a chat endpoint cannot. Use the folder of a "
                "run, a checkpoint or an export, or hf:ID."
            )
        payload: dict[str, Any] = {
            "messages": chat_messages(request.messages, request.images),
            "max_tokens": request.max_new_tokens,
            "temperature": 0,
        }
        if (draw := request.draw) is not None:
            payload |= {"temperature": draw.temperature, "top_p": draw.top_p, "seed": draw.seed}
            payload |= {"top_k": draw.top_k} if draw.top_k else {}  # vLLM and SGLang know it
        if request.stop:
            payload["stop"] = list(request.stop)
        reply = self.endpoint.chat(payload)
        return Answer(
            text=reply_text(reply),
            tokens=tokens_of(reply, "completion_tokens"),
            finish_reason="length" if is_cut_off(reply) else "stop",
        )

    def _score(self, item: OptionRequest) -> tuple[OptionScore, ...]:
        if item.request.raw:
            raise EvalError(
                "The protocol scores bare texts, which a chat endpoint cannot. Use the folder of a run, a checkpoint "
                "or an export."
            )
        payload = {
            "messages": chat_messages(item.request.messages, item.request.images),
            "max_tokens": 1,
            "temperature": 0,
            "logprobs": True,
            "top_logprobs": 20,
        }
        choice = self.endpoint.chat(payload)["choices"][0]
        first = ((choice.get("logprobs") or {}).get("content") or [{}])[0].get("top_logprobs") or []
        logprobs: dict[str, float] = {}
        for entry in first:
            # `A` and ` A` are two tokens: the likelier one counts, so the probability of a letter is a lower bound.
            text = str(entry["token"]).strip()
            logprobs[text] = max(logprobs.get(text, float("-inf")), float(entry["logprob"]))
        missing = [option for option in item.options if option not in logprobs]
        if missing:
            raise RuntimeError(f"the endpoint gives no probability for option {missing[0]!r} among its first tokens")
        best = max(logprobs, key=lambda text: logprobs[text])
        return tuple(OptionScore(logprob=logprobs[option], tokens=1, greedy=option == best) for option in item.options)


def chat_messages(messages: Sequence[Message], images: Sequence[ImageLike]) -> list[dict[str, Any]]:
    """Messages in the OpenAI form, with pictures as data URLs in their places."""
    left = iter(images)
    result: list[dict[str, Any]] = []
    for message in messages:
        if all(isinstance(part, str) for part in message.content):
            result.append({"role": message.role, "content": message.text})
            continue
        parts = [
            {"type": "text", "text": part}
            if isinstance(part, str)
            else {"type": "image_url", "image_url": {"url": data_url(next(left))}}
            for part in message.parts
        ]
        result.append({"role": message.role, "content": parts})
    return result


def data_url(image: ImageLike) -> str:
    """A picture as a data URL: files unchanged, opened pictures as PNG."""
    if isinstance(image, bytes | Path | StoredImage):
        from mm_moslora.data.images.record_picture import read_picture

        data = image if isinstance(image, bytes) else read_picture(image) if isinstance(image, Path) else image.read()
        kind = next((name for start, name in _FIRST_BYTES.items() if data.startswith(start)), None)
        if kind is not None:
            return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
        from mm_moslora_eval.sources.image_controls import open_image

        image = open_image(data)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
