"""OpenAI's response objects, complete and as stream chunks."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from mm_moslora.data.boxes.box_forms import FoundBox
from mm_moslora.serve.api.chat_request import ChatRequest
from mm_moslora.serve.inference.continuous_batching import AnswerPart, Ending
from mm_moslora.serve.inference.text_stream import ThinkingSplit

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

    def add(self, piece: str, *, last: bool) -> tuple[str, str]:
        """Take the next piece of text; returns its thinking and its content."""
        thinking, text = self.split.add(piece, last=last)
        self.thoughts += thinking
        self.text += text
        return thinking, text


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
        thinking, text = choice.add(part.text, last=part.ending is not None)
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
