"""Chat services over HTTP: a client with retries and limits, and a model behind the runner's `Model` protocol.

Standard library only. The key is read from the environment and never written.
"""

from __future__ import annotations

import base64
import email.utils
import http.client
import io
import json
import logging
import math
import os
import random
import re
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from mm_moslora.utils.errors import EvalError
from mm_moslora.utils.identity import sha256_of_values
from mm_moslora.utils.network.http_fetch import TimeLimit
from mm_moslora.utils.redaction import redact_text
from mm_moslora.utils.untrusted_data import parse_json
from mm_moslora_eval.backends.endpoints.parallel_calls import Prices, RateLimit, ServerError, in_parallel
from mm_moslora_eval.backends.endpoints.service_replies import (
    NoAnswerError,
    Usage,
    has_message,
    is_cut_off,
    is_text,
    reply_text,
    tokens_of,
)
from mm_moslora_eval.protocol.model_interface import Answer, Message, OptionRequest, OptionScore, Request
from mm_moslora_eval.sources.document import ImageLike, StoredImage

logger = logging.getLogger(__name__)


KEY_NAMES = ("MM_MOSLORA_API_KEY", "OPENAI_API_KEY")
"""Environment variables for the key, in order of priority."""
TIMEOUT, ATTEMPTS = 300.0, 6
"""Default patience with a request: seconds for one attempt, and attempts."""
_MOST_WAIT, _MOST_RETRY_AFTER = 60.0, 900.0
"""Longest wait before another attempt: by itself, and where the server names it."""
_ASIDE = 10.0
"""Seconds for a question about the server itself."""
_MOST_REPLY_BYTES = 2**26
_PASSING = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})
_HOPELESS = frozenset({401, 403, 404, 405})
_UNSUPPORTED = re.compile(
    r"unsupported|not support|deprecated|unrecognized|unknown parameter|only the default|cannot both be specified", re.I
)
_INSTEAD = {"max_tokens": "max_completion_tokens"} | dict.fromkeys(
    ("top_p", "top_k", "temperature", "seed", "stop"), ""
)
"""Parameters that some models refuse -> what they take in their place; empty: nothing. Of two that a refusal names
the first is left out."""


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """A server and the name of its model."""

    url: str
    """Up to and including `/v1`."""
    model: str
    timeout: float = TIMEOUT
    """Seconds for one attempt."""
    attempts: int = ATTEMPTS
    first_wait: float = 1.0
    """Seconds before the second attempt, doubled for each further one, up to a minute. `Retry-After` takes priority."""
    usage: Usage = field(default_factory=Usage, compare=False)
    limit: RateLimit = field(default_factory=RateLimit, compare=False)
    prices: Prices | None = None

    def __post_init__(self) -> None:
        if not (0 < self.timeout < math.inf and self.attempts >= 1):
            raise EvalError(
                f"timeout is {self.timeout} and attempts {self.attempts}; expected seconds above 0, and 1 or more."
            )

    @classmethod
    def parse(cls, text: str, **options: Any) -> Endpoint:
        """Read `URL#MODEL`."""
        url, separator, model = text.partition("#")
        if not url.startswith(("http://", "https://")) or not separator or not model:
            raise EvalError(
                f"{redact_text(text)!r} names no endpoint; expected URL#MODEL, such as "
                "http://127.0.0.1:8000/v1#my-model."
            )
        if "@" in url.split("//", 1)[1].split("/", 1)[0]:
            raise EvalError(f"An endpoint's URL holds no password; put the key into {KEY_NAMES[0]} instead.")
        return cls(url=url.rstrip("/"), model=model, **options)

    def chat(self, payload: dict[str, Any]) -> dict[str, Any]:
        """One chat completion; waits and tries again where that can help."""
        wait, attempt = self.first_wait, 0
        while True:
            body = json.dumps(self._accepted({"model": self.model, **payload})).encode()
            expected = self.usage.mean_tokens or int(payload.get("max_tokens", 0))
            self.limit.wait(expected)
            try:
                reply = self._post(body)
            except _RefusedParameterError as error:
                self._leave_out(error.name)
            except _TryAgainError as error:
                attempt += 1
                self._give_up(error, attempt)
                if error.wait is not None:
                    self.limit.pause(error.wait)
                # Jitter spreads the retries of parallel requests.
                pause = error.wait if error.wait is not None else min(_MOST_WAIT, wait * random.uniform(0.75, 1.25))
                if self.usage.begins_to_fail():
                    logger.warning(
                        "%s: %s. Asking again in %.0f s; each request is tried %d times, for up to %g s.",
                        self.url, error, pause, self.attempts, self.timeout,
                    )  # fmt: skip
                time.sleep(pause)
                wait *= 2
            else:
                self.usage.add(reply, retries=attempt)
                used = tokens_of(reply, "prompt_tokens") + tokens_of(reply, "completion_tokens")
                self.limit.settle(expected=expected, used=used)
                return reply

    def get(self, path: str) -> Any:
        """What the server says at a path below the address, in seconds; None where it says nothing useful."""
        asked = urllib.request.Request(f"{self.url}{path}", headers=self._key_headers())  # noqa: S310
        seconds = min(self.timeout, _ASIDE)
        with (
            suppress(OSError, http.client.HTTPException, ValueError, RuntimeError),
            TimeLimit(seconds) as limit,
            limit.opener().open(asked, timeout=seconds) as response,
        ):
            return parse_json(self._body(response, limit))

    def _key_headers(self) -> Mapping[str, str]:
        key = next((value for name in KEY_NAMES if (value := os.environ.get(name))), "")
        return {"Authorization": f"Bearer {key}"} if key else {}

    def _give_up(self, error: _TryAgainError, attempt: int) -> None:
        """Raise the failure of a request that is not tried again."""
        last = attempt >= self.attempts or (error.wait or 0.0) > _MOST_RETRY_AFTER
        if error.unreachable and (last or not self.usage.calls):
            raise EvalError(f"No server answers at {self.url} ({error}). Start it, or check the address.") from error
        if last:
            raise ServerError(f"{self.url}: {error} after {attempt} attempts") from error

    def _accepted(self, payload: dict[str, Any]) -> dict[str, Any]:
        """The payload without parameters that the model refused."""
        for name in self.usage.left_out & payload.keys():
            value = payload.pop(name)
            payload |= {_INSTEAD[name]: value} if _INSTEAD[name] else {}
        return payload

    def _leave_out(self, name: str) -> None:
        if self.usage.leave_out(name):
            instead = f"{_INSTEAD[name]} is sent" if _INSTEAD[name] else "its own default counts"
            logger.warning("%s refuses %s; %s from here on.", self.model, name, instead)

    def _post(self, body: bytes) -> dict[str, Any]:
        headers = {"Content-Type": "application/json", **self._key_headers()}
        request = urllib.request.Request(f"{self.url}/chat/completions", data=body, headers=headers)  # noqa: S310
        with TimeLimit(self.timeout) as limit:  # a socket's own timeout starts again with every byte that arrives
            try:
                with limit.opener().open(request, timeout=self.timeout) as response:
                    said = parse_json(self._body(response, limit))
            except urllib.error.HTTPError as error:
                self._refused(error, body)
            except (OSError, http.client.HTTPException) as error:  # no connection, or an incomplete reply
                reason = getattr(error, "reason", error)
                unreachable = isinstance(reason, ConnectionRefusedError | socket.gaierror)
                late = f"no whole reply within {self.timeout:g} seconds" if limit.passed else ""
                raise _TryAgainError(late or str(reason) or type(error).__name__, unreachable=unreachable) from error
            except ValueError as error:  # no JSON, or no UTF-8
                raise _TryAgainError(f"the reply {error}") from error
        try:
            answered = has_message(said)
        except NoAnswerError as error:
            raise NoAnswerError(f"{self.url}: {error}") from error
        if not answered:
            raise RuntimeError(f"{self.url} answered without a message: {redact_text(json.dumps(said)[:5000])[:500]}")
        return said  # type: ignore[no-any-return]

    def _refused(self, error: urllib.error.HTTPError, body: bytes) -> NoReturn:
        """Raise what follows from an answer with another status than 200."""
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
        if error.code == 400 and _UNSUPPORTED.search(text):
            sent = [name for name in _INSTEAD if f'"{name}"'.encode() in body]
            refused = next((name for name in sent if re.search(rf"\b{name}\b", text)), None)
            if refused is not None:
                raise _RefusedParameterError(refused) from error
        raise RuntimeError(f"{self.url} answered HTTP {error.code}: {text}") from error

    def _body(self, response: http.client.HTTPResponse, limit: TimeLimit) -> bytes:
        body = bytearray()
        while data := response.read1(2**16):
            body += data
            if len(body) > _MOST_REPLY_BYTES:
                raise RuntimeError(f"{self.url} sent a reply of more than {_MOST_REPLY_BYTES} bytes")
        if response.length or limit.passed:
            raise http.client.IncompleteRead(bytes(body), response.length)
        return bytes(body)


