"""What a reply in OpenAI's form says, and counts of many."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Any


class NoAnswerError(RuntimeError):
    """A reply that holds no answer, such as a refusal."""


@dataclass
class Usage:
    """Counts of an endpoint's calls and tokens; thread-safe."""

    calls: int = 0
    retries: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    left_out: frozenset[str] = frozenset()
    """Parameters that the model refuses, and that are not sent any more."""
    _failing: bool = field(default=False, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def begins_to_fail(self) -> bool:
        """Note a call that has to be repeated; whether it is the first since one that has succeeded."""
        with self._lock:
            begins, self._failing = not self._failing, True
            return begins

    def add(self, reply: dict[str, Any], *, retries: int) -> None:
        """Count one call."""
        with self._lock:
            self.calls += 1
            self._failing = False
            self.retries += retries
            self.prompt_tokens += tokens_of(reply, "prompt_tokens")
            self.completion_tokens += tokens_of(reply, "completion_tokens")

    def leave_out(self, name: str) -> bool:
        """Note a parameter that the model refuses; whether it is the first to note it, of several parallel requests."""
        with self._lock:
            is_new = name not in self.left_out
            self.left_out |= {name}
            return is_new

    @property
    def mean_tokens(self) -> int:
        """Tokens of an average call; 0 before the first."""
        return (self.prompt_tokens + self.completion_tokens) // self.calls if self.calls else 0

    def to_dict(self) -> dict[str, Any]:
        """The counts."""
        names = ("calls", "retries", "prompt_tokens", "completion_tokens")
        counts: dict[str, Any] = {name: getattr(self, name) for name in names}
        return counts | ({"left_out": sorted(self.left_out)} if self.left_out else {})


_MOST_TOKENS = 10**9
"""More than any model reads or writes at once."""


def tokens_of(reply: dict[str, Any], name: str) -> int:
    """A count of a reply's `usage`; 0 if the server reports none that can be one."""
    used = reply.get("usage")
    return _count_of(used.get(name)) if isinstance(used, dict) else 0


def _count_of(value: object) -> int:
    """A count that a service reports; 0 if it is none."""
    return value if type(value) is int and 0 <= value <= _MOST_TOKENS else 0


def has_message(said: Any) -> bool:
    """Whether a server's reply has the form of a chat completion."""
    choices = said.get("choices") if isinstance(said, dict) else None
    first = choices[0] if isinstance(choices, list) and choices else None
    message = first.get("message") if isinstance(first, dict) else None
    if isinstance(first, dict) and isinstance(message, dict) and not message.get("content"):
        if first.get("finish_reason") == "content_filter":
            raise NoAnswerError("the provider refused to answer (finish_reason: content_filter)")
        if message.get("refusal"):
            raise NoAnswerError(f"the provider refused to answer ({str(message['refusal'])[:80]})")
    return isinstance(message, dict) and isinstance(message.get("content"), str | list | None)


def reply_text(reply: dict[str, Any]) -> str:
    """The text of a reply; its content is a text, a list of parts, of which those of type `text` are read, or null."""
    content = reply["choices"][0]["message"].get("content")
    if isinstance(content, list):
        texts = [part.get("text") for part in content if isinstance(part, dict) and part.get("type") == "text"]
        return "".join(text for text in texts if isinstance(text, str))
    return content or ""


def is_text(reply: dict[str, Any]) -> bool:
    """Whether the content is a text, even an empty one."""
    return isinstance(reply["choices"][0]["message"].get("content"), str)


def is_cut_off(reply: dict[str, Any]) -> bool:
    """Whether the reply ended because of `max_tokens`."""
    return bool(reply["choices"][0].get("finish_reason") == "length")
