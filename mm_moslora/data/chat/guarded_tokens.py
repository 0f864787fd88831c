"""Token ids of scaffold and contents of a chat template.

Special tokens are recognised in the scaffold, which is trusted, and never in contents, which come from users. Both are
tokenised as one string, so that ordinary text gives exactly the tokenizer's ids. If a content spells a special token, a
copy of the tokenizer is used in which the special tokens have private names, and the scaffold is rewritten with these.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import NamedTuple

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from mm_moslora.data.boxes.box_forms import SPECIAL
from mm_moslora.data.chat.record_turns import Turn
from mm_moslora.data.record_faults import Code
from mm_moslora.utils.errors import ConfigError, DataError

PRIVATE = "\ue0f1\ue0f2{}\ue0f3"
"""The private name of a token, from its id."""
PRIVATE_NAME = re.compile("\ue0f1\ue0f2([0-9]{1,9})\ue0f3")
_ANCHORS = ("\n", "a", ".", "0", "\u4e2d")
"""Texts before which the tokens of a continuation are found."""
_SPECIAL = re.compile(f"{SPECIAL[0]}([^{SPECIAL[1]}]*){SPECIAL[1]}")


class SpecialTextError(DataError):
    """Untrusted text spells special tokens and this tokenizer cannot read them as text."""

    code = Code.SPECIAL_TEXT


class RenamedTokens:
    """A copy of a fast tokenizer with private names of the guarded tokens, which no text spells."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, guarded: Mapping[str, int]) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if not isinstance(backend, Tokenizer):
            raise SpecialTextError(
                f"the text spells special tokens, and {type(tokenizer).__name__} is not a fast tokenizer, so they "
                "cannot be read as text; remove them from the text, or use a fast tokenizer"
            )
        self.names = {text: PRIVATE.format(number) for text, number in guarded.items()}
        """Text of a guarded token -> its private name."""
        self._copy = Tokenizer(backend.model)  # shares the vocabulary
        if backend.normalizer is not None:
            self._copy.normalizer = backend.normalizer
        if backend.pre_tokenizer is not None:
            self._copy.pre_tokenizer = backend.pre_tokenizer
        added = dict(sorted(backend.get_added_tokens_decoder().items()))
        for token in added.values():
            token.content = self.names.get(token.content, token.content)
        self._copy.add_tokens(list(added.values()))
        # Tokens of the base vocabulary get new ids under their private names.
        self._ids: dict[int, int] = {}
        for number, token in added.items():
            renamed = self._copy.token_to_id(token.content)
            if renamed is None:
                raise ConfigError(f"The tokenizer cannot be copied: its token {token.content!r} is lost.")
            if renamed != number:
                self._ids[renamed] = number
        if any(backend.model.id_to_token(number) is not None for number in self._ids):
            raise ConfigError("The tokenizer cannot be copied: ids of its vocabulary are not consecutive.")

    def encode(self, text: str) -> list[int]:
        """Token ids of a text with private names, as the tokenizer itself numbers them."""
        return [self._ids.get(number, number) for number in self._copy.encode(text, add_special_tokens=False).ids]


class TextSpan(NamedTuple):
    """A stretch of text."""

    text: str
    trusted: bool
    """Whether special tokens are recognised in it."""


def marked_spans(turn: Turn, spans: Sequence[TextSpan]) -> list[TextSpan]:
    """The spans of a turn, with the special tokens apart that this project itself wrote into its texts."""
    if not turn.marked:
        return list(spans)
    return [
        TextSpan(text, span.trusted or bool(number % 2))
        for span in spans
        for number, text in enumerate(_SPECIAL.split(span.text))
        if text
    ]


class Tokens:
    """Tokenises spans, with a slow tokenizer too until untrusted text spells a special token.

    Added tokens that occur in `structural`, the texts of the chat template, are guarded too, special or not, because a
    user could forge a turn by typing them.
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

    def text_of(self, number: int) -> str:
        """The text of a guarded token; empty for any other id."""
        text = self.tokenizer.convert_ids_to_tokens(number)
        return text if isinstance(text, str) and text in self.guarded else ""

    def first_special(self, text: str) -> re.Match[str] | None:
        """The first guarded token that a text spells."""
        return self._pattern.search(text)

    def special_end(self, text: str) -> str:
        """The guarded token at the end of a text; empty where there is none."""
        *_, last = ["", *(match[0] for match in self._pattern.finditer(text) if match.end() == len(text))]
        return last

    def hidden(self, text: str) -> str:
        """A text of a user that goes through the chat template: guarded tokens have private names; see `spans`."""
        return self._pattern.sub(lambda match: PRIVATE.format(self.guarded[match[0]]), text)

    def spans(self, text: str) -> list[TextSpan]:
        """A stretch of scaffold as spans; guarded tokens under private names are text."""
        pieces = PRIVATE_NAME.split(text)
        return [
            TextSpan(self.text_of(int(piece)) if index % 2 else piece, not index % 2)
            for index, piece in enumerate(pieces)
            if piece or len(pieces) == 1
        ]

    def encode(self, spans: Sequence[TextSpan]) -> list[int]:
        """Token ids of consecutive spans."""
        text = "".join(span.text for span in spans)
        if not text:
            return []
        wanted = [
            self.guarded[match[0]] for span in spans if span.trusted for match in self._pattern.finditer(span.text)
        ]
        wanted = [number for number in wanted if number in self._counted]
        if not any(not span.trusted and self._pattern.search(span.text) for span in spans):
            ids = list(self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=False))
            if [number for number in ids if number in self._counted] == wanted:
                return ids
        text = "".join(
            self._pattern.sub(lambda match: self._renamed.names[match[0]], span.text) if span.trusted else span.text
            for span in spans
        )
        ids = self._renamed.encode(text)
        if [number for number in ids if number in self._counted] != wanted:
            raise SpecialTextError(
                f"text {ascii(text)[:120]} spells special tokens in a way that cannot be kept apart; "
                "remove them from the text"
            )
        return ids

    @cached_property
    def _renamed(self) -> RenamedTokens:
        return RenamedTokens(self.tokenizer, self.guarded)

    def encode_behind(self, spans: Sequence[TextSpan]) -> list[int]:
        """Token ids of spans in the middle of a text, without the prefix that a tokenizer adds at its start."""
        for anchor in _ANCHORS:
            lead = self.encode([TextSpan(anchor, False)])
            ids = self.encode([TextSpan(anchor, False), *spans])
            if ids[: len(lead)] == lead:
                return ids[len(lead) :]
        return self.encode(spans)
