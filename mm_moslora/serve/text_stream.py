"""Streaming detokenisation: complete characters only, and no part of a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from mm_moslora.data.chat.answer_thinking import THINK, THINK_END
from mm_moslora.data.chat.conversation_encoder import ConversationEncoder

_HALF = "\N{REPLACEMENT CHARACTER}"


class TextStream:
    """The text of one answer, piece by piece, up to a text of `stop`; `thinking`: the form of the prompt."""

    def __init__(self, encoder: ConversationEncoder, stop: Sequence[str] = (), *, thinking: bool | None = None) -> None:
        self._encoder, self._stop = encoder, tuple(stop)
        self._tokens: list[int] = []
        self._start = 0
        """Start of decoding: a tokenizer decodes a token differently at the start of a text and after another token."""
        self._end = 0
        """Tokens with text in `_pending` or already returned."""
        self._pending = encoder.opened(thinking)  # where the prompt opened a thinking block, the text begins with that
        self.stopped = False
        """Whether a stop string was found."""

    def add(self, token: int) -> str:
        """Add one token; returns the text that is final now, often one word and sometimes nothing."""
        self._tokens.append(token)
        fresh = self._fresh()
        if fresh.endswith(_HALF):  # an incomplete character
            return ""
        self._start, self._end = self._end, len(self._tokens)
        return self._release(fresh)

    def finish(self) -> str:
        """End the answer; returns the text that was held back."""
        if self.stopped:
            return ""
        rest = self._pending + self._fresh()
        self._pending, self._end = "", len(self._tokens)
        return rest

    def _fresh(self) -> str:
        """The text of the tokens from `_end` on."""
        return self._decode(len(self._tokens))[len(self._decode(self._end)) :]

    def _decode(self, end: int) -> str:
        tokens = self._tokens[self._start : end]
        if self._start == 0:
            return self._encoder.decode_answer(tokens)
        return str(self._encoder.tokenizer.decode(tokens, skip_special_tokens=True))

    def _release(self, fresh: str) -> str:
        text = self._pending + fresh
        starts = [start for stop in self._stop if (start := text.find(stop)) >= 0]
        if starts:
            self.stopped, self._pending = True, ""
            return text[: min(starts)]
        keep = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._pending = text[len(text) - keep :]
        return text[: len(text) - keep]


class ThinkingSplit:
    """Separates the thinking at the start of an answer from the answer, piece by piece."""

    def __init__(self) -> None:
        self._part: Literal["start", "thinking", "content"] = "start"
        self._pending = ""
        """Text that is not returned yet; only this is looked at again when more text comes."""
        self._skips_breaks = False
        """Whether the line breaks at the start of a part are still to be dropped."""

    def add(self, text: str, *, last: bool = False) -> tuple[str, str]:
        """Take the next piece; returns the thinking and the content that are final now."""
        self._pending += text
        if self._part == "start":
            self._begin(last=last)
        thinking = self._thinking(last=last) if self._part == "thinking" else ""
        content = self._release(len(self._pending)) if self._part == "content" else ""
        return thinking, content

    def _begin(self, *, last: bool) -> None:
        begun = self._pending.lstrip()
        if begun.startswith(THINK):
            self._part, self._pending, self._skips_breaks = "thinking", begun.removeprefix(THINK), True
        elif last or not THINK.startswith(begun):
            self._part = "content"

    def _thinking(self, *, last: bool) -> str:
        thinking, end, content = self._pending.partition(THINK_END)
        if end:
            final = self._release(len(thinking.rstrip("\n")))
            self._part, self._pending, self._skips_breaks = "content", content, True
            return final
        if last:
            return self._release(len(thinking))
        return self._release(len(thinking[: len(thinking) - _overlap(thinking, THINK_END)].rstrip("\n")))

    def _release(self, size: int) -> str:
        text, self._pending = self._pending[:size], self._pending[size:]
        if self._skips_breaks:
            text = text.lstrip("\n")
            self._skips_breaks = not text
        return text


def _overlap(text: str, stop: str) -> int:
    """The number of characters at the end of a text that may start a stop string."""
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)
