"""OpenAI's response objects, complete and as stream chunks."""

from __future__ import annotations

import json
import time
import uuid
from dataclasses import dataclass, field
from typing import Any

from mm_moslora.serve.api.chat_request import ChatRequest
from mm_moslora.serve.inference.continuous_batching import Piece
from mm_moslora.serve.inference.text_stream import ThinkingSplit

DONE = b"data: [DONE]\n\n"
"""The last event of a stream."""


@dataclass(kw_only=True)
class Reply:
    """The answers to one request while they are generated."""

    request: ChatRequest
    prompt_tokens: int
    id: str = field(default_factory=lambda: f"chatcmpl-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        count = self.request.choices
        self._texts, self._tokens = [""] * count, [0] * count
        self._thoughts = [""] * count
        self._splits = [ThinkingSplit() for _ in range(count)]
        self._fresh = [("", "")] * count
        self._endings: list[str | None] = [None] * count

    @property
    def finished(self) -> bool:
        """Whether every answer has ended."""
        return all(self._endings)

    def add(self, choice: int, piece: Piece) -> None:
        """Record an event of one answer."""
        thinking, text = self._splits[choice].add(piece.text, last=piece.ending is not None)
        self._fresh[choice] = thinking, text
        self._thoughts[choice] += thinking
        self._texts[choice] += text
        self._tokens[choice] = piece.tokens
        self._endings[choice] = piece.ending

    def whole(self) -> dict[str, Any]:
        """The reply to a request without streaming."""
        choices = [
            {
                "index": index,
                "message": {"role": "assistant", "content": text, "refusal": None}
                | ({"reasoning_content": thinking} if thinking else {}),
                "finish_reason": ending, "logprobs": None,
            }
            for index, (text, thinking, ending) in enumerate(
                zip(self._texts, self._thoughts, self._endings, strict=True)
            )
        ]  # fmt: skip
        return self._object("chat.completion", choices) | {"usage": self._usage()}

    def opening(self, choice: int) -> bytes:
        """The event before the first piece of an answer."""
        return self._event(choice, {"role": "assistant", "content": ""}, None)

    def event(self, choice: int, piece: Piece) -> bytes:
        """The event for the piece that `add` took last."""
        thinking, text = self._fresh[choice]
        events = self._event(choice, {"reasoning_content": thinking}, None) if thinking else b""
        events += self._event(choice, {"content": text}, None) if text else b""
        return events + (self._event(choice, {}, piece.ending) if piece.ending else b"")

    def closing(self) -> bytes:
        """The events after the last piece."""
        if not self.request.include_usage:
            return DONE
        return _frame(self._object("chat.completion.chunk", []) | {"usage": self._usage()}) + DONE

    def _event(self, choice: int, delta: dict[str, Any], ending: str | None) -> bytes:
        one = {"index": choice, "delta": delta, "finish_reason": ending, "logprobs": None}
        return _frame(self._object("chat.completion.chunk", [one]))

    def _object(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.id, "object": kind, "created": self.created, "model": self.request.model, "choices": choices,
        }  # fmt: skip

    def _usage(self) -> dict[str, int]:
        completion, prompt = sum(self._tokens), self.prompt_tokens
        return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def _frame(value: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


def error_frame(body: dict[str, Any]) -> bytes:
    """The events that end a stream after an error in the middle of it."""
    return _frame(body) + DONE
