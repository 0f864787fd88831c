"""The scaffold of a chat template: its fixed text around the contents of a conversation.

A template is rendered once per sequence of roles with a marker in place of every content. The text between the markers
is the scaffold. A second rendering, with white space around the markers, detects templates that trim contents.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from transformers import PreTrainedTokenizerBase

from mm_moslora.data.chat.records import Turn
from mm_moslora.utils.errors import ConfigError

PLAIN_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ':\n' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:\n' }}{% endif %}"
)
"""For tokenizers without a chat template: `role:`, a line break, the content; end-of-sequence after an answer."""
_PLANS = 512
THINK, THINK_END = "<think>", "</think>"

# Letters, quotes and brackets reveal templates that change or escape contents; the symbol occurs in no template.
_MARK = "<&\"'\u241fSlot {}\u241f>"
_LEFT = {"keep": "\n \t", "lines": " \t", "space": ""}
"""Kind of trimming -> remainder of the white space that was put before a marker."""
_RIGHT = {"keep": "\t \n", "lines": "\t ", "space": ""}
"""The same for the white space after a marker."""


@dataclass(frozen=True, kw_only=True)
class Slot:
    """The place of one content."""

    before: str
    """Scaffold between the previous content and this one."""
    lead: str
    """Answers only: white space between the generation prompt and the answer, which the model writes itself."""
    left: str
    """What the template trims at the content's start: keep (nothing), space, or lines (line breaks)."""
    right: str
    """What the template trims at the content's end."""

    def trim(self, parts: Sequence[str]) -> list[str]:
        """A content, in parts around its images, trimmed as the template does."""
        result = list(parts)
        result[0] = {"keep": result[0], "space": result[0].lstrip(), "lines": result[0].lstrip("\n")}[self.left]
        last = result[-1]
        result[-1] = {"keep": last, "space": last.rstrip(), "lines": last.rstrip("\n")}[self.right]
        return result


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The scaffold of a sequence of roles."""

    slots: tuple[Slot, ...]
    tail: str
    """Scaffold after the last content."""


@dataclass(frozen=True, kw_only=True)
class Thought:
    """A template's form of an answer that begins with thinking."""

    before: str
    """Scaffold between the previous content and the text that the model writes."""
    opening: str
    """Text that the model writes before the thinking."""
    closing: str
    """Text that the model writes between the thinking and the answer."""