@dataclass(frozen=True, kw_only=True)
class ServiceSettings:
    """Patience with services, and their limits and prices."""

    timeout: float = TIMEOUT
    attempts: int = ATTEMPTS
    requests_per_minute: float | None = None
    tokens_per_minute: float | None = None
    price: str | None = None
    """IN/OUT per million tokens; None: unknown."""
    expect_preprocessing: Path | None = None
    """Folder whose preprocessing the server must publish."""

    def endpoint(self, name: str) -> Endpoint:
        """The service that `openai:URL#MODEL` or `URL#MODEL` names."""
        return Endpoint.parse(
            name.removeprefix("openai:"), timeout=self.timeout, attempts=self.attempts,
            limit=RateLimit(requests=self.requests_per_minute, tokens=self.tokens_per_minute),
            prices=None if self.price is None else Prices.parse(self.price),
        )  # fmt: skip


class _TryAgainError(Exception):
    def __init__(self, text: str, *, wait: float | None = None, unreachable: bool = False) -> None:
        super().__init__(text)
        self.wait, self.unreachable = wait, unreachable


class _RefusedParameterError(Exception):
    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name


def _retry_after(text: str | None) -> float | None:
    """Seconds that a server asks to wait, as a number or as a date; None for neither."""
    if not text:
        return None
    try:
        seconds = float(text)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(text).timestamp() - time.time()
        except (ValueError, OverflowError):
            return None
    return max(0.0, seconds) if math.isfinite(seconds) else None


