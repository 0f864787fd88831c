"""What the runner asks of a model: `Request` in, `Answer` out. Everything that can answer implements `Model`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final, Literal, Protocol, runtime_checkable

from mm_moslora_eval.sources.document import ImageLike


@dataclass(frozen=True)
class ImagePart:
    """The place of one image within a message; the n-th such part is `Request.images[n]`."""


IMAGE: Final = ImagePart()
Part = str | ImagePart
FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, kw_only=True)
class Message:
    """One turn of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: tuple[Part, ...]
    """Text and image places, in order."""

    @property
    def text(self) -> str:
        """The content with `<image>` for each image, for people and for hashes."""
        return "".join(part if isinstance(part, str) else "<image>" for part in self.content)

    @property
    def parts(self) -> tuple[Part, ...]:
        """The content without the line breaks between images and text, for chat templates that set their own."""
        images = [False, *(not isinstance(part, str) for part in self.content), False]
        stripped: list[Part] = []
        for place, part in enumerate(self.content):
            if isinstance(part, str):
                part = part.removeprefix("\n") if images[place] else part
                part = part.removesuffix("\n") if images[place + 2] else part
            if part != "":
                stripped.append(part)
        return tuple(stripped)


@dataclass(frozen=True, kw_only=True)
class Request:
    """One question; decoding is greedy."""

    id: str
    messages: tuple[Message, ...]
    images: tuple[ImageLike, ...] = ()
    """One per `ImagePart` over all messages, in order."""
    max_new_tokens: int = 64
    stop: tuple[str, ...] = ()
    """The answer ends before the first of these strings."""
    raw: bool = False
    """The text stands for itself: no chat template."""
    aliases: tuple[str, ...] = ()
    """Other names of the question, by which stored answers may know it."""


@dataclass(frozen=True, kw_only=True)
class OptionRequest:
    """A question whose answer is one of some continuations, scored by log-likelihood."""

    request: Request
    options: tuple[str, ...]
    contexts: tuple[str, ...] = ()
    """One raw text per option instead of the request's, where they differ (WinoGrande)."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What the model said."""

    text: str
    tokens: int
    """Generated tokens, the end-of-turn token included."""
    finish_reason: FinishReason
    """`length` when `max_new_tokens` cut it off."""


@dataclass(frozen=True, kw_only=True)
class OptionScore:
    """How likely one continuation is."""

    logprob: float
    """Sum of log-probabilities over its tokens (0 or less)."""
    tokens: int
    greedy: bool = False
    """Whether greedy decoding would have produced it."""


@runtime_checkable
class Model(Protocol):
    """Anything that answers requests: our model, a transformers model, a server, a replay of stored answers."""

    @property
    def name(self) -> str:
        """For people."""
        ...

    @property
    def fingerprint(self) -> str:
        """Changes whenever the answers could: a hash over weights, configuration, template, words and pictures."""
        ...

    def generate(self, requests: Sequence[Request], *, batch_size: int) -> Iterator[tuple[int, Answer]]:
        """Answer the requests, in any order.

        Args:
            requests: questions on one image lie next to each other.
            batch_size: how many to decode together.

        Yields:
            (index into `requests`, answer), each index once, as soon as it is known.
        """
        ...

    def loglikelihood(
        self, requests: Sequence[OptionRequest], *, batch_size: int
    ) -> Iterator[tuple[int, tuple[OptionScore, ...]]]:
        """Score every option of the requests; yields (index, one score per option) in any order."""
        ...

    def close(self) -> None:
        """Free what the model holds."""
        ...
