"""The interface of models: `Request` in, `Answer` out. All backends implement `Model`."""

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
        """The content with `<image>` for each image, for display and for hashes."""
        return "".join(part if isinstance(part, str) else "<image>" for part in self.content)

    @property
    def parts(self) -> tuple[Part, ...]:
        """The content without line breaks between images and text, for chat templates that write their own."""
        images = [False, *(not isinstance(part, str) for part in self.content), False]
        stripped: list[Part] = []
        for index, part in enumerate(self.content):
            if isinstance(part, str):
                part = part.removeprefix("\n") if images[index] else part
                part = part.removesuffix("\n") if images[index + 2] else part
            if part != "":
                stripped.append(part)
        return tuple(stripped)


@dataclass(frozen=True, kw_only=True)
class TokenDraw:
    """How the tokens of an answer are drawn; see `Decoding`."""

    temperature: float
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    """Of this answer, below 2^31. The same one gives a local model's answer again, whatever else is asked."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """One question."""

    id: str
    messages: tuple[Message, ...]
    images: tuple[ImageLike, ...] = ()
    """One per `ImagePart` over all messages, in order."""
    max_new_tokens: int = 64
    stop: tuple[str, ...] = ()
    """The answer ends before the first of these strings."""
    beams: int = 1
    """Beams of the search for the likeliest answer; 1: greedy."""
    draw: TokenDraw | None = None
    """None: the likeliest tokens."""
    sample: int = 0
    """The number of this answer among several to the question."""
    aliases: tuple[str, ...] = ()
    """Other ids of the question that stored answers may use."""
    reference: str = ""
    """Text of the right answer, whose log-likelihood the model reports beside its own answer; empty: none."""
    boxes: tuple[int, int] | None = None
    """Width and height of the picture in whose pixels boxes of the answer are wanted: the question's own last one, also
    where a control shows another; None: not wanted."""


@dataclass(frozen=True, kw_only=True)
class OptionRequest:
    """A question with several continuations as options, scored by log-likelihood."""

    request: Request
    options: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class OptionScore:
    """The log-likelihood of one continuation."""

    logprob: float
    """Sum of log-probabilities over its tokens (0 or less)."""
    tokens: int
    greedy: bool = False
    """Whether greedy decoding would have produced it."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """The output of the model."""

    text: str
    tokens: int
    """Generated tokens, the end-of-turn token included."""
    finish_reason: FinishReason
    """`length` if `max_new_tokens` cut the answer off."""
    reference: OptionScore | None = None
    """Score of `Request.reference`; None where the backend gives none."""
    prompt_tokens: int | None = None
    """Tokens of the prompt, where a service counts them."""
    boxes: tuple[tuple[float, ...], ...] | None = None
    """Boxes (x1, y1, x2, y2) and points (x, y) in pixels of `Request.boxes`, where they are wanted; None where
    the backend does not read them."""


@runtime_checkable
class Model(Protocol):
    """A backend that answers requests: a model of mm_moslora, a transformers model, a server, stored answers.

    A model that is asked to think before it answers has an attribute `thinking_tokens`, the new tokens that it needs.
    One that gives `Answer.boxes` has an attribute `reads_boxes`, which is true. One whose chat template writes
    texts around reasoning has an attribute `thinking_markers`, pairs of them. One
    that takes videos as such (`WholeVideo` among its pictures) has an attribute `videos`, which chooses their frames.
    One of known training has attributes `trained_frames` and `trained_fps`, of which one is None: what it saw of a
    video.
    """

    @property
    def name(self) -> str:
        """Display name."""
        ...

    @property
    def fingerprint(self) -> str:
        """A hash over everything that can change the answers: weights, configuration, template, processing of text and
        pictures."""
        ...

    def generate(self, requests: Sequence[Request], *, batch_size: int) -> Iterator[tuple[int, Answer]]:
        """Answer the requests, in any order.

        Args:
            requests: questions on one image lie next to each other.
            batch_size: requests that are decoded together.

        Yields:
            (index into `requests`, answer), each index once, as soon as the answer is there.
        """
        ...

    def loglikelihood(
        self, requests: Sequence[OptionRequest], *, batch_size: int
    ) -> Iterator[tuple[int, tuple[OptionScore, ...]]]:
        """Score every option of the requests; yields (index, one score per option) in any order."""
        ...

    def close(self) -> None:
        """Free the model's resources."""
        ...
