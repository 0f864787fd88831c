"""A hash over everything that determines a transformers model's answers, and the markers of reasoning in them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from itertools import chain, groupby
from typing import TYPE_CHECKING, Any

from mm_moslora.data.chat.answer_thinking import EXCHANGE
from mm_moslora.data.chat.chat_template import MARK, ProcessorTemplate, Template
from mm_moslora.data.chat.record_keys import REASONING
from mm_moslora.models.vision.feature_store import bytes_of
from mm_moslora.utils.errors import ConfigError
from mm_moslora.utils.identity import sha256_of_bytes, sha256_of_values
from mm_moslora.utils.untrusted_data import parse_json
from mm_moslora_eval.scoring.scored_sample import Markers

if TYPE_CHECKING:
    from transformers import PreTrainedModel


_VARYING = ("padding", "truncation")
"""Settings of a tokenizer that any call may change."""


def model_fingerprint(model: PreTrainedModel, *, processor: Any, tokenizer: Any, template: str | None) -> str:
    """SHA-256 over every weight, the configurations of model and generation, and the processing of texts and images."""
    configurations = (model.config, getattr(model, "generation_config", None))
    processors = (getattr(processor, name, None) for name in ("image_processor", "video_processor"))
    about = [
        *(part.to_json_string().encode() for part in configurations if part is not None),
        *(_settings(part.to_dict()) for part in processors if part is not None), str(template).encode(),
        _words(tokenizer),
    ]  # fmt: skip
    weights = ((name.encode(), bytes_of(tensor)) for name, tensor in sorted(model.state_dict().items()))
    return sha256_of_bytes(*about, more=chain.from_iterable(weights))


def _settings(values: dict[str, Any]) -> bytes:
    return json.dumps(values, sort_keys=True, default=str).encode()


def _words(tokenizer: Any) -> bytes:
    """Everything that determines the tokens of a text; for a slow tokenizer only its vocabulary."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return _settings(tokenizer.get_vocab())
    content = parse_json(backend.to_str())
    return _settings({name: value for name, value in content.items() if name not in _VARYING})


class ReasoningMarkers:
    """What a chat template writes around reasoning; it may be special tokens, which decoding leaves out."""

    def __init__(self, template: Template | None, tokenizer: Any) -> None:
        self.pairs: tuple[Markers, ...] = () if template is None else _pairs(template)
        texts = [text for pair in self.pairs for text in pair]
        special = {int(id_): str(token) for id_, token in tokenizer.added_tokens_decoder.items() if token.special}
        self.kept = {id_: token for id_, token in special.items() if any(token in text for text in texts)}
        """Special tokens of markers, which stay in the text of an answer."""

    @classmethod
    def of_processor(cls, processor: Any) -> ReasoningMarkers:
        """Those of a processor, or of the tokenizer of a language model."""
        tokenizer = getattr(processor, "tokenizer", processor)
        template: Template | None = None
        try:
            if processor is not tokenizer:
                template = ProcessorTemplate(processor)
            elif tokenizer.chat_template is not None:
                template = Template(tokenizer)
        except (ConfigError, AttributeError):  # no chat template, or no token for pictures
            template = None
        return cls(template, tokenizer)

    def text(self, tokens: Sequence[int], decode: Callable[[list[int]], Any]) -> str:
        """The text of an answer, with the special tokens of markers; `decode` leaves them out."""
        if self.kept.keys().isdisjoint(tokens):
            return str(decode(list(tokens)))
        groups = groupby(tokens, self.kept.__contains__)
        return "".join(
            "".join(self.kept[token] for token in group) if marked else str(decode(list(group)))
            for marked, group in groups
        )

    def fingerprint(self, of_model: str) -> str:
        """The model's, with the markers that its answers keep."""
        return sha256_of_values([of_model, sorted(self.kept.values())]) if self.kept else of_model


def _pairs(template: Template) -> tuple[Markers, ...]:
    question, thinking, answer = (MARK.format(index) for index in range(3))
    for key in REASONING:
        try:
            prompt = template.render(EXCHANGE[:1], [question], prompt=True).rpartition(question)[2]
            text = template.render(EXCHANGE, [question, answer], reasoning={key: thinking})
        except ConfigError:
            continue
        before, shown, behind = text.rpartition(question)[2].partition(thinking)
        between, ended, _ = behind.partition(answer)
        # A prompt may hold the first marker, or an empty block: then it is the last word before the reasoning.
        own = before.removeprefix(prompt).strip() if before.startswith(prompt) else ""
        opening = own or "".join(before.split()[-1:])
        if shown and ended and opening and between.strip():
            return ((opening, between.strip()),)
    return ()
