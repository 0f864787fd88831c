"""From tokens to text as they come: whole characters only, and nothing of a stop string."""

from __future__ import annotations

from collections.abc import Sequence

from mm_moslora.data.chat.conversation_encoder import ConversationEncoder

_HALF = "\N{REPLACEMENT CHARACTER}"


class TextStream:
    """The text of one answer, piece by piece; the pieces together are the text of all tokens.

    Args:
        encoder: knows the tokenizer and what the template puts before an answer.
        stop: texts that end the answer; neither they nor what is behind them is given out.
    """

    def __init__(self, encoder: ConversationEncoder, stop: Sequence[str] = ()) -> None:
        self._encoder, self._stop = encoder, tuple(stop)
        self._tokens: list[int] = []
        self._start = 0
        """Decoding begins here: a tokenizer writes a token differently at the start of a text than behind another."""
        self._end = 0
        """Tokens whose text is in `_held` or was given out."""
        self._held = ""
        self.stopped = False
        """Whether a stop string was met."""

    def add(self, token: int) -> str:
        """Take one more token; returns the text that is certain now, often one word and sometimes nothing."""
        self._tokens.append(token)
        fresh = self._fresh()
        if fresh.endswith(_HALF):  # half a character so far
            return ""
        self._start, self._end = self._end, len(self._tokens)
        return self._release(fresh)

    def finish(self) -> str:
        """No more tokens come; returns what was held back."""
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


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of a text may be the beginning of a stop string."""
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)
