"""A tokenizer for texts that spell special tokens: a copy in which these tokens have private names."""

from __future__ import annotations

import re
from collections.abc import Mapping

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from mm_moslora.data.record_faults import Code
from mm_moslora.utils.errors import ConfigError, DataError

PRIVATE = "\ue0f1\ue0f2{}\ue0f3"
"""The private name of a token, from its id."""
PRIVATE_NAME = re.compile("\ue0f1\ue0f2([0-9]{1,9})\ue0f3")


class SpecialTextError(DataError):
    """Untrusted text spells special tokens and this tokenizer cannot read them as text."""

    code = Code.SPECIAL_TEXT


class RenamedTokens:
    """A copy of a tokenizer with private names of the guarded tokens, which no text spells.

    Args:
        tokenizer: a fast one.
        guarded: text and id of every token to rename.

    Raises:
        SpecialTextError: the tokenizer is not a fast one.
        ConfigError: it cannot be copied.
    """

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
