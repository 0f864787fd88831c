"""Encodes turns as token ids, each with a supervised flag, and with a weight where answers weigh differently.

Shapes: ``T`` tokens of one conversation.

The scaffold of the chat template (`chat_template`) may contain special tokens; contents are plain text even where they
spell them. Token ids and weights are appended together, segment by segment, so labels need no
search for turns. Training and inference share every step: a prompt is a training conversation that stops where the
answer begins.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Protocol

import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from mm_moslora.batch import Placeholders
from mm_moslora.config import Thinking
from mm_moslora.config.llava_chat_templates import notes_of
from mm_moslora.data.chat.answer_thinking import (
    EXCHANGE,
    THINK,
    WITH_BLOCK,
    AnswerThinking,
    masked_block,
    says_something,
    thinks,
    written,
)
from mm_moslora.data.chat.chat_template import ProcessorTemplate, Template, TemplatePlan, data_of
from mm_moslora.data.chat.guarded_tokens import TextSpan, Tokens, marked_spans
from mm_moslora.data.chat.record_turns import IMAGE, Turn
from mm_moslora.data.record_faults import Code
from mm_moslora.utils.errors import ConfigError, DataError
from mm_moslora.utils.identity import sha256_of_text

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


class UnrenderedTools(DataError):  # noqa: N818  (the name of the fault)
    """The chat template leaves out or refuses tools, their calls or their results."""

    code = Code.TOOLS_NOT_RENDERED


class UnlearnedThinking(DataError):  # noqa: N818  (the name of the fault)
    """An answer is thinking alone, and its thinking is not learned."""

    code = Code.EMPTY_ANSWER


class TooLong(DataError):  # noqa: N818  (the name of the fault)
    """Not even the first question and answer fit."""

    code = Code.TOO_LONG


class EncoderParts(Protocol):
    """The attributes of a model that an encoder needs; see `ConversationEncoder`."""

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """With a chat template or without."""

    @property
    def tokens_per_image(self) -> int:
        """Placeholders per image."""

    @property
    def image_token_id(self) -> int | None:
        """Vocabulary id of the placeholder."""

    @property
    def template_processor(self) -> Any:
        """Processor of a ready-made model."""

    @property
    def thinking(self) -> Thinking:
        """The recipe's `model.thinking`."""


