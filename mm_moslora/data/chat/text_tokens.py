"""Tokenises text in which only the trusted part may contain special tokens.

Trusted text comes from the chat template, untrusted text from users. Both are tokenised together, as one string, so
that ordinary text gives exactly the tokenizer's ids for the whole. If untrusted text spells a special token, a second
tokenizer is used: a copy in which the special tokens have private names. Trusted text is rewritten with these names.
Untrusted text is not, so it cannot match them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from mm_moslora.data.record_faults import Code
from mm_moslora.utils.errors import ConfigError, DataError

_ANCHORS = ("\n", "a", ".", "0", "\u4e2d")


class Piece(NamedTuple):
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
        """Text and id of every token that untrusted text must not become."""
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
        """The first guarded token in a trusted text."""
        return self._pattern.search(text)

    def spells_special(self, text: str) -> bool:
        """Whether an untrusted text spells a guarded token."""
        return self._pattern.search(text) is not None

    def encode(self, pieces: Sequence[Piece]) -> list[int]:
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

    def encode_behind(self, pieces: Sequence[Piece]) -> list[int]:
        """Token ids of pieces in the middle of a text, without the prefix that a tokenizer adds at its start."""
        for anchor in _ANCHORS:
            lead = self.encode([Piece(anchor, False)])
            ids = self.encode([Piece(anchor, False), *pieces])
            if ids[: len(lead)] == lead:
                return ids[len(lead) :]
        return self.encode(pieces)

    def _encode_guarded(self, pieces: Sequence[Piece], wanted: list[int]) -> list[int]:
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
        state: dict[str, Any] = json.loads(backend.to_str())
        state["truncation"] = state["padding"] = state["post_processor"] = None
        known = {entry["content"]: entry["id"] for entry in state["added_tokens"]}
        for entry in state["added_tokens"]:
            entry["content"] = self._names.get(entry["content"], entry["content"])
        copy = Tokenizer.from_str(json.dumps(state))
        # Tokens of the model's own vocabulary get new ids under their private names.
        for text, number in known.items():
            found = copy.token_to_id(self._names.get(text, text))
            if found is None:
                raise ConfigError(f"The tokenizer cannot be copied: its token {text!r} is lost.")
            if found != number:
                self._back[found] = number
        if set(self._back) & set(backend.get_vocab(with_added_tokens=False).values()):
            raise ConfigError("The tokenizer cannot be copied: ids of its vocabulary are not consecutive.")
        return copy
