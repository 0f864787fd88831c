"""Streaming detokenisation: complete characters only, and no part of a stop string."""

from __future__ import annotations

from collections.abc import Sequence

from mm_moslora.data.chat.chat_template import THINK, THINK_END
from mm_moslora.data.chat.conversation_encoder import ConversationEncoder

_HALF = "\N{REPLACEMENT CHARACTER}"


class TextStream:
    """The text of one answer, piece by piece; the joined pieces equal the text of all tokens.

    Args:
        encoder: holds the tokenizer and the template's text before an answer.
        stop: texts that end the answer. Neither they nor the text after them is returned.
        thinking: the form of the prompt; where the prompt opened a thinking block, the text begins with that.
    """

    def __init__(self, encoder: ConversationEncoder, stop: Sequence[str] = (), *, thinking: bool | None = None) -> None:
        self._encoder, self._stop = encoder, tuple(stop)
        self._tokens: list[int] = []
        self._start = 0
        """Start of decoding: a tokenizer decodes a token differently at the start of a text and after another token."""
        self._end = 0
        """Tokens with text in `_pending` or already returned."""
        self._pending = encoder.opened(thinking)
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
        self._pending, self._state = "", "start"

    def add(self, text: str, *, last: bool = False) -> tuple[str, str]:
        """Take the next piece; returns the thinking and the content that are final now."""
        text_left, thinking, self._pending = self._pending + text, "", ""
        if self._state == "start":
            begun = text_left.lstrip()
            if not last and len(begun) < len(THINK) and THINK.startswith(begun):
                self._pending = text_left
                return "", ""
            self._state = "opening" if begun.startswith(THINK) else "answer"
            text_left = begun.removeprefix(THINK) if self._state == "opening" else text_left
        if self._state == "opening":
            text_left = text_left.lstrip("\n")
            self._state = "thinking" if text_left else "opening"
        if self._state == "thinking":
            thinking, end, rest = text_left.partition(THINK_END)
            if not end:
                certain = (
                    text_left if last else text_left[: len(text_left) - _overlap(text_left, THINK_END)].rstrip("\n")
                )
                self._pending = text_left[len(certain) :]
                return certain, ""
            thinking, text_left, self._state = thinking.rstrip("\n"), rest, "closing"
        if self._state == "closing":
            text_left = text_left.lstrip("\n")
            self._state = "answer" if text_left else "closing"
        return thinking, text_left


def _overlap(text: str, stop: str) -> int:
    """The number of characters at the end of a text that may start a stop string."""
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)