class EndpointModel:
    """A model behind a chat service: vLLM, SGLang, `mm-moslora serve`, a provider.

    Its fingerprint covers only the address and the model's name. A client cannot detect changed weights under the same
    name.
    """

    def __init__(self, endpoint: Endpoint, *, reference: bool = False) -> None:
        self.endpoint, self._reference = endpoint, reference
        self.name = f"{endpoint.model} at {endpoint.url}"
        self.fingerprint = sha256_of_values(["endpoint", endpoint.url, endpoint.model])

    @property
    def details(self) -> dict[str, str]:
        """Details for the run's records: parameters that the model refuses."""
        return {"refuses": ", ".join(sorted(self.endpoint.usage.left_out))} if self.endpoint.usage.left_out else {}

    @property
    def prices(self) -> dict[str, float] | None:
        """Prices of a million tokens; None where they were not given."""
        return None if self.endpoint.prices is None else self.endpoint.prices.to_dict()

    def generate(self, requests: Sequence[Request], *, batch_size: int) -> Iterator[tuple[int, Answer]]:
        """See `Model.generate`; `batch_size` is the number of concurrent requests."""
        yield from in_parallel(self._answer, requests, workers=1 if self._reference else batch_size)

    def loglikelihood(
        self, requests: Sequence[OptionRequest], *, batch_size: int
    ) -> Iterator[tuple[int, tuple[OptionScore, ...]]]:
        """Score options of one token by the 20 most likely first tokens."""
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
        text = reply_text(reply)
        # An answer that begins with a stop word is empty; a reply tells no other way to end with nothing said.
        if not text.strip() and (is_cut_off(reply) or not (request.stop and is_text(reply))):
            cause = "max_new_tokens were spent, perhaps in thinking" if is_cut_off(reply) else "it holds no text"
            raise NoAnswerError(f"{self.endpoint.url}: the reply gave no answer ({cause})")
        for stop in request.stop if "stop" in self.endpoint.usage.left_out else ():
            text = text.partition(stop)[0]
        return Answer(
            text=text, tokens=tokens_of(reply, "completion_tokens"), prompt_tokens=tokens_of(reply, "prompt_tokens"),
            finish_reason="length" if is_cut_off(reply) else "stop",
        )  # fmt: skip

    def _score(self, item: OptionRequest) -> tuple[OptionScore, ...]:
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


_FIRST_BYTES = {b"\x89PNG": "png", b"\xff\xd8": "jpeg", b"GIF8": "gif", b"RIFF": "webp", b"BM": "bmp"}


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
        from mm_moslora_eval.sources.source_images import open_image

        data = image if isinstance(image, bytes) else read_picture(image) if isinstance(image, Path) else image.read()
        image = open_image(data)
        kind = next((name for start, name in _FIRST_BYTES.items() if data.startswith(start)), None)
        if kind is not None:
            return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
