"""Streaming detokenisation: complete characters only, and no part of a stop string."""

from __future__ import annotations

from collections.abc import Sequence

from mm_moslora.data.chat.answer_thinking import THINK, THINK_END
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
        """Tokens with text in `_held` or already returned."""
        self._held = encoder.opened(thinking)
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
        rest = self._held + self._fresh()
        self._held, self._end = "", len(self._tokens)
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
        text = self._held + fresh
        places = [place for stop in self._stop if (place := text.find(stop)) >= 0]
        if places:
            self.stopped, self._held = True, ""
            return text[: min(places)]
        keep = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


class ThinkingSplit:
    """Separates the thinking at the start of an answer from the answer, piece by piece."""

    def __init__(self) -> None:
        self._held, self._state = "", "start"

    def add(self, text: str, *, last: bool = False) -> tuple[str, str]:
        """Take the next piece; returns the thinking and the content that are final now."""
        held, thinking, self._held = self._held + text, "", ""
        if self._state == "start":
            begun = held.lstrip()
            if not last and len(begun) < len(THINK) and THINK.startswith(begun):
                self._held = held
                return "", ""
            self._state = "opening" if begun.startswith(THINK) else "answer"
            held = begun.removeprefix(THINK) if self._state == "opening" else held
        if self._state == "opening":
            held = held.lstrip("\n")
            self._state = "thinking" if held else "opening"
        if self._state == "thinking":
            thinking, end, rest = held.partition(THINK_END)
            if not end:
                certain = held if last else held[: len(held) - _overlap(held, THINK_END)].rstrip("\n")
                self._held = held[len(certain) :]
                return certain, ""
            thinking, held, self._state = thinking.rstrip("\n"), rest, "closing"
        if self._state == "closing":
            held = held.lstrip("\n")
            self._state = "answer" if held else "closing"
        return thinking, held


def _overlap(text: str, stop: str) -> int:
    """The number of characters at the end of a text that may start a stop string."""
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)
