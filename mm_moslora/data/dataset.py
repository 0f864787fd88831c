"""The training set: records, encoder and image transform in, examples out; what cannot be used is counted and named.

Shapes: ``H x W`` pixels.
"""

from __future__ import annotations

import bisect
import itertools
import logging
from array import array
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from mm_moslora.batch import Example
from mm_moslora.config import DataConfig, SourceConfig
from mm_moslora.data.conversation import Encoded, Encoder, TooLong
from mm_moslora.data.faults import Code, RecordError
from mm_moslora.data.images import ImageError, check_image, open_image
from mm_moslora.data.quarantine import Quarantine, summary
from mm_moslora.data.records import Record, RecordFile, similar_file
from mm_moslora.data.tokens import SpecialTextError
from mm_moslora.errors import DataError

logger = logging.getLogger(__name__)

ImageTransform = Callable[[Image.Image], Tensor]
"""From an RGB picture to float32 ``[3, H, W]``."""
EXACT_LIMIT = 50_000
"""Larger sets estimate lengths and look at pictures only when they are used."""
_SAMPLE = 512


def open_sources(sources: Sequence[SourceConfig]) -> list[RecordFile]:
    """The record files of some sources.

    Raises:
        DataError: none is named, or one cannot be read.
    """
    if not sources:
        raise DataError("No data source is named. Add one to data.train, with the path of a LLaVA JSON or JSONL file.")
    return [
        RecordFile(
            Path(source.path),
            Path(source.image_folder) if source.image_folder else None,
            follow_links=source.follow_links,
        )
        for source in sources
    ]


def encode_record(record: Record, encoder: Encoder, *, max_length: int, vision: bool) -> Encoded:
    """Tokenise a record.

    Raises:
        RecordError: it does not fit, spells special tokens that cannot be kept apart, or has pictures that the model
            cannot see.
    """
    if record.images and not vision:
        raise record.where.error(
            Code.NO_VISION, "image", f"{len(record.images)} images", "set model.vision, or drop the record"
        )
    try:
        return encoder.encode(record.turns, max_length=max_length)
    except (TooLong, SpecialTextError) as error:
        what, _, remedy = str(error).partition("; ")
        raise record.where.error(error.code, "conversations", what, remedy) from error


def image_fault(record: Record, number: int, error: ImageError) -> RecordError:
    """The error of a record whose picture cannot be used."""
    path = record.images[number]
    hint = similar_file(path) if error.code == Code.IMAGE_MISSING else ""
    return record.where.error(
        error.code, f"image[{number}]", f"{path}: {error.what}", error.remedy + hint, path=str(path)
    )


