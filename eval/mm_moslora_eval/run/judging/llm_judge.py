"""A judge: a language model that is asked for grades, behind an endpoint or loaded here.

A reply is data from a service: it counts only if it can be read in the form that the prompt asks for. Such replies are
cached as JSON files by address, model and request, so that scoring again costs nothing. Calls and tokens are counted,
and nothing more is asked once the budget is used up.
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

from mm_moslora.utils.errors import EvalError
from mm_moslora.utils.files import make_subfolder, read_json, replace_text
from mm_moslora.utils.identity import sha256_of_values
from mm_moslora.utils.redaction import redact_text
from mm_moslora_eval.backends.endpoints.service_replies import NoAnswerError, Usage, is_cut_off, reply_text
from mm_moslora_eval.scoring.scored_sample import without_thinking

logger = logging.getLogger(__name__)

THINKING_TOKENS = 2048
"""Default room for a judge's thinking before its reply."""
_TEMPERATURES = (0.0, 0.5, 1.0, 1.5, 2.0)  # VLMEvalKit's schedule: one further request per unreadable reply
WORKERS = 4
"""Default number of answers that are graded at the same time."""
LEAST_AGREEMENT = 0.8
"""Default share of graded answers with which a judge must agree; a result below it has a remark."""

_T = TypeVar("_T")


class BudgetError(EvalError):
    """The judge's budget is used up."""


class ChatService(Protocol):
    """What answers a conversation in OpenAI's form: an `Endpoint`, or a model that is loaded here.

    One that gives the same reply at every temperature has an attribute `greedy`, which is true.
    """

    @property
    def url(self) -> str:
        """Address; of a model that is loaded here its fingerprint."""
        ...

    @property
    def model(self) -> str:
        """Name of the model."""
        ...

    @property
    def usage(self) -> Usage:
        """Calls and tokens so far."""
        ...

    def chat(self, payload: dict[str, Any]) -> dict[str, Any]:
        """See `Endpoint.chat`."""
        ...


class Judge:
    """A judge with a cache and a budget."""

    def __init__(
        self, endpoint: ChatService, *, cache: Path, budget_tokens: int | None = None,
        thinking_tokens: int = THINKING_TOKENS, graded: Path | None = None, least_agreement: float = LEAST_AGREEMENT,
        workers: int = WORKERS,
    ) -> None:  # fmt: skip
        if not 0 <= least_agreement <= 1:
            raise EvalError(f"--judge-agreement is {least_agreement}, expected a share from 0 to 1.")
        if thinking_tokens < 0:
            raise EvalError(f"thinking_tokens of the judge is {thinking_tokens}, expected 0 or more.")
        self.endpoint, self._cache, self._budget = endpoint, cache, budget_tokens
        if workers < 1:
            raise EvalError(f"--judge-batch-size is {workers}, expected 1 or more.")
        self.workers = workers
        self._thinking, self.graded, self.least_agreement = thinking_tokens, graded, least_agreement
        self.cached = self.unreadable = 0
        self.last_unreadable = ""
        self._counting = threading.Lock()
        self._asking: dict[Path, threading.Lock] = {}
        make_subfolder(cache)

    def ask(self, prompt: str, read: Callable[[str], _T | None], *, max_tokens: int) -> tuple[_T, str] | None:
        """The first of up to five replies that can be read, from the cache if it is there."""
        messages = [{"role": "user", "content": prompt}]
        requests = [
            {"messages": messages, "max_tokens": max_tokens, "temperature": temperature}
            for temperature in (_TEMPERATURES[:1] if getattr(self.endpoint, "greedy", False) else _TEMPERATURES)
        ]
        server = {"url": self.endpoint.url, "model": self.endpoint.model}
        cache_files = [self._cache / f"{sha256_of_values(server | {'request': request})}.json" for request in requests]
        with self._counting:
            asking = self._asking.setdefault(cache_files[0], threading.Lock())
        with asking:  # of equal prompts at one time one is asked, and the others find its reply
            return self._from_cache(cache_files, read) or self._from_service(requests, cache_files, read)

    def _from_cache(self, cache_files: Sequence[Path], read: Callable[[str], _T | None]) -> tuple[_T, str] | None:
        for cache_file in cache_files:
            value = _read(_cached_reply(cache_file), read)
            if value is not None:
                with self._counting:
                    self.cached += 1
                return value
        return None

    def _from_service(
        self, requests: Sequence[dict[str, Any]], cache_files: Sequence[Path], read: Callable[[str], _T | None]
    ) -> tuple[_T, str] | None:
        server = {"url": redact_text(self.endpoint.url), "model": self.endpoint.model}
        for cache_file, request in zip(cache_files, requests, strict=True):
            text = self._request(request)
            value = _read(text, read)
            if value is not None:
                stored = server | {"request": request, "reply": text}
                replace_text(cache_file, json.dumps(stored, indent=2) + "\n")  # half a surrogate pair is no UTF-8
                return value
            with self._counting:
                self.unreadable, self.last_unreadable = self.unreadable + 1, text
        return None

    def _request(self, request: dict[str, Any]) -> str:
        """A new reply, empty where the judge refuses; one that was cut off loses its last line, perhaps incomplete."""
        usage = self.endpoint.usage
        spent = usage.prompt_tokens + usage.completion_tokens
        if self._budget is not None and spent >= self._budget:
            raise BudgetError(
                f"The judge has used {spent} of {self._budget} tokens; nothing more is asked. Its replies are kept: "
                "score again with a larger --judge-budget."
            )
        try:
            reply = self.endpoint.chat(request | {"max_tokens": request["max_tokens"] + self._thinking})
        except NoAnswerError as error:  # as unreadable as an empty reply, and no reason to leave the others ungraded
            logger.warning("%s", error)
            return ""
        text = reply_text(reply)
        return text.rpartition("\n")[0] if is_cut_off(reply) else text

    def to_dict(self) -> dict[str, Any]:
        """For the result file: the judge, and its calls, tokens and unreadable replies."""
        return {
            "model": self.endpoint.model, "url": redact_text(self.endpoint.url), "thinking_tokens": self._thinking,
            "cached": self.cached, "unreadable": self.unreadable, **self.endpoint.usage.to_dict(),
        }  # fmt: skip


def _read(reply: str | None, read: Callable[[str], _T | None]) -> tuple[_T, str] | None:
    text = without_thinking(reply).text if reply is not None else ""
    value = read(text) if text.strip() else None
    return None if value is None else (value, text)


def _cached_reply(cache_file: Path) -> str | None:
    """A cached reply; None if there is none, or if it is damaged and will be requested again."""
    try:
        return str(read_json(cache_file)["reply"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError) as error:
        logger.warning("%s is damaged (%s: %s); the judge is asked again.", cache_file, type(error).__name__, error)
        return None
