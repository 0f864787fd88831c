"""Token ids and weights of a conversation, appended segment by segment.

Images are ids, never text. An answer is tokenised so that the prompt before it keeps the ids that it has in inference.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from mm_moslora.batch import Placeholders
from mm_moslora.config import Thinking
from mm_moslora.config.llava_chat_templates import notes_of
from mm_moslora.data.chat.answer_thinking import AnswerThinking
from mm_moslora.data.chat.chat_template import Template
from mm_moslora.data.chat.guarded_tokens import TextSpan, Tokens
from mm_moslora.data.chat.processor_template import ProcessorTemplate
from mm_moslora.utils.errors import ConfigError

_PROBE = ("user", "assistant", "user", "assistant")


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """A tokenised conversation."""

    input_ids: Tensor
    """int64 ``[T]``."""
    supervised: Tensor
    """bool ``[T]``: true for learned answers and the end-of-turn token after each, or for all but the first."""
    weights: Tensor | None = None
    """fp32 ``[T]``, see `mm_moslora.batch.Example.weights`; None: all supervised tokens weigh 1."""
    images: int = 0
    """Images in the turns that were kept."""
    dropped_turns: int = 0
    """Turns that did not fit, or not whole."""
    thoughts: int = 0
    """Answers with thinking that is learned."""
    dropped_thoughts: int = 0
    """Answers with thinking that the chat template or the recipe leaves out."""


@dataclass(kw_only=True)
class GrowingConversation:
    """A conversation so far, as token ids."""

    ids: list[int] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    base: float = 0.0
    """Weight of tokens outside answers."""
    images: int = 0
    context: str = ""
    """The special token at the end of `ids`, as text; tokenisation restarts after it."""
    run: list[TextSpan] = field(default_factory=list)
    """Text that is not tokenised yet."""
    pictures: Sequence[Placeholders] | None = None
    """Placeholders of every picture and video, where they differ."""
    thoughts: int = 0
    dropped_thoughts: int = 0
    ends: list[tuple[int, int]] = field(default_factory=list)
    """Turns and tokens up to the end of every answer."""

    def add(self, tokens: list[int], weight: float | None = None) -> None:
        """Append tokens with the weight of an answer, or the base's."""
        self.ids += tokens
        self.weights += [self.base if weight is None else weight] * len(tokens)

    def encoded(self, limit: int | None = None) -> Encoded:
        """Its first tokens, or all."""
        weights = torch.tensor(self.weights[:limit])
        return Encoded(
            input_ids=torch.tensor(self.ids[:limit], dtype=torch.long),
            supervised=weights > 0,
            weights=None if {*self.weights} <= {0.0, 1.0} else weights,
            images=self.images,
            thoughts=self.thoughts,
            dropped_thoughts=self.dropped_thoughts,
        )