class ConversationEncoder(AnswerThinking):
    """Tokenises conversations for one tokenizer and its chat template.

    Args:
        tokenizer: with a chat template, or without one (then `PLAIN_TEMPLATE` is used).
        system_prompt: replaces the default; empty: removes it. Without a system turn it stands before the question.
        thinking: handling of thinking in answers; see `ModelConfig.thinking`.

    Raises:
        ConfigError: the template cannot be split into scaffold and contents, or no token ends an answer.
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

    @classmethod
    def of(cls, parts: EncoderParts) -> ConversationEncoder:
        """Make the encoder of an assembled model, or of the parts that are loaded to prepare data."""
        return cls(
            parts.tokenizer,
            image_token_id=parts.image_token_id,
            tokens_per_image=parts.tokens_per_image,
            processor=parts.template_processor,
            thinking=parts.thinking,
        )

    def fingerprint(self) -> str:
        """A hash of everything that determines the ids of a conversation."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        vocabulary = backend.to_str() if isinstance(backend, Tokenizer) else sorted(self.tokenizer.get_vocab().items())
        parts = (
            type(self.tokenizer).__name__, vocabulary, self.template.source, self.tokenizer.special_tokens_map,
            self.image_token_id, self.tokens_per_image, self.system_prompt, self._bos,
            self.thinking,
        )  # fmt: skip
        return sha256_of_text(repr(parts))

    def encode(
        self,
        turns: Sequence[Turn],
        *,
        max_length: int | None = None,
        pictures: Sequence[Placeholders] | None = None,
        truncate: bool = False,
        whole: bool = False,
    ) -> Encoded:
        """Tokenise a conversation for training.

        Args:
            turns: an optional system turn, then questions and answers in turn, ending with an answer; or a plain text.
            max_length: tokens; whole question-answer pairs are dropped from the end until the rest fits.
            pictures: placeholders of every picture and video, where they depend on it; None: all alike.
            truncate: cut a longer text off instead, within an answer too, where it has no pictures.
            whole: supervise every token but the first and those of answers that weigh 0; for texts without pictures.

        Raises:
            TooLong: not even the first pair fits, or no supervised token would be left.
            UnlearnedThinking: a learned answer would be its end of turn alone.
            DataError: a text spells special tokens and the tokenizer cannot read them as text.
        """
        if len(turns) == 1 and turns[0].role == "document":
            return self._document(turns[0], max_length, truncate=truncate)
        if not turns or turns[-1].role != "assistant":
            raise DataError("The conversation does not end with an answer, so there is nothing to train on.")
        grown = self._grow(turns, pictures, whole=whole)
        if max_length is None or len(grown.ids) <= max_length:
            return grown.encoded()
        if truncate and not grown.images and any(grown.weights[:max_length]):
            fitting = max((count for count, length in grown.ends if length <= max_length), default=0)
            return replace(grown.encoded(max_length), dropped_turns=len(turns) - fitting)
        # Pairs go from the end alone, so the last answers of long records are never learned.
        for count, length in reversed(grown.ends[:-1]):
            if length <= max_length:
                # Encoded again, because some templates write the last turn differently.
                shorter = self._grow(turns[:count], pictures, whole=whole)
                if len(shorter.ids) <= max_length and any(shorter.weights):
                    return replace(shorter.encoded(), dropped_turns=len(turns) - count)
        first = grown.ends[0][1]
        what = f"the first question and answer take {first} tokens" if first > max_length else "no learned answer fits"
        raise TooLong(f"{what}, data.max_length is {max_length}; raise data.max_length or shorten the record")

    def encode_prompt(
        self, turns: Sequence[Turn], *, pictures: Sequence[Placeholders] | None = None, thinking: bool | None = None
    ) -> Tensor:
        """Tokenise a prompt: int64 ``[T]``, which ends where the answer begins.

        Args:
            turns: ends with a question.
            thinking: ask to think, or to answer at once; None: in the form of `self.thinking`.
        """
        if not turns or turns[-1].role not in ("user", "tool"):
            raise DataError("The conversation does not end with a question, so there is nothing to answer.")
        if thinking is not None:
            return self.asking("always" if thinking else "auto").encode_prompt(turns, pictures=pictures)
        grown = self._grow([*turns, Turn(role="assistant", text="")], pictures, prompt=True)
        return torch.tensor(grown.ids, dtype=torch.long)

    def encode_answer(self, text: str) -> list[int]:
        """Token ids of an answer after a generation prompt, as in training, without the end of turn."""
        plan = self.template.plan(EXCHANGE)
        thought = self.thought(EXCHANGE) if self.writes_block else None
        thinking, text = self.apart(text) if thought else (None, text)
        before = thought.before if thought else plan.slots[1].before
        prompt = [TextSpan(plan.slots[0].before, True), TextSpan("a", False), TextSpan(before, True)]
        lead = written(thought, thinking or "") if thought else [TextSpan(plan.slots[1].lead, True)]
        answer = [*lead, TextSpan(plan.slots[1].trim([text])[0], False)]
        return self._answer(prompt, answer, self.tokens.encode(prompt))

    def decode_answer(self, ids: Sequence[int]) -> str:
        """The text of a generated answer, without special tokens and without the template's space before it.

        An answer that is put back into the conversation as this text gives the same tokens again.
        """
        text = str(self.tokenizer.decode(list(ids), skip_special_tokens=True))
        return text.removeprefix(self.template.plan(EXCHANGE).slots[1].lead)

    def _grow(
        self,
        turns: Sequence[Turn],
        pictures: Sequence[Placeholders] | None = None,
        *,
        prompt: bool = False,
        whole: bool = False,
    ) -> GrowingConversation:
        """Tokenise turns, up to the last answer of a `prompt`; `whole`: supervise questions and scaffold, too."""
        turns, added = self._with_system(turns)
        turns = [self._hidden(turn) for turn in turns]
        contents, shape, numbers = self.template.lay_out([self._without_block(turn) for turn in turns])
        turns = [
            turns[number] if turn.role == "assistant" else turn for turn, number in zip(contents, numbers, strict=True)
        ]
        plan = self._plan(shape)
        grown = GrowingConversation(pictures=pictures, base=float(whole))
        grown.add(self._bos)
        scaffold = [*(slot.before for slot in plan.slots), plan.tail]
        for index, (turn, slot) in enumerate(zip(turns, plan.slots, strict=True)):
            if turn.role != "assistant":
                self._add_scaffold(grown, scaffold[index])
                parts = turn.parts() if self.image_token_id is not None else [turn.text]
                for number, part in enumerate(slot.trim(parts)):
                    if number:
                        self._add_image(grown)
                    grown.run += marked_spans(turn, [TextSpan(part, False)])
                continue
            may_think = self.thinking in WITH_BLOCK or THINK in turn.text
            thinking, text = self.apart(turn.text) if may_think else (None, turn.text)
            shown = thinking is not None and self.thinking != "never" and index == len(turns) - 1
            thought = self.thought((*shape[:-1], "assistant")) if shown else None
            if thinking:
                grown.thoughts += thought is not None
                grown.dropped_thoughts += thought is None
            elif may_think and not self.knows_thinking:
                grown.thoughts += thinks(text)
            self._add_scaffold(grown, thought.before if thought else scaffold[index])
            if prompt and index == len(turns) - 1:
                self._flush(grown)
                return grown
            end = slot.calls or self._end_of_turn(scaffold[index + 1], plan.tail)
            content = slot.trim([text])[0]
            block = written(thought, thinking or "") if thought else [TextSpan(slot.lead, True)]
            if self.thinking == "mask":
                if length := 0 if self.knows_thinking else masked_block(content):
                    block.append(TextSpan(content[:length], False))
                    content = content[length:]
                if thought or length:  # in tokens of its own, as a part of the prompt
                    grown.run += marked_spans(turn, block)
                    block = []
            said = "".join(span.text for span in (*block, TextSpan(content, False)) if not span.trusted)
            learns = may_think and turn.weight and turn.text.strip()
            if learns and not (prompt or turn.tools or says_something(said)):
                raise UnlearnedThinking(
                    f"conversations[{numbers[index] - added}] is thinking alone, which model.thinking or the chat "
                    "template leaves out of what is learned; write an answer behind it, or drop the record"
                )
            answer = [*marked_spans(turn, [*block, TextSpan(content, False)]), *self.tokens.spans(end)]
            self._add_answer(grown, answer, end, weight=turn.weight)
            scaffold[index + 1] = scaffold[index + 1][len(end) :]
            grown.ends.append((numbers[index] + 1 - added, len(grown.ids)))
        if whole:
            grown.weights[0] = 0.0
        return grown

    def _document(self, turn: Turn, limit: int | None, *, truncate: bool) -> Encoded:
        """Tokenise a plain text: all of it is supervised, and its end; no chat template is used."""
        grown = GrowingConversation()
        grown.add(self._bos)
        grown.base = 1.0
        grown.run.append(TextSpan(turn.text, False))
        self._flush(grown)
        if self.tokenizer.eos_token_id is not None:
            grown.add([int(self.tokenizer.eos_token_id)])
        if limit is None or len(grown.ids) <= limit:
            return grown.encoded()
        if not truncate or not any(grown.weights[:limit]):
            raise TooLong(f"no text fits, data.max_length is {limit}; raise data.max_length or cut the document up")
        return replace(grown.encoded(limit), dropped_turns=1)

    def _with_system(self, turns: Sequence[Turn]) -> tuple[list[Turn], int]:
        """The turns with the system prompt, and the number of turns added for it."""
        if self.notes.name == "plain":  # captions are learned from pictures alone
            spoken = [turn for turn in turns if turn.role != "system"]
            alone = [
                replace(turn, text=IMAGE * turn.images, offsets=None) if turn.role == "user" else turn
                for turn in spoken
            ]
            return alone, len(spoken) - len(turns)
        own = turns[0].role == "system"
        if not own and (self.system_prompt is None or not (self.system_prompt or self.template.has_default_system)):
            return list(turns), 0
        tools, uses_tools = turns[0].tools, any(turn.tools for turn in turns)
        system = replace(turns[0] if own else Turn(role="system", text=self.system_prompt or ""), tools=tools)
        rest = list(turns[1:] if own else turns)
        if self.template.accepts(("system", *(EXCHANGE if uses_tools else (turn.role for turn in rest)))):
            return [system, replace(rest[0], tools=""), *rest[1:]], int(not own)
        if system.text and rest:
            rest[0] = rest[0].preceded_by(f"{system.text}\n\n")
        return [replace(rest[0], tools=tools), *rest[1:]], -int(own)

    def _hidden(self, turn: Turn) -> Turn:
        """The turn with private names of special tokens in what goes through the template; see `Tokens.hidden`."""
        text = self.tokens.hidden(turn.text) if turn.role == "tool" else turn.text
        return replace(turn, text=text, tools=self.tokens.hidden(turn.tools)) if turn.tools else turn

    def _without_block(self, turn: Turn) -> Turn:
        """The turn without its thinking where it calls tools: such an answer may have no text besides."""
        calls = turn.role == "assistant" and turn.tools
        return replace(turn, text=self.apart(turn.text)[1]) if calls else turn

    def _plan(self, shape: tuple[str, ...]) -> TemplatePlan:
        try:
            return self.template.plan(shape)
        except ConfigError as error:
            if not any(data_of(part) for part in shape):
                raise
            remedy = "name another template by model.chat_template, or leave out records with tools"
            what = str(error).removesuffix(" Use another template.").rstrip(".")
            raise UnrenderedTools(f"{what}; {remedy}") from error

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