class TrainingSet:
    """All records of some sources.

    While it is built every record is read and tokenised, and the header of every picture is read, so that bad records
    are known before the first step, to all ranks alike. Above `EXACT_LIMIT` records the lengths are estimated from the
    characters, and what is found only later is skipped when its turn comes.

    Args:
        sources: at least one.
        encoder: tokenises.
        transform: turns a picture into pixels; None for a language model alone.
        config: the recipe's `data`.
        quarantine_path: where bad records are written.
        on_progress: called with (records read, records in all) while the set is built.
        exact_limit: see `EXACT_LIMIT`.

    Raises:
        DataError: a file cannot be read, too large a share of the records is bad, or none is left.
    """

    def __init__(
        self,
        sources: Sequence[SourceConfig],
        encoder: Encoder,
        transform: ImageTransform | None,
        *,
        config: DataConfig,
        quarantine_path: Path | None = None,
        on_progress: Callable[[int, int], None] | None = None,
        exact_limit: int = EXACT_LIMIT,
    ) -> None:
        self.encoder, self.transform, self.config = encoder, transform, config
        self.files = open_sources(sources)
        self.weights = [source.weight for source in sources]
        self._starts = list(itertools.accumulate((len(file) for file in self.files), initial=0))
        self.quarantine = Quarantine(quarantine_path, len(self), config)
        self.estimated = len(self) > exact_limit
        """Whether `lengths` are estimates."""
        self.truncated = 0
        """Records that lose turns because they are too long."""
        self.lengths = array("L", bytes(array("L").itemsize * len(self)))
        """Tokens per record, visual tokens included; 0 for a bad one."""
        self.has_image = bytearray(len(self))
        """1 per record with a picture."""
        self._per_character = self._tokens_per_character() if self.estimated else 0.0
        self._build(on_progress)
        self.members = [
            [index for index in range(start, stop) if index not in self.quarantine]
            for start, stop in itertools.pairwise(self._starts)
        ]
        """Numbers of the usable records of every source, the same on all ranks and for the whole run."""
        self._report()

    def __len__(self) -> int:
        return self._starts[-1]

    @property
    def usable(self) -> list[int]:
        """Numbers of the records that were found usable when the set was built."""
        return [index for members in self.members for index in members]

    def record(self, index: int) -> Record:
        """The record with a number over all sources.

        Raises:
            RecordError: it cannot be used.
        """
        if not 0 <= index < len(self):
            raise IndexError(index)
        source = bisect.bisect_right(self._starts, index) - 1
        return self.files[source][index - self._starts[source]]

    def encode(self, record: Record) -> Encoded:
        """Tokenise a record; see `encode_record`."""
        vision = self.transform is not None
        return encode_record(record, self.encoder, max_length=self.config.max_length, vision=vision)

    def load(self, index: int) -> Example:
        """Make one example.

        Raises:
            RecordError: the record cannot be used.
        """
        record = self.record(index)
        encoded = self.encode(record)
        pixels: list[Tensor] = []
        for number, path in enumerate(record.images[: encoded.images]):
            assert self.transform is not None
            try:
                pixels.append(self.transform(open_image(path)))
            except ImageError as error:
                raise image_fault(record, number, error) from error
        return Example(
            id=record.id,
            input_ids=encoded.input_ids,
            supervised=encoded.supervised,
            pixel_values=torch.stack(pixels) if pixels else None,
        )

    def __getitem__(self, index: int) -> Example | None:
        """One example, or None when it turns out to be bad; then it is in quarantine.

        Raises:
            DataError: `on_bad` is error, or too large a share is bad.
        """
        try:
            return self.load(index)
        except RecordError as error:
            self.quarantine.add(index, error)
            return None

    def _build(self, on_progress: Callable[[int, int], None] | None) -> None:
        for index in range(len(self)):
            try:
                record = self.record(index)
                self.lengths[index] = self._measure(record)
                self.has_image[index] = bool(record.images)
            except RecordError as error:
                self.quarantine.add(index, error)
            if on_progress is not None:
                on_progress(index + 1, len(self))
        self.quarantine.close()

    def _measure(self, record: Record) -> int:
        """Tokens of a record, exact or estimated; exact ones come with a look at the pictures."""
        if self.estimated:
            characters = sum(len(turn.text) for turn in record.turns)
            tokens = 1 + int(characters * self._per_character) + len(record.images) * self.encoder.tokens_per_image
            return min(tokens, self.config.max_length)
        encoded = self.encode(record)
        for number, path in enumerate(record.images[: encoded.images]):
            try:
                check_image(path)
            except ImageError as error:
                raise image_fault(record, number, error) from error
        self.truncated += encoded.dropped_turns > 0
        return int(encoded.input_ids.shape[0])

    def _tokens_per_character(self) -> float:
        """Text tokens (scaffold included) per character, over records spread evenly over the set."""
        tokens = characters = 0
        for index in range(0, len(self), max(1, len(self) // _SAMPLE)):
            try:
                record = self.record(index)
                encoded = self.encode(record)
            except RecordError:
                continue
            if not encoded.dropped_turns:
                tokens += int(encoded.input_ids.shape[0]) - encoded.images * self.encoder.tokens_per_image
                characters += sum(len(turn.text) for turn in record.turns)
        return tokens / max(1, characters)

    def _report(self) -> None:
        if self.truncated:
            logger.info("%d records lose turns that do not fit into %d tokens.", self.truncated, self.config.max_length)
        if len(self.quarantine):
            logger.warning("%d records cannot be used: %s", len(self.quarantine), summary(self.quarantine.codes))
        if not any(self.members):
            raise DataError(
                f"None of the {len(self)} records can be used: {summary(self.quarantine.codes)}. "
                "Run `mm-moslora data check` for the whole list."
            )