class SegmentEncoder(AnswerThinking):
    """The part of an encoder that appends segments to a growing conversation.

    Args:
        tokenizer: with a chat template, or without one (then `PLAIN_TEMPLATE` is used).
        system_prompt: replaces the default; empty: removes it. Without a system turn it stands before the question.
        thinking: handling of thinking in answers; see `ModelConfig.thinking`.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        image_token_id: int | None = None,
        tokens_per_image: int = 0,
        system_prompt: str | None = None,
        processor: Any = None,
        thinking: Thinking = "auto",
    ) -> None:
        self.tokenizer = tokenizer
        super().__init__(Template(tokenizer) if processor is None else ProcessorTemplate(processor), thinking)
        self.image_token_id, self.tokens_per_image = image_token_id, tokens_per_image
        self.system_prompt = system_prompt
        probe = self.template.plan(_PROBE)
        self.tokens = Tokens(tokenizer, structural=[slot.before for slot in probe.slots] + [probe.tail])
        self.notes = notes_of(str(self.template.source))
        # A model with a tokenizer that adds BOS was trained with it; LLaVA and the stock processor add it too.
        self._bos = self.template.missing_bos()

    def _add_scaffold(self, grown: GrowingConversation, text: str) -> None:
        """Append text of the template, with the pictures and videos that the template places itself."""
        start = 0
        for mark in self.template.media.finditer(text):
            grown.run += self.tokens.spans(text[start : mark.start()])
            self._add_image(grown)
            start = mark.end()
        grown.run += self.tokens.spans(text[start:])

    def _add_image(self, grown: GrowingConversation) -> None:
        placed: Placeholders = [int(self.image_token_id or 0)] * self.tokens_per_image
        if grown.pictures is not None:
            placed = grown.pictures[grown.images]
        if isinstance(placed, str):
            grown.run.append(TextSpan(placed, True))
            grown.images += 1
            return
        before, ids, behind = self._joined(tuple(placed))
        grown.run += [TextSpan(before, True)] if before else []
        self._flush(grown)
        grown.add(ids)
        grown.images += 1
        # LLaVA tokenises the text after a picture separately.
        grown.context = self.tokens.text_of(ids[-1]) if ids and not self.notes.faithful else ""
        grown.run += [TextSpan(behind, True)] if behind else []

    def _joined(self, ids: tuple[int, ...]) -> tuple[str, list[int], str]:
        """A picture's placeholder without the text around it, such as line breaks, which joins the text beside it."""
        own = [at for at, number in enumerate(ids) if number == self.image_token_id or number in self._added]
        if not own or (own[0] == 0 and own[-1] == len(ids) - 1):
            return "", list(ids), ""
        before, core, behind = list(ids[: own[0]]), list(ids[own[0] : own[-1] + 1]), list(ids[own[-1] + 1 :])
        texts = [str(self.tokenizer.decode(part, clean_up_tokenization_spaces=False)) for part in (before, behind)]
        if [self.tokens.encode([TextSpan(text, True)]) for text in texts] != [before, behind]:
            return "", list(ids), ""
        return texts[0], core, texts[1]

    @cached_property
    def _added(self) -> frozenset[int]:
        return frozenset(self.tokenizer.added_tokens_decoder)

    def _flush(self, grown: GrowingConversation) -> list[int]:
        """Tokenise the pending text as the continuation of the context; returns the ids of both."""
        ids = self.tokens.encode([TextSpan(grown.context, True), *grown.run])
        grown.add(ids[1:] if grown.context else ids)
        grown.run = []
        return ids

    def _add_answer(self, grown: GrowingConversation, answer: list[TextSpan], end: str, *, weight: float) -> None:
        before = [TextSpan(grown.context, True), *grown.run]
        prompt = self._flush(grown)
        grown.add(self._answer(before, answer, prompt), weight)
        if ending := self.tokens.special_end(end):
            grown.context = ending
            return
        if end and self.notes.faithful:
            grown.context = ""
            return
        eos = self.tokenizer.eos_token_id
        if eos is None:
            raise ConfigError("The chat template ends no answer and the tokenizer has no end-of-sequence token.")
        grown.add([int(eos)], weight)
        text = str(self.tokenizer.eos_token)
        grown.context = text if text in self.tokens.guarded else ""

    def _answer(self, before: list[TextSpan], answer: list[TextSpan], prompt: list[int]) -> list[int]:
        """Ids of an answer, tokenised so that the prompt before it keeps the ids that it has in inference."""
        whole = self.tokens.encode([*before, *answer])
        if whole[: len(prompt)] == prompt:
            return whole[len(prompt) :]
        return self.tokens.encode_behind(answer)  # tokenised together, prompt and answer would share a token

    def _end_of_turn(self, behind: str, tail: str) -> str:
        """The part of the scaffold that ends an answer: up to a special token, or the text that ends all; or empty."""
        last = self.tokens.first_special(tail)
        ending = self.tokens.first_special(behind)
        if last is not None and ending is not None and ending[0] == last[0]:
            return behind[: ending.end()]
        if last is not None or not self.notes.name or not behind.startswith(tail):
            return ""
        return tail.rstrip() or tail
