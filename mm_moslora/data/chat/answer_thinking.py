"""Thinking at the start of answers: the form that a chat template gives it, and the prompt that asks for it."""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass
from typing import Any, Self

from mm_moslora.config import Thinking
from mm_moslora.data.chat.chat_template import MARK, Template, remembered
from mm_moslora.data.chat.guarded_tokens import TextSpan
from mm_moslora.data.chat.record_keys import REASONING

THINK, THINK_END = "<think>", "</think>"
WITH_BLOCK = ("always", "mask")
"""Values of `model.thinking` with which every last answer has a block."""
EXCHANGE = ("user", "assistant")
"""The shortest conversation."""
_BLOCK = re.compile(rf"\s*{THINK}(.*?){THINK_END}\s*", re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class Thought:
    """A template's form of an answer that begins with thinking."""

    before: str
    """Scaffold between the previous content and the text that the model writes."""
    opening: str
    """Text that the model writes before the thinking."""
    closing: str
    """Text that the model writes between the thinking and the answer."""


class AnswerThinking:
    """The part of an encoder that handles thinking."""

    def __init__(self, template: Template, thinking: Thinking) -> None:
        self.template, self.thinking = template, thinking
        self._thoughts: dict[tuple[str, ...], Thought | None] = {}

    def thought(self, roles: tuple[str, ...]) -> Thought | None:
        """The form of thinking at the start of the last of these roles, an answer; None where the template drops it."""
        return remembered(self._thoughts, roles, self._new_thought)

    @property
    def knows_thinking(self) -> bool:
        """Whether the template handles `<think>` in an answer specially."""
        return THINK_END in str(self.template.source)

    def asking(self, thinking: Thinking) -> Self:
        """The same encoder with another form of thinking."""
        other = copy.copy(self)
        other.thinking = thinking
        return other

    @property
    def learns_thinking(self) -> bool:
        """Whether thinking at the start of an answer can be learned: the template renders it, or takes it as text."""
        return not self.knows_thinking or self.thought(EXCHANGE) is not None

    @property
    def writes_block(self) -> bool:
        """Whether the block of the last answer, empty or not, belongs to what the model writes."""
        return self.thinking in WITH_BLOCK

    @property
    def asks_to_think(self) -> bool:
        """Whether prompts leave it to the model to think before it answers."""
        return self.writes_block and self.learns_thinking

    @property
    def has_switch(self) -> bool:
        """Whether the template has two forms of prompts: one to think, one to answer at once."""
        thought = self.thought(EXCHANGE)
        return thought is not None and thought.before != self.template.plan(EXCHANGE).slots[1].before

    @property
    def answer_prompt(self) -> str:
        """The text between a question and the answer to generate."""
        thought = self.thought(EXCHANGE) if self.asks_to_think else None
        return thought.before if thought else self.template.plan(EXCHANGE).slots[1].before

    def opened(self, thinking: bool | None = None) -> str:
        """The part of a thinking block that a prompt itself holds at its end; see `encode_prompt`."""
        thought = self.thought(EXCHANGE) if (self.asks_to_think if thinking is None else thinking) else None
        _, opening, rest = thought.before.rpartition(THINK) if thought else ("", "", "")
        return opening + rest if opening and THINK_END not in rest else ""

    def apart(self, text: str) -> tuple[str | None, str]:
        """The thinking at the start of an answer (None: the template's form without thinking), and the rest."""
        block = _BLOCK.match(text) if self.knows_thinking or self.thinking == "never" else None
        thinking = block[1].strip("\n") if block else None
        if self.writes_block:
            thinking = thinking or ""
        return thinking, text[block.end() :] if block else text

    def _new_thought(self, roles: tuple[str, ...]) -> Thought | None:
        """Render an answer that thinks behind the generation prompt: the template's own, or that with thinking on."""
        if not self.knows_thinking:
            return None
        marks = [MARK.format(index) for index in range(len(self.template.owners(roles)))]
        thinking, answer = MARK.format("think"), marks[-1]
        # Templates that know a key may pass a block in the text through, and close it otherwise themselves (Nemotron).
        texts = [self.template.render(roles, marks, reasoning={key: thinking}) for key in REASONING]
        texts += [self.template.render(roles, [*marks[:-1], f"{THINK}\n{thinking}\n{THINK_END}\n\n{answer}"])]
        switches: tuple[dict[str, Any], ...] = ({}, {"enable_thinking": True})
        for switch in switches:
            prompt = self.template.render(roles[:-1], marks[:-1], prompt=True, **switch)
            for text in texts:
                opening, shown, rest = text.removeprefix(prompt).partition(thinking)
                closing, ending, _ = rest.partition(answer)
                if text.startswith(prompt) and shown and ending and THINK_END not in opening:
                    return Thought(before=prompt.rpartition(marks[-2])[2], opening=opening, closing=closing)
        return None


def written(thought: Thought, thinking: str) -> list[TextSpan]:
    """The text that the model writes before the answer itself."""
    return [TextSpan(thought.opening, True), TextSpan(thinking, False), TextSpan(thought.closing, True)]


def masked_block(text: str) -> int:
    """Characters of the block of thinking at the start of an answer that is plain text; 0 without one."""
    block = _BLOCK.match(text)
    return block.end() if block else 0


def begins_with_block(answer: str) -> bool:
    """Whether an answer begins with a block of thinking, empty or not."""
    return _BLOCK.match(answer) is not None


def thinks(answer: str) -> bool:
    """Whether an answer begins with thinking that is not empty."""
    block = _BLOCK.match(answer)
    return block is not None and bool(block[1].strip())


def says_something(learned: str) -> bool:
    """Whether what is learned of an answer is more than an empty block of thinking."""
    return thinks(learned) or bool(learned[masked_block(learned) :].strip())
