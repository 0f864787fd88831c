"""The preference set: makes pairs of examples, a chosen and a rejected answer, and counts records that cannot be used.

Labels are those of `ConversationEncoder`, on the last answer alone, so a pair is asked and answered as in inference.

Shapes: ``T`` tokens of one example.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
from array import array
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from mm_moslora.batch import Example, ImageProcessing, Placeholders, ProcessedImage
from mm_moslora.config import DataConfig, SourceConfig
from mm_moslora.data.chat.conversation_encoder import ConversationEncoder, Encoded
from mm_moslora.data.chat.preference_records import PreferencePair, parse_pair
from mm_moslora.data.chat.records import Record
from mm_moslora.data.chat.thinking_form import ThinkingForm, settled
from mm_moslora.data.images.picture_faults import ImageError
from mm_moslora.data.quarantine import Quarantine, summary
from mm_moslora.data.record_examples import RecordExamples, decoded, image_fault, placeholders_of, sizes_of, written
from mm_moslora.data.record_faults import Code, RecordError
from mm_moslora.data.sources.open_sources import open_sources
from mm_moslora.utils.errors import DataError

logger = logging.getLogger(__name__)


class PreferenceSet(RecordExamples):
    """All pairs of some sources.

    The constructor reads and tokenises both answers of every record and reads the header of every picture, so that all
    ranks know the bad records before the first step.

    Args:
        sources: at least one.
        encoder: tokenises.
        image_processing: turns pictures into tensors; None for a language model alone.
        config: the recipe's `data`.
        settle: let `thinking: auto` of the encoder follow the chosen answers, see `thinking_form.settled`.
        quarantine_path: file for bad records.
        on_progress: called with (records read, all records) while the set is built.

    Raises:
        DataError: a file cannot be read, the share of bad records is too large, or no record is usable.
    """

    def __init__(
        self,
        sources: Sequence[SourceConfig],
        encoder: ConversationEncoder,
        image_processing: ImageProcessing | None,
        *,
        config: DataConfig,
        settle: bool = False,
        quarantine_path: Path | None = None,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> None:
        files = open_sources(sources, pairs=True, processing=image_processing)
        self.form: ThinkingForm | None = None
        if settle:
            encoder, self.form = settled(encoder, files)
        super().__init__(files, encoder, image_processing, config)
        self.quarantine = Quarantine(quarantine_path, len(self), config)
        self.lengths = array("L")
        """Tokens of the chosen and of the rejected example of every usable record, one after the other."""
        self.usable: list[int] = []
        """Numbers of the records that were found usable when the set was built."""
        self.with_pictures = 0
        for index in range(len(self)):
            try:
                self._measure(index)
            except RecordError as error:
                self.quarantine.add(index, error)
            if on_progress is not None:
                on_progress(index + 1, len(self))
        self.quarantine.close()
        if len(self.quarantine):
            logger.warning("%d records cannot be used: %s", len(self.quarantine), summary(self.quarantine.codes))
        if not self.usable:
            raise DataError(
                f"None of the {len(self)} records is a pair that can be learned from: "
                f"{summary(self.quarantine.codes)}. The first one: {self.quarantine.first}"
            )

    @property
    def fingerprint(self) -> str:
        """A hash of the usable records and their lengths."""
        return hashlib.sha256(bytes(self.lengths) + bytes(array("L", self.usable))).hexdigest()

    @property
    def commits(self) -> dict[str, str]:
        """Commits of sources of the hub, by recipe key."""
        return {f"data.train.{index}": commit for index, file in enumerate(self.files) if (commit := file.commit())}

    def identity(self, key: str) -> dict[str, object]:
        """What must be the same on every rank, by name; see `TrainingSet.identity`."""
        return {f"the number of pairs of {key}": len(self.usable), f"the fingerprint of {key}": self.fingerprint[:12]}

    def statistics(self) -> dict[str, float]:
        """Counts for a report: records, those that cannot be used, those with pictures, and tokens per answer."""
        lengths = sorted(self.lengths)
        return {
            "records": len(self),
            "unusable": len(self.quarantine),
            "with_pictures": self.with_pictures,
            "tokens": sum(lengths),
            "tokens_per_record_median": lengths[len(lengths) // 2],
            "tokens_per_record_longest": lengths[-1],
        }

    def pair(self, number: int) -> tuple[Example, Example]:
        """The usable pair with a number, chosen first; where its fault shows up now, the next one.

        Raises:
            DataError: `on_bad` is error, or the share of bad records is too large.
        """
        for index in itertools.islice(itertools.cycle(self.usable), number, number + len(self.usable)):
            try:
                return self.load_pair(index)
            except RecordError as error:
                if index not in self.quarantine:
                    logger.warning("Left out: %s", error)
                self.quarantine.add(index, error)
        raise DataError("No pair is left that can be used.")

    def load_pair(self, index: int) -> tuple[Example, Example]:
        """Make the two examples of a record; they share its pictures.

        Raises:
            RecordError: the record cannot be used.
        """
        pair = self._pair(index)
        images = decoded(pair.chosen, len(pair.chosen.images)) if self.image_processing is not None else []
        pictures, sizes = self._processed(pair.chosen, images), sizes_of(images)
        chosen, rejected = (written(side, self.image_processing, sizes=sizes) for side in (pair.chosen, pair.rejected))
        return self._example(chosen, pictures), self._example(rejected, pictures)

    def _example(self, record: Record, pictures: Sequence[ProcessedImage]) -> Example:
        encoded = self._encode(record, [picture.placeholders for picture in pictures])
        supervised = last_answer(encoded.supervised)
        return Example(id=record.id, input_ids=encoded.input_ids, supervised=supervised, pictures=pictures)

    def _pair(self, index: int) -> PreferencePair:
        source, row = self.source_and_row(index)
        return self.files[source].parsed(row, parse_pair)

    def _measure(self, index: int) -> None:
        """Check a record as far as this is possible without decoding its pictures, and count it."""
        pair = self._pair(index)
        pictures = placeholders_of(pair.chosen, self.image_processing)
        lengths = [len(self._encode(record, pictures).input_ids) for record in (pair.chosen, pair.rejected)]
        for number, picture in enumerate(pair.chosen.images):
            try:
                picture.size()
            except ImageError as error:
                raise image_fault(pair.chosen, number, error) from error
        self.lengths.extend(lengths)
        self.usable.append(index)
        self.with_pictures += bool(pair.chosen.images)

    def _encode(self, record: Record, pictures: Sequence[Placeholders] | None) -> Encoded:
        fixed = self.image_processing is None or self.image_processing.fixed
        encoded = self.encode(record, None if fixed else pictures)
        if encoded.dropped_turns:
            what, limit = "does not fit with its last answer", self.config.max_length
            remedy = f"raise data.max_length ({limit}), or set data.too_long: drop"
            raise record.where.error(Code.TOO_LONG, "conversations", what, remedy)
        return encoded


def last_answer(supervised: Tensor) -> Tensor:
    """The flags of the last answer alone, bool ``[T]``; a question stands between two answers."""
    positions = supervised.nonzero().flatten()
    gaps = (positions.diff() > 1).nonzero().flatten()
    start = positions[gaps[-1] + 1] if len(gaps) else positions[0]
    return supervised & (torch.arange(len(supervised)) >= start)
