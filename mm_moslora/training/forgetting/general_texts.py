"""The general text on which forgetting shows: documents of the package's own text, of a file, or of records."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import mm_moslora
from mm_moslora.batch import Batch, Example
from mm_moslora.config import SourceConfig
from mm_moslora.data.chat.conversation_encoder import ConversationEncoder, TooLong
from mm_moslora.data.chat.guarded_tokens import SpecialTextError
from mm_moslora.data.chat.record_turns import Turn
from mm_moslora.data.record_faults import RecordError
from mm_moslora.data.sources.open_sources import open_source
from mm_moslora.data.sources.record_file import RecordSource
from mm_moslora.training.run_setup import Run
from mm_moslora.utils.errors import DataError
from mm_moslora.utils.untrusted_files import read_text

logger = logging.getLogger(__name__)

GENERAL_TEXT = Path(mm_moslora.__file__).with_name("data") / "general_text.txt"
_DOCUMENTS, _TOKENS = 64, 512
"""Most documents of the text, and most tokens of each."""


def general_texts(run: Run) -> list[Batch]:
    """The documents of the general text as batches of one, evenly spaced if many; DataError where none can be used."""
    encoder = ConversationEncoder.of(run.assembly)
    limit = min(_TOKENS, run.recipe.data.max_length)
    batches: list[Batch] = []
    documents = _documents(run.recipe.validate.general_text)
    for number in range(min(_DOCUMENTS, len(documents))):
        try:
            turns = documents[number * len(documents) // min(_DOCUMENTS, len(documents))]()
            encoded = encoder.encode(turns, max_length=limit, truncate=True)
        except (RecordError, TooLong, SpecialTextError) as error:
            logger.warning("Left out of the general text: %s", error)
            continue
        example = Example(id=str(number), input_ids=encoded.input_ids, supervised=encoded.supervised)
        batches.append(Batch.from_examples([example]))
    if not batches:
        raise DataError(
            f"No document of validate.general_text ({run.recipe.validate.general_text}) can be used. Write documents "
            "without pictures, with empty lines between them."
        )
    return batches


def _documents(path: str | None) -> list[Callable[[], Sequence[Turn]]]:
    """What gives the turns of every document."""
    if path is None or path.endswith(".txt"):
        try:
            text = read_text(GENERAL_TEXT if path is None else Path(path))
        except UnicodeDecodeError as error:
            raise DataError(f"validate.general_text {path} is not UTF-8 text ({error}). Convert it.") from error
        return [partial(_document, part.strip()) for part in text.split("\n\n") if part.strip()]
    source = open_source(SourceConfig(path=path))
    return [partial(_turns, source, row) for row in range(len(source))]


def _document(text: str) -> Sequence[Turn]:
    return [Turn(role="document", text=text)]


def _turns(source: RecordSource, row: int) -> Sequence[Turn]:
    turns = source[row].turns
    if any(turn.images for turn in turns):
        raise TooLong("a record with pictures is no general text")
    return turns
