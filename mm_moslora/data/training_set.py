"""The training set: the records of all sources with their lengths, and the count of unusable ones."""

from __future__ import annotations

import itertools
import logging
from array import array
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path

from mm_moslora.batch import ImageProcessing
from mm_moslora.config import DataConfig, SourceConfig
from mm_moslora.data.chat.conversation_encoder import ConversationEncoder
from mm_moslora.data.chat.record_turns import Record
from mm_moslora.data.epoch_order import repeats_of
from mm_moslora.data.images.record_picture import PictureRules
from mm_moslora.data.images.video_clip import Clip
from mm_moslora.data.quarantine import summary
from mm_moslora.data.record_examples import MeasuredRecords, RecordExamples, SourceExamples, check_headers
from mm_moslora.data.record_faults import Code, RecordError
from mm_moslora.data.token_cache import SourceCache, TokenCache
from mm_moslora.utils.errors import DataError, ModelError
from mm_moslora.utils.identity import sha256_of_bytes

logger = logging.getLogger(__name__)

EXACT_LIMIT = 50_000
"""Largest number of records for which lengths are exact and picture headers are read at the start."""
_SAMPLE = 512
"""Records from which lengths are estimated, evenly spaced; with the rounding of their distance up to twice as many."""


def source_caches(
    examples: RecordExamples, *, on_progress: Callable[[int, int], None] | None = None
) -> list[SourceCache]:
    """The tokens of every source in `data.cache`, built or not; for the arguments see `TrainingSet`."""
    config, encoder, processing = examples.config, examples.encoder, examples.image_processing
    assert config.cache is not None
    fixed = processing is None or processing.fixed
    # The settings besides `max_length` that change the tokens; the defaults add nothing to the name of a cache.
    texts = " truncate" * (config.too_long == "truncate") + " all" * (config.train_on == "all")
    texts += " last" * (config.supervise == "last")
    texts += "" if processing is None else f" boxes {processing.boxes} {_frames(processing)}"
    images: object = processing is not None
    if processing is not None and not processing.fixed:
        images = [len(ids) for ids in processing.placeholders([(2**side, 512) for side in range(6, 12)])]
    return [
        SourceCache(
            Path(config.cache), file, encoder, encode=examples.encode,
            # The cache also holds faults of names, so the rules of names are part of its settings.
            settings=f"{config.max_length} {images} {file.rules}{texts}{_of_videos(file.rules)}",
            tokens_per_image=encoder.tokens_per_image if processing is not None and fixed else 1,
            on_progress=on_progress,
        )
        for file in examples.files
    ]  # fmt: skip


def _frames(processing: ImageProcessing) -> str:
    """What becomes of the pixels of two pictures, which decides how boxes are written."""
    try:
        return repr([processing.frame(size) for size in ((640, 480), (300, 900))])
    except ModelError as error:  # records with boxes are refused for it
        return str(error)


def _of_videos(rules: PictureRules) -> str:
    """The rules for videos that differ from the defaults."""
    return "".join(f" {value}" for value in (rules.video_fps, rules.videos) if value is not None)


