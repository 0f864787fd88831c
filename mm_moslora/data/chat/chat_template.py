"""A tokenizer's chat template: its scaffold, and the tokens of scaffold and contents.

The scaffold is the fixed text around the contents of a conversation. A template is rendered once per sequence of roles
with a marker in place of every content. The text between the markers is the scaffold. A second rendering, with white
space around the markers, detects templates that trim contents.

Special tokens are recognised in the scaffold, which is trusted, and never in contents, which come from users. Both are
tokenised together, as one string, so that ordinary text gives exactly the tokenizer's ids for the whole. If a content
spells a special token, a second tokenizer is used: a copy in which the special tokens have private names. The scaffold
is rewritten with these names. Contents are not, so they cannot match them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from mm_moslora.config.llava_chat_templates import without_note
from mm_moslora.data.chat.record_keys import REASONING
from mm_moslora.data.chat.records import Turn
from mm_moslora.data.record_faults import Code
from mm_moslora.utils.errors import ConfigError, DataError

PLAIN_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ':\n' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:\n' }}{% endif %}"
)
"""For tokenizers without a chat template: `role:`, a line break, the content; end-of-sequence after an answer."""
_PLANS = 512
THINK, THINK_END = "<think>", "</think>"
_ANCHORS = ("\n", "a", ".", "0", "\u4e2d")
"""Texts before which the tokens of a continuation are found."""

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
    """Trimming at the content's start: keep (none), space, or lines (line breaks)."""
    right: str
    """Trimming at the content's end."""

    def trim(self, parts: Sequence[str]) -> list[str]:
        """A content, in parts around its images, trimmed as the template does."""
        result = list(parts)
        result[0] = {"keep": result[0], "space": result[0].lstrip(), "lines": result[0].lstrip("\n")}[self.left]
        last = result[-1]
        result[-1] = {"keep": last, "space": last.rstrip(), "lines": last.rstrip("\n")}[self.right]
        return result