class Template:
    """The chat template of a tokenizer, or the plain one.

    Args:
        tokenizer: with or without a chat template.
    """

    image_text = ""
    """The template's text for a picture; empty where pictures are part of the contents."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        own = tokenizer.chat_template
        self.source = own if isinstance(own, str) else None if own is None else own.get("default")
        if self.source is None:
            start = "{{ bos_token }}" if _adds_bos(tokenizer) else ""
            self.source = start + PLAIN_TEMPLATE
        self._plans: dict[tuple[str, ...], Plan] = {}
        self._thoughts: dict[tuple[str, ...], Thought | None] = {}

    def lay_out(self, turns: Sequence[Turn]) -> tuple[list[Turn], tuple[str, ...], list[int]]:
        """The contents that need a slot each, the shape to plan for, and the turn that each content comes from."""
        return list(turns), tuple(turn.role for turn in turns), list(range(len(turns)))

    def plan(self, roles: tuple[str, ...]) -> Plan:
        """The scaffold of these roles.

        Raises:
            ConfigError: the template refuses the roles, leaves contents out, reorders or changes them.
        """
        plan = self._plans.get(roles)
        if plan is None:
            plan = self._make(roles)
            if len(self._plans) >= _PLANS:
                self._plans.clear()
            self._plans[roles] = plan
        return plan

    @property
    def knows_thinking(self) -> bool:
        """Whether the template handles `<think>` in an answer specially."""
        return THINK_END in str(self.source)

    def thought(self, roles: tuple[str, ...]) -> Thought | None:
        """The form of thinking at the start of the last of these roles, an answer; None where the template drops it."""
        if roles not in self._thoughts:
            if len(self._thoughts) >= _PLANS:
                self._thoughts.clear()
            self._thoughts[roles] = self._think(roles) if self.knows_thinking else None
        return self._thoughts[roles]

    def accepts(self, roles: tuple[str, ...]) -> bool:
        """Whether the template accepts these roles and renders all their contents."""
        try:
            self.plan(roles)
        except ConfigError:
            return False
        return True

    def missing_bos(self) -> list[int]:
        """The beginning-of-sequence id if the tokenizer adds one and the template does not; else nothing."""
        start = self.plan(("user", "assistant")).slots[0].before
        if not _adds_bos(self.tokenizer) or start.startswith(str(self.tokenizer.bos_token)):
            return []
        return [int(self.tokenizer.bos_token_id)]

    @cached_property
    def has_default_system(self) -> bool:
        """Whether the template writes its own system text where none is given."""
        if not self.accepts(("system", "user", "assistant")):
            return False
        header, between = (slot.before for slot in self.plan(("system", "user", "assistant")).slots[:2])
        without = self.plan(("user", "assistant")).slots[0].before
        rest = without[len(header) :] if without.startswith(header) else ""
        return bool(rest.strip()) and rest.lstrip() != between.lstrip()

    def _owners(self, roles: tuple[str, ...]) -> list[int]:
        """The turn number of every content."""
        return list(range(len(roles)))

    def _make(self, roles: tuple[str, ...]) -> Plan:
        owners = self._owners(roles)
        marks = [_MARK.format(index) for index in range(len(owners))]
        pieces = self._cut(self._render(roles, marks), marks, roles)
        wide = self._cut(self._render(roles, [_LEFT["keep"] + mark + _RIGHT["keep"] for mark in marks]), marks, roles)
        # Trimming at the end of one content and at the start of the next changes the same stretch of scaffold.
        trims = [
            _trims(pieces[index], wide[index], roles, first=index == 0, last=index == len(owners))
            for index in range(len(pieces))
        ]
        slots = []
        text = ""
        for index, turn in enumerate(owners):
            before, lead = pieces[index], ""
            text += before
            if roles[turn] == "assistant":
                lead = self._lead(roles[:turn], marks[:index], text)
                before = before[: len(before) - len(lead)]
            slots.append(Slot(before=before, lead=lead, left=trims[index][1], right=trims[index + 1][0]))
            text += marks[index]
        return Plan(slots=tuple(slots), tail=pieces[-1])

    def _think(self, roles: tuple[str, ...]) -> Thought | None:
        marks = [_MARK.format(index) for index in range(len(self._owners(roles)))]
        thinking, answer = _MARK.format("think"), marks[-1]
        text = self._render(roles, [*marks[:-1], f"{THINK}\n{thinking}\n{THINK_END}\n\n{answer}"])
        prompt = self._render(roles[:-1], marks[:-1], prompt=True)
        opening, shown, rest = text.removeprefix(prompt).partition(thinking)
        closing, found, _ = rest.partition(answer)
        if not (text.startswith(prompt) and shown and found):
            return None
        return Thought(before=prompt.rpartition(marks[-2])[2], opening=opening, closing=closing)

    def _lead(self, roles: tuple[str, ...], marks: list[str], text: str) -> str:
        """White space after the generation prompt, which the model writes itself.

        Any other text between the generation prompt and an answer (an empty thinking block, a header of a template
        without a generation prompt) belongs to the prompt, both in training and in inference.
        """
        prompt = self._render(roles, marks, prompt=True)
        rest = text.removeprefix(prompt)
        return rest if len(rest) < len(text) and not rest.strip() else ""

    def _cut(self, text: str, marks: list[str], roles: tuple[str, ...]) -> list[str]:
        pieces = []
        for mark in marks:
            before, found, text = text.partition(mark)
            if not found:
                raise ConfigError(
                    "The tokenizer's chat template leaves out, reorders or changes contents, so labels cannot be built "
                    f"for the roles {', '.join(roles)}. Use another template."
                )
            pieces.append(before)
        return [*pieces, text]

    def _messages(self, roles: Sequence[str], contents: Sequence[str]) -> list[dict[str, Any]]:
        """The messages for the template; `ProcessorTemplate` has contents of several parts."""
        return [{"role": role, "content": text} for role, text in zip(roles, contents, strict=True)]

    def _render(self, roles: Sequence[str], contents: Sequence[str], *, prompt: bool = False) -> str:
        messages = self._messages(roles, contents)
        try:
            text = self.tokenizer.apply_chat_template(
                messages, chat_template=self.source, tokenize=False, add_generation_prompt=prompt
            )
        except Exception as error:  # templates may raise any exception
            raise ConfigError(f"The tokenizer's chat template refuses the roles {', '.join(roles)}: {error}") from error
        return str(text)


def _trims(plain: str, wide: str, roles: tuple[str, ...], *, first: bool, last: bool) -> tuple[str, str]:
    """The trimming at the end of the content before a stretch of scaffold, and at the start of the content after it."""
    for right, behind in ({"keep": ""} if first else _RIGHT).items():
        for left, ahead in ({"keep": ""} if last else _LEFT).items():
            if behind + plain + ahead == wide:
                return right, left
    raise ConfigError(
        f"The tokenizer's chat template changes contents, so labels cannot be built for the roles {', '.join(roles)}. "
        "Use another template."
    )


def _adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    return tokenizer.bos_token_id is not None and tokenizer.encode("a")[:1] == [tokenizer.bos_token_id]
