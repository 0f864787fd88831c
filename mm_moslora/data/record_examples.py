"""From a record to an `Example`: its pictures decoded and processed, its turns tokenised."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Sequence

from mm_moslora.batch import Example, ImageProcessing, ProcessedImage
from mm_moslora.config import DataConfig
from mm_moslora.data.chat.conversation_encoder import ConversationEncoder, Encoded, TooLong
from mm_moslora.data.chat.guarded_tokens import SpecialTextError
from mm_moslora.data.chat.records import Record, RecordSource
from mm_moslora.data.images.picture_faults import ImageError, similar_file
from mm_moslora.data.images.record_picture import LocalPicture
from mm_moslora.data.images.video_clip import Frame
from mm_moslora.data.record_faults import Code, RecordError
from mm_moslora.data.token_cache import TokenCache

_NOT_FETCHED = (448, 448)
"""Assumed pixels of a picture that is not fetched yet."""


class RecordExamples:
    """The records of some sources, by one number over all, and the examples that they make.

    Args:
        files: at least one source.
        encoder: tokenises.
        image_processing: turns pictures into tensors; None for a language model alone.
        config: the recipe's `data`.
    """

    def __init__(
        self,
        files: Sequence[RecordSource],
        encoder: ConversationEncoder,
        image_processing: ImageProcessing | None,
        config: DataConfig,
    ) -> None:
        self.files, self.encoder, self.image_processing, self.config = files, encoder, image_processing, config
        self.caches: list[TokenCache | None] = [None] * len(files)
        """Tokens on disk of every source."""
        self._starts = list(itertools.accumulate((len(file) for file in files), initial=0))

    def __len__(self) -> int:
        return self._starts[-1]

    def source_and_row(self, index: int) -> tuple[int, int]:
        """The source of a number over all sources, and the row in it."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        source = bisect.bisect_right(self._starts, index) - 1
        return source, index - self._starts[source]

    def record(self, index: int) -> Record:
        """The record with a number over all sources.

        Raises:
            RecordError: it cannot be used.
        """
        source, row = self.source_and_row(index)
        return self.files[source][row]

    def encode(self, record: Record, pictures: Sequence[Sequence[int]] | None = None) -> Encoded:
        """Tokenise a record; see `encode_record`. Picture headers are read if the token count depends on the size."""
        pictures = placeholders_of(record, self.image_processing) if pictures is None else pictures
        vision = self.image_processing is not None
        return encode_record(record, self.encoder, config=self.config, vision=vision, pictures=pictures)

    def encoded(self, index: int, record: Record) -> Encoded:
        """The tokens of a record, from the cache if there is one.

        Raises:
            RecordError: it cannot be used.
        """
        source, row = self.source_and_row(index)
        cache = self.caches[source]
        return self.encode(record) if cache is None else cache.encoded(row)

    def load(self, index: int) -> Example:
        """Make one example.

        Raises:
            RecordError: the record cannot be used.
        """
        record = self.record(index)
        if self.image_processing is not None and not self.image_processing.fixed:
            pictures = self.process(record, len(record.images))
            encoded = self.encode(record, [picture.placeholders for picture in pictures])
        else:
            encoded = self.encoded(index, record)
            pictures = self.process(record, encoded.images)
        return Example(
            id=record.id,
            input_ids=encoded.input_ids,
            supervised=encoded.supervised,
            weights=encoded.weights,
            pictures=pictures[: encoded.images],
        )

    def process(self, record: Record, count: int) -> list[ProcessedImage]:
        """The first pictures of a record, ready for the model.

        Raises:
            RecordError: a picture cannot be used.
        """
        if self.image_processing is None or not count:
            return []
        images = []
        for number, picture in enumerate(record.images[:count]):
            try:
                images.append(picture.rgb())
            except ImageError as error:
                raise image_fault(record, number, error) from error
        return self.image_processing.process(images)


class MeasuredRecords(RecordExamples):
    """Records with known lengths, of which steps can be planned."""

    members: Sequence[Sequence[int]]
    """Numbers of the usable records of every source, the same on all ranks."""
    weights: Sequence[float]
    """Repeats per epoch of the records of every source."""
    lengths: Sequence[int]
    """Tokens per record, visual tokens included; 0 for a bad one."""
    has_image: Sequence[int]
    """1 per record with a picture."""
    words: Sequence[int]
    """White-space separated words per record, which LLaVA uses as its length; only with `data.order` llava."""
    exact: bool
    """Whether `lengths` are surely those of the examples; headers may be wrong, or not fetched yet."""

    @property
    def usable(self) -> list[int]:
        """Numbers of the records that were found usable when they were measured."""
        return [index for members in self.members for index in members]

    def __getitem__(self, index: int) -> Example | None:
        """One example, or None for a record that is left out, see `leave_out`."""
        try:
            return self.load(index)
        except RecordError as error:
            self.leave_out(index, error)
            return None

    def leave_out(self, index: int, error: RecordError) -> None:
        """Put a record in quarantine whose fault showed up after it was measured.

        Raises:
            DataError: `on_bad` is error, or the share of bad records is too large.
        """
        raise NotImplementedError


def encode_record(
    record: Record,
    encoder: ConversationEncoder,
    *,
    config: DataConfig,
    vision: bool,
    pictures: Sequence[Sequence[int]] | None = None,
) -> Encoded:
    """Tokenise a record.

    Args:
        record: to be tokenised.
        encoder: of the model.
        config: `max_length`, `too_long`, `train_on` and `supervise`.
        vision: whether the model has a vision encoder.
        pictures: placeholder ids of every picture, where their number depends on the picture; None: all alike.

    Raises:
        RecordError: it does not fit, spells special tokens that cannot be kept as text, or has pictures and the model
            has no vision encoder.
    """
    if record.images and not vision:
        raise record.where.error(
            Code.NO_VISION, "image", f"{len(record.images)} images", "set model.vision, or drop the record"
        )
    try:
        return encoder.encode(
            record.learned(config.supervise),
            max_length=config.max_length,
            pictures=pictures,
            truncate=config.too_long == "truncate",
            whole=config.train_on == "all",
        )
    except (TooLong, SpecialTextError) as error:
        what, _, remedy = str(error).partition("; ")
        raise record.where.error(error.code, "conversations", what, remedy) from error


def image_fault(record: Record, number: int, error: ImageError) -> RecordError:
    """The error of a record with an unusable picture."""
    picture = record.images[number]
    if isinstance(picture, Frame):
        name = picture.clip.name
        return record.where.error(error.code, "video", f"{name}: {error.what}", error.remedy, path=name)
    hint = ""
    if error.code == Code.IMAGE_MISSING and isinstance(picture, LocalPicture):
        hint = similar_file(picture.path)
    what = f"{picture.name}: {error.what}"
    return record.where.error(error.code, f"image[{number}]", what, error.remedy + hint, path=picture.name)


def placeholders_of(record: Record, image_processing: ImageProcessing | None) -> list[tuple[int, ...]] | None:
    """Placeholder ids of the pictures of a record, from their headers; None where all pictures take the same number.

    Raises:
        RecordError: a picture's header has a fault.
    """
    if image_processing is None or image_processing.fixed:
        return None
    sizes = []
    for number, picture in enumerate(record.images):
        try:
            sizes.append(picture.size() or _NOT_FETCHED)
        except ImageError as error:
            raise image_fault(record, number, error) from error
    return image_processing.placeholders(sizes)