@dataclass(frozen=True, kw_only=True)
class TemplatePlan:
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
    """The chat template of a tokenizer, or the plain one."""

    image_text = ""
    """The template's text for a picture; empty where pictures are part of the contents."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        own = tokenizer.chat_template
        source = own if isinstance(own, str) else None if own is None else own.get("default")
        if source is None:
            source = ("{{ bos_token }}" if _adds_bos(tokenizer) else "") + PLAIN_TEMPLATE
        self.source = without_note(source)
        self._plans: dict[tuple[str, ...], TemplatePlan] = {}
        self._thoughts: dict[tuple[str, ...], Thought | None] = {}

    def lay_out(self, turns: Sequence[Turn]) -> tuple[list[Turn], tuple[str, ...], list[int]]:
        """The contents that need a slot each, the shape to plan for, and the turn number of each content."""
        return list(turns), tuple(turn.role for turn in turns), list(range(len(turns)))

    def plan(self, roles: tuple[str, ...]) -> TemplatePlan:
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
        """The beginning-of-sequence id if the tokenizer adds one and the template does not; else empty."""
        start = self.plan(("user", "assistant")).slots[0].before
        if not _adds_bos(self.tokenizer) or start.startswith(str(self.tokenizer.bos_token)):
            return []
        return [int(self.tokenizer.bos_token_id)]

    @cached_property
    def has_default_system(self) -> bool:
        """Whether the template writes a default system text for a conversation without one."""
        if not self.accepts(("system", "user", "assistant")):
            return False
        header, between = (slot.before for slot in self.plan(("system", "user", "assistant")).slots[:2])
        without = self.plan(("user", "assistant")).slots[0].before
        rest = without[len(header) :] if without.startswith(header) else ""
        return bool(rest.strip()) and rest.lstrip() != between.lstrip()

    def _owners(self, roles: tuple[str, ...]) -> list[int]:
        """The turn number of every content."""
        return list(range(len(roles)))

    def _make(self, roles: tuple[str, ...]) -> TemplatePlan:
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
        return TemplatePlan(slots=tuple(slots), tail=pieces[-1])

    def _think(self, roles: tuple[str, ...]) -> Thought | None:
        """Render an answer that thinks behind the generation prompt: the template's own, or that with thinking on."""
        marks = [_MARK.format(index) for index in range(len(self._owners(roles)))]
        thinking, answer = _MARK.format("think"), marks[-1]
        texts = [self._render(roles, [*marks[:-1], f"{THINK}\n{thinking}\n{THINK_END}\n\n{answer}"])]
        texts += [self._render(roles, marks, reasoning={key: thinking}) for key in REASONING]
        switches: tuple[dict[str, Any], ...] = ({}, {"enable_thinking": True})
        for switch in switches:
            prompt = self._render(roles[:-1], marks[:-1], prompt=True, **switch)
            for text in texts:
                opening, shown, rest = text.removeprefix(prompt).partition(thinking)
                closing, found, _ = rest.partition(answer)
                if text.startswith(prompt) and shown and found and THINK_END not in opening:
                    return Thought(before=prompt.rpartition(marks[-2])[2], opening=opening, closing=closing)
        return None

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

    def generation_prompt(self) -> str:
        """The text that the template itself writes between a question and the answer to generate."""
        mark = _MARK.format(0)
        return self._render(("user",), [mark], prompt=True).rpartition(mark)[2]

    def _render(
        self,
        roles: Sequence[str],
        contents: Sequence[str],
        *,
        prompt: bool = False,
        reasoning: dict[str, str] | None = None,
        **switch: Any,
    ) -> str:
        messages = self._messages(roles, contents)
        messages[-1] |= reasoning or {}
        try:
            text = self.tokenizer.apply_chat_template(
                messages, chat_template=self.source, tokenize=False, add_generation_prompt=prompt, **switch
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


class TextSpan(NamedTuple):
    """A stretch of text."""

    text: str
    trusted: bool
    """Whether special tokens are recognised in it."""


class SpecialTextError(DataError):
    """Untrusted text spells special tokens and this tokenizer cannot read them as text."""

    code = Code.SPECIAL_TEXT


class Tokens:
    """Tokenises pieces.

    Args:
        tokenizer: a fast tokenizer (a slow one works until untrusted text spells a special token).
        structural: texts of the chat template. Added tokens that occur in them are guarded too, special or not, because
            a user could forge a turn by typing them.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, structural: Iterable[str] = ()) -> None:
        self.tokenizer = tokenizer
        scaffold = "\n".join(structural)
        added = {str(token): (number, token.special) for number, token in tokenizer.added_tokens_decoder.items()}
        named = set(tokenizer.all_special_tokens)
        self.guarded: dict[str, int] = {
            text: number
            for text, (number, special) in added.items()
            if text.strip() and (special or text in named or text in scaffold)
        }
        """Text and id of every token that untrusted text must not be encoded as."""
        longest_first = sorted(self.guarded, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        self._counted = set(self.guarded.values()) - {tokenizer.unk_token_id}  # unknown characters give unk, too
        self._copy: Tokenizer | None = None
        self._names: dict[str, str] = {}
        self._back: dict[int, int] = {}

    def text_of(self, number: int) -> str:
        """The text of a guarded token; empty for any other id."""
        text = self.tokenizer.convert_ids_to_tokens(number)
        return text if isinstance(text, str) and text in self.guarded else ""

    def first_special(self, text: str) -> re.Match[str] | None:
        """The first guarded token that a text spells."""
        return self._pattern.search(text)

    def encode(self, pieces: Sequence[TextSpan]) -> list[int]:
        """Token ids of consecutive pieces.

        Raises:
            SpecialTextError: untrusted text spells a special token and the tokenizer is not a fast one.
        """
        text = "".join(piece.text for piece in pieces)
        if not text:
            return []
        wanted = [
            self.guarded[match[0]] for piece in pieces if piece.trusted for match in self._pattern.finditer(piece.text)
        ]
        wanted = [number for number in wanted if number in self._counted]
        if not any(not piece.trusted and self._pattern.search(piece.text) for piece in pieces):
            ids = list(self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=False))
            if [number for number in ids if number in self._counted] == wanted:
                return ids
        return self._encode_guarded(pieces, wanted)

    def encode_behind(self, pieces: Sequence[TextSpan]) -> list[int]:
        """Token ids of pieces in the middle of a text, without the prefix that a tokenizer adds at its start."""
        for anchor in _ANCHORS:
            lead = self.encode([TextSpan(anchor, False)])
            ids = self.encode([TextSpan(anchor, False), *pieces])
            if ids[: len(lead)] == lead:
                return ids[len(lead) :]
        return self.encode(pieces)

    def _encode_guarded(self, pieces: Sequence[TextSpan], wanted: list[int]) -> list[int]:
        if self._copy is None:
            self._copy = self._private_copy()
        text = "".join(
            self._pattern.sub(lambda match: self._names[match[0]], piece.text) if piece.trusted else piece.text
            for piece in pieces
        )
        ids = [self._back.get(number, number) for number in self._copy.encode(text, add_special_tokens=False).ids]
        if [number for number in ids if number in self._counted] != wanted:
            raise SpecialTextError(
                f"text {ascii(text)[:120]} spells special tokens in a way that cannot be kept apart; "
                "remove them from the text"
            )
        return ids

    def _private_copy(self) -> Tokenizer:
        """A copy of the tokenizer with private names of the guarded tokens, which no text spells."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if not isinstance(backend, Tokenizer):
            raise SpecialTextError(
                f"the text spells special tokens, and {type(self.tokenizer).__name__} is not a fast tokenizer, so they "
                "cannot be read as text; remove them from the text, or use a fast tokenizer"
            )
        self._names = {text: f"\ue0f1\ue0f2{number}\ue0f3" for text, number in self.guarded.items()}
        copy = Tokenizer(backend.model)  # shares the vocabulary
        if backend.normalizer is not None:
            copy.normalizer = backend.normalizer
        if backend.pre_tokenizer is not None:
            copy.pre_tokenizer = backend.pre_tokenizer
        known = dict(sorted(backend.get_added_tokens_decoder().items()))
        for token in known.values():
            token.content = self._names.get(token.content, token.content)
        copy.add_tokens(list(known.values()))
        # Tokens of the base vocabulary get new ids under their private names.
        for number, token in known.items():
            found = copy.token_to_id(token.content)
            if found is None:
                raise ConfigError(f"The tokenizer cannot be copied: its token {token.content!r} is lost.")
            if found != number:
                self._back[found] = number
        if any(backend.model.id_to_token(number) is not None for number in self._back):
            raise ConfigError("The tokenizer cannot be copied: ids of its vocabulary are not consecutive.")
        return copy
