"""From turns to token ids with a supervised flag each, segment by segment: labels cannot slip.

Shapes: ``T`` tokens of one conversation.

The chat template is rendered once with a marker in place of every content. What lies between the markers is scaffold:
trusted text whose special tokens count. What replaces them is content: plain text, whatever it spells. Token ids and
the supervised flag grow together, so nothing is ever found again by searching.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from mm_moslora.data.records import IMAGE, Turn
from mm_moslora.errors import ConfigError, DataError

_MARK = "\u241fslot{}\u241f"

PLAIN_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
"""For tokenizers that bring no chat template."""


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """A tokenised conversation."""

    input_ids: Tensor
    """int64 ``[T]``."""
    supervised: Tensor
    """bool ``[T]``: answers and the end-of-turn token behind each."""
    dropped_turns: int = 0
    """Turns that did not fit."""


class TooLong(DataError):
    """Not even the first question and answer fit."""


class Encoder:
    """Tokenises conversations for one tokenizer and template.

    Args:
        tokenizer: with or without a chat template.
        image_token_id: vocabulary id of the image placeholder; None for a language model alone.
        tokens_per_image: placeholders per image.
        system_prompt: replaces the template's default; an empty string asks for none.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        image_token_id: int | None = None,
        tokens_per_image: int = 0,
        system_prompt: str | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.image_token_id, self.tokens_per_image = image_token_id, tokens_per_image
        self.system_prompt = system_prompt
        self.template = tokenizer.chat_template or PLAIN_TEMPLATE
        self.special_ids = set(tokenizer.all_special_ids)
        special = {str(token) for token in tokenizer.added_tokens_decoder.values()} | {*tokenizer.all_special_tokens}
        self.special_texts = sorted((text for text in special if text.strip()), key=len, reverse=True)
        self._trims = self._detect_trimming()
        self._plans: dict[tuple[tuple[str, ...], bool], list[str]] = {}

    def encode(self, turns: Sequence[Turn], *, max_length: int | None = None) -> Encoded:
        """Tokenise a conversation for training.

        Args:
            turns: alternate, ending with an answer; `<image>` in questions stands for an image.
            max_length: whole question-answer pairs are dropped from the end until the rest fits.

        Raises:
            TooLong: not even the first pair fits.
        """
        ids, supervised, ends = self._tokenise(turns, prompt=False)
        if max_length is None or len(ids) <= max_length:
            return Encoded(input_ids=torch.tensor(ids), supervised=torch.tensor(supervised))
        fitting = [count for count, end in ends if end <= max_length]
        if not fitting:
            raise TooLong(
                f"the first question and answer take {ends[0][1]} tokens, data.max_length is {max_length}; "
                "raise data.max_length or shorten the record"
            )
        shorter = self.encode(list(turns)[: fitting[-1]])
        return Encoded(
            input_ids=shorter.input_ids, supervised=shorter.supervised, dropped_turns=len(turns) - fitting[-1]
        )

    def encode_prompt(self, turns: Sequence[Turn]) -> Tensor:
        """Tokenise a conversation that the model is to continue: int64 ``[T]``, ending with the answer's header."""
        ids, _, _ = self._tokenise(turns, prompt=True)
        return torch.tensor(ids)

    def encode_answer(self, text: str) -> list[int]:
        """Token ids of an answer as training sees it, without the end-of-turn token."""
        return self._plain(text.strip() if self._trims else text)

    def _tokenise(self, turns: Sequence[Turn], *, prompt: bool) -> tuple[list[int], list[bool], list[tuple[int, int]]]:
        messages = self._with_system(turns)
        scaffold = self._scaffold(tuple(turn.role for turn in messages), prompt=prompt)
        ids: list[int] = []
        supervised: list[bool] = []
        ends: list[tuple[int, int]] = []
        pending: list[str | tuple[str]] = [scaffold[0]]
        lead = len(messages) - len(turns)
        for index, turn in enumerate(messages):
            text = turn.text.strip() if self._trims else turn.text
            if turn.role != "assistant":
                pending += self._content(text, images=turn.role == "user") + [scaffold[index + 1]]
                continue
            self._extend(ids, supervised, self._flush(pending), learn=False)
            tail = self._marked(scaffold[index + 1])
            stop = next((place for place, token in enumerate(tail) if token in self.special_ids), None)
            ending = tail[: stop + 1] if stop is not None else [self._eos()]
            self._extend(ids, supervised, self._plain(text) + ending, learn=True)
            ends.append((index + 1 - lead, len(ids)))
            pending = [(scaffold[index + 1],)] if stop is not None else [scaffold[index + 1]]
            pending = [self._rest(scaffold[index + 1], ending)] if stop is not None else pending
        self._extend(ids, supervised, self._flush(pending), learn=False)
        return ids, supervised, ends

    def _rest(self, scaffold: str, ending: list[int]) -> str:
        """The scaffold behind the end-of-turn token, as text."""
        token = str(self.tokenizer.convert_ids_to_tokens(ending[-1]))
        return scaffold[scaffold.index(token) + len(token) :]

    @staticmethod
    def _extend(ids: list[int], supervised: list[bool], tokens: list[int], *, learn: bool) -> None:
        ids += tokens
        supervised += [learn] * len(tokens)

    def _with_system(self, turns: Sequence[Turn]) -> list[Turn]:
        if self.system_prompt is None or turns[0].role == "system":
            return list(turns)
        return [Turn(role="system", text=self.system_prompt), *turns]

    def _content(self, text: str, *, images: bool) -> list[str | tuple[str]]:
        """A content as pieces: strings are plain text, `(IMAGE,)` is an image."""
        if not images or self.image_token_id is None:
            return [f"\0{text}"]
        pieces: list[str | tuple[str]] = []
        for index, part in enumerate(text.split(IMAGE)):
            pieces += [(IMAGE,), f"\0{part}"] if index else [f"\0{part}"]
        return pieces

    def _flush(self, pieces: list[str | tuple[str]]) -> list[int]:
        """Tokenise scaffold and contents up to the next answer.

        Ordinary text is joined first, so that the ids are those of the whole rendered prompt; only a content that
        spells a special token is tokenised by itself.
        """
        ids: list[int] = []
        text = ""
        for piece in pieces:
            if isinstance(piece, tuple):
                ids += self._marked(text) + [int(self.image_token_id or 0)] * self.tokens_per_image
                text = ""
            elif piece.startswith("\0") and any(special in piece for special in self.special_texts):
                ids += self._marked(text) + self._plain(piece[1:])
                text = ""
            else:
                text += piece.removeprefix("\0")
        return ids + self._marked(text)

    def _marked(self, text: str) -> list[int]:
        """Tokenise trusted text; special tokens count."""
        return list(self.tokenizer.encode(text, add_special_tokens=False)) if text else []

    def _plain(self, text: str) -> list[int]:
        """Tokenise a content; nothing in it is a special token."""
        if not text:
            return []
        return list(self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True))

    def _eos(self) -> int:
        if self.tokenizer.eos_token_id is None:
            raise ConfigError("The tokenizer has no end-of-sequence token and its chat template ends no turn.")
        return int(self.tokenizer.eos_token_id)

    def _scaffold(self, roles: tuple[str, ...], *, prompt: bool) -> list[str]:
        """Texts before, between and behind the contents of a conversation with these roles."""
        key = (roles, prompt)
        if key not in self._plans:
            marks = [_MARK.format(index) for index in range(len(roles))]
            text = self._render(list(zip(roles, marks, strict=True)), prompt=prompt)
            pieces = []
            for mark in marks:
                before, found, text = text.partition(mark)
                if not found:
                    raise ConfigError(
                        "The tokenizer's chat template leaves out a turn or changes its order, so labels cannot be "
                        f"built for the roles {', '.join(roles)}. Use another template."
                    )
                pieces.append(before)
            if len(self._plans) > 4096:
                self._plans.clear()
            self._plans[key] = [*pieces, text]
        return self._plans[key]

    def _render(self, messages: list[tuple[str, str]], *, prompt: bool) -> str:
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    [{"role": role, "content": content} for role, content in messages],
                    chat_template=self.template,
                    tokenize=False,
                    add_generation_prompt=prompt,
                )
            )
        except Exception as error:  # templates raise what they like
            roles = ", ".join(role for role, _ in messages)
            raise ConfigError(f"The tokenizer's chat template refuses the roles {roles}: {error}") from error

    def _detect_trimming(self) -> bool:
        return "  \u241f" not in self._render([("user", "  \u241fx\u241f  "), ("assistant", "a")], prompt=False)