class TrainingSet(SourceExamples, MeasuredRecords):
    """All records of some sources.

    The constructor reads and tokenises every record and reads the header of every picture, so that all ranks know the
    bad records before the first step. With `data.cache` the tokens are stored on disk and read from there. Above
    `EXACT_LIMIT` records, pictures are read only when they are used, and without a cache the lengths are estimated from
    the characters. A record with a fault that is found later is skipped.

    Args:
        settle: let `thinking: auto` of the encoder follow these records, see `thinking_form.settled`.
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
        exact_limit: int = EXACT_LIMIT,
    ) -> None:
        super().__init__(
            sources, encoder, image_processing, config=config, settle=settle, quarantine_path=quarantine_path
        )
        self.estimated = len(self) > exact_limit and config.cache is None
        """Whether `lengths` are estimates."""
        self.exact = not self.estimated and (image_processing is None or image_processing.fixed)
        self._read_headers = len(self) <= exact_limit
        if self.estimated and config.pack_tokens:
            raise DataError(
                f"data.pack_tokens needs exact lengths, and {len(self)} records are too many to tokenise at every "
                "start. Set data.cache to a folder that keeps them."
            )
        self.truncated = 0
        """Records that lose turns, or the end of their text, for their length; an estimate where lengths are."""
        self._sampled = self._too_long = 0
        """Where lengths are estimates: records in the sample, and those of them that do not fit even when shortened."""
        self.lengths: array[int] = array("L", bytes(array("L").itemsize * len(self)))
        self.has_image: bytearray = bytearray(len(self))
        if config.cache is not None:
            self.caches = [cache.load() for cache in source_caches(self, on_progress=on_progress)]
        self._per_character = self._tokens_per_character() if self.estimated else 0.0
        self._build(on_progress)
        self.members = [
            [index for index in range(start, stop) if index not in self.quarantine]
            for start, stop in itertools.pairwise(self._starts)
        ]
        self.weights = repeats_of(
            [len(numbers) for numbers in self.members],
            [source.weight for source in sources],
            [source.replay for source in sources],
            mixing=config.mixing,
            records=config.epoch_records,
        )
        self._report()

    @property
    def at_hand(self) -> TrainingSet:
        """The records from which samples may be taken: all."""
        return self

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the inputs of the record order: usable records, their lengths and repeats."""
        usable, weights = array("L", self.usable), array("d", self.weights)
        parts = (self.lengths, self.has_image, usable, weights)
        return sha256_of_bytes(more=(bytes(part) for part in parts))

    def identity(self, key: str) -> dict[str, object]:
        """What must be the same on every rank, by name, wherever the files lie."""
        whole = {f"the number of records of {key}": len(self), f"the fingerprint of {key}": self.fingerprint[:12]}
        return whole | {f"the content of {key}.{index}": file.content()[:12] for index, file in enumerate(self.files)}

    def statistics(self) -> dict[str, float]:
        """Counts for a report; tokens and shortened records are estimates where `estimated` is true."""
        lengths = sorted(self.lengths[index] for index in self.usable)
        return {
            "records": len(self),
            "unusable": len(self.quarantine),
            "with_pictures": sum(self.has_image[index] for index in self.usable),
            "tokens": sum(lengths),
            "tokens_per_record_median": lengths[len(lengths) // 2],
            "tokens_per_record_longest": lengths[-1],
            "shortened": self.truncated,
        }

    def leave_out(self, index: int, error: RecordError) -> None:
        """Put a record in quarantine whose fault showed up after the set was built.

        A picture that was there then and is there no more is refused: a run without its record could not be resumed.
        """
        fetched = "://" in (error.path or "")  # not looked at before
        if self._read_headers and error.code is Code.IMAGE_MISSING and not fetched and index not in self.quarantine:
            raise DataError(
                f"{error}. It was there when the run started, so its record is not left out. Bring it back; the same "
                "command goes on from the last checkpoint."
            ) from error
        if index not in self.quarantine:
            logger.warning("Left out: %s", error)
        self.quarantine.add(index, error)

    def _build(self, on_progress: Callable[[int, int], None] | None) -> None:
        for source, cache in enumerate(self.caches):
            if cache is not None:
                self._take_over(cache, self._starts[source])
        for index in range(len(self)):
            cache = self.caches[self.source_and_row(index)[0]]
            headers = self._read_headers and self.has_image[index]
            if cache is not None and not headers:
                continue
            try:
                record = self.record(index)
                self.lengths[index] = self._measure(index, record)
                self.has_image[index] = bool(record.images)
            except RecordError as error:
                self.quarantine.add(index, error)
            if on_progress is not None:
                on_progress(index + 1, len(self))
        self.quarantine.close()

    def _take_over(self, cache: TokenCache, start: int) -> None:
        """Lengths, modalities and faults of a cache, without reading its records."""
        stop = start + len(cache.lengths)
        self.lengths[start:stop] = array("L", cache.lengths.tolist())
        self.has_image[start:stop] = cache.has_image.astype("u1").tobytes()
        self.truncated += 0 if self._read_headers else int((cache.dropped > 0).sum())
        for row in sorted(cache.faults):
            self.quarantine.add(start + row, cache.fault(row))

    def _measure(self, index: int, record: Record) -> int:
        """Tokens of a record, exact or estimated; for exact numbers the picture headers are checked."""
        if self.estimated:
            characters = sum(len(turn.said) for turn in record.turns)
            shown = sum(picture.count if isinstance(picture, Clip) else 1 for picture in record.images)
            tokens = 1 + int(characters * self._per_character) + shown * self.encoder.tokens_per_image
            return min(tokens, self.config.max_length)
        encoded = self.encoded(index, record)
        check_headers(record, encoded.images)
        self.truncated += encoded.dropped_turns > 0
        return int(encoded.input_ids.shape[0])

    def _tokens_per_character(self) -> float:
        """Text tokens (scaffold included) per character, of a sample of records; counts those that are too long."""
        tokens = characters = shortened = 0
        for index in range(0, len(self), max(1, len(self) // _SAMPLE)):
            self._sampled += 1
            try:
                record = self.record(index)
                encoded = self.encode(record)
            except RecordError as error:
                self._too_long += error.code == Code.TOO_LONG
                continue
            if encoded.dropped_turns:
                shortened += 1
            else:
                tokens += int(encoded.input_ids.shape[0]) - encoded.images * self.encoder.tokens_per_image
                characters += sum(len(turn.said) for turn in record.turns)
        self.truncated = round(shortened / self._sampled * len(self))
        return tokens / max(1, characters)

    def _report(self) -> None:
        limit, about = self.config.max_length, f", by a sample of {self._sampled}" if self.estimated else ""
        if self.truncated:
            what = "are cut off" if self.config.too_long == "truncate" else "lose turns"
            logger.info("%d records %s beyond %d tokens%s.", self.truncated, what, limit, about)
        if self._too_long:
            count = round(self._too_long / self._sampled * len(self))
            logger.info("%d records do not fit into %d tokens%s; they are left out when read.", count, limit, about)
        if len(self.quarantine):
            logger.warning("%d records cannot be used: %s", len(self.quarantine), summary(self.quarantine.codes))
        if not any(self.members):
            raise DataError(
                f"None of the {len(self)} records can be used: {summary(self.quarantine.codes)}. "
                "Run `mm-moslora data check` for the whole list."
            )
