"""From a record to an `Example`: its pictures decoded and processed, its turns tokenised."""

from __future__ import annotations

import bisect
import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from PIL import Image

from mm_moslora.batch import Example, ImageProcessing, Placeholders, ProcessedImage, Video
from mm_moslora.config import DataConfig, Objective, SourceConfig
from mm_moslora.data.chat.conversation_encoder import (
    ConversationEncoder,
    Encoded,
    TooLong,
    UnlearnedThinking,
    UnrenderedTools,
)
from mm_moslora.data.chat.guarded_tokens import SpecialTextError
from mm_moslora.data.chat.record_turns import Record
from mm_moslora.data.chat.thinking_form import ThinkingForm, settled
from mm_moslora.data.images.record_picture import ImageError, LocalPicture, similar_file
from mm_moslora.data.images.video_clip import Clip, Frame
from mm_moslora.data.quarantine import Quarantine
from mm_moslora.data.record_faults import Code, RecordError
from mm_moslora.data.sources.open_sources import open_sources
from mm_moslora.data.sources.record_file import RecordSource
from mm_moslora.data.token_cache import TokenCache
from mm_moslora.utils.errors import reason_of

if TYPE_CHECKING:
    from transformers.video_utils import VideoMetadata

_NOT_FETCHED = (448, 448)
"""Assumed pixels of a picture that is not fetched yet."""


class RecordExamples:
    """The records of some sources, by one number over all, and the examples that they make."""

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
        """The record with a number over all sources."""
        source, row = self.source_and_row(index)
        return self.files[source][row]

    def encode(self, record: Record, pictures: Sequence[Placeholders] | None = None) -> Encoded:
        """Tokenise a record; see `encode_record`."""
        return encode_record(record, self.encoder, self.image_processing, config=self.config, pictures=pictures)

    def encoded(self, index: int, record: Record) -> Encoded:
        """The tokens of a record, from the cache if there is one."""
        source, row = self.source_and_row(index)
        cache = self.caches[source]
        return self.encode(record) if cache is None else cache.encoded(row)

    def load(self, index: int) -> Example:
        """Make one example."""
        record, processing = self.record(index), self.image_processing
        if processing is not None and (record.objects or not processing.fixed):
            images = decoded(record, len(record.images))
            pictures = self._processed(record, images)
            # Boxes are written for the pictures themselves: a header, and so a cache, may be wrong.
            exact = written(record, processing, sizes=sizes_of(images))
            encoded = self.encode(exact, [picture.placeholders for picture in pictures])
            if processing.fixed and not torch.equal(encoded.input_ids, self.encoded(index, record).input_ids):
                what = "are written for another size of the picture than its header or data.cache says"
                remedy = "write the picture again, and delete the cache"
                raise record.where.error(Code.BAD_BOX, "objects", what, remedy)
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
        """The first pictures and videos of a record, ready for the model."""
        if self.image_processing is None:
            return []
        return self._processed(record, decoded(record, count))

    def _processed(self, record: Record, images: Sequence[Image.Image | Video]) -> list[ProcessedImage]:
        if self.image_processing is None or not images:
            return []
        with _refusals(record):
            return self.image_processing.process(images)


def decoded(record: Record, count: int) -> list[Image.Image | Video]:
    """The first pictures, as RGB, and videos of a record."""
    images: list[Image.Image | Video] = []
    for number, picture in enumerate(record.images[:count]):
        with faults_of_picture(record, number):
            images.append(picture.video() if isinstance(picture, Clip) else picture.rgb())
    return images


def sizes_of(images: Sequence[Image.Image | Video]) -> list[tuple[int, int]]:
    """Widths and heights of decoded pictures; records with boxes have no videos."""
    return [(0, 0) if isinstance(image, Video) else image.size for image in images]


def written(
    record: Record, processing: ImageProcessing | None, *, sizes: Sequence[tuple[int, int]] | None = None
) -> Record:
    """A record with its boxes and points written into its texts, in the model's form; without them, the same record.

    Args:
        sizes: widths and heights of its pictures, upright; None: as their headers say, pictures of URLs are fetched.
    """
    if record.objects is None or processing is None:
        return record
    from mm_moslora.data.boxes.record_objects import filler

    if sizes is None:
        sizes = [_size(record, number) for number in range(len(record.images))]
    fill = filler(record.objects, sizes, processing, record.where)
    return replace(record, turns=tuple(turn.filled(fill) for turn in record.turns), objects=None)


def _size(record: Record, number: int) -> tuple[int, int]:
    picture = record.images[number]
    with faults_of_picture(record, number):
        size = picture.size()
        return picture.rgb().size if size is None and not isinstance(picture, Clip) else size or (0, 0)


class SourceExamples(RecordExamples):
    """The examples of a recipe's sources, with the form of thinking that they decide and counts of unusable records."""

    def __init__(
        self,
        sources: Sequence[SourceConfig],
        encoder: ConversationEncoder,
        image_processing: ImageProcessing | None,
        *,
        config: DataConfig,
        objective: Objective = "sft",
        settle: bool = False,
        quarantine_path: Path | None = None,
    ) -> None:
        files = open_sources(sources, objective=objective, processing=image_processing)
        self.form: ThinkingForm | None = None
        if settle:
            encoder, self.form = settled(encoder, files, config.supervise)
        super().__init__(files, encoder, image_processing, config)
        self.quarantine = Quarantine(quarantine_path, len(self), config)

    @property
    def commits(self) -> dict[str, str]:
        """Commits of sources of the hub, by recipe key."""
        return {f"data.train.{index}": commit for index, file in enumerate(self.files) if (commit := file.commit())}


class MeasuredRecords(RecordExamples, ABC):
    """Records with known lengths, of which steps can be planned."""

    members: Sequence[Sequence[int]]
    """Numbers of the usable records of every source, the same on all ranks."""
    weights: Sequence[float]
    """Repeats per epoch of the records of every source."""
    lengths: Sequence[int]
    """Tokens per record, visual tokens included; 0 for a bad one."""
    has_image: Sequence[int]
    """1 per record with a picture."""
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

    @abstractmethod
    def leave_out(self, index: int, error: RecordError) -> None:
        """Put a record in quarantine whose fault showed up after it was measured."""


def encode_record(
    record: Record,
    encoder: ConversationEncoder,
    processing: ImageProcessing | None,
    *,
    config: DataConfig,
    pictures: Sequence[Placeholders] | None = None,
) -> Encoded:
    """Tokenise a record; its boxes may be `written` already.

    Args:
        processing: of the model; None: it has no vision encoder.
        pictures: placeholders of every picture and video, where they depend on it; None: as the headers say.
    """
    if (record.images or record.objects) and processing is None:
        what = f"{len(record.images)} images" if record.images else "objects of pictures"
        raise record.where.error(Code.NO_VISION, "image", what, "set model.vision, or drop the record")
    pictures = _placeholders(record, processing) if pictures is None else pictures
    try:
        return encoder.encode(
            written(record, processing).learned(config.supervise),
            max_length=config.max_length,
            pictures=pictures,
            truncate=config.too_long == "truncate",
            whole=config.train_on == "all",
        )
    except (TooLong, SpecialTextError, UnlearnedThinking, UnrenderedTools) as error:
        what, _, remedy = str(error).partition("; ")
        raise record.where.error(error.code, "conversations", what, remedy) from error


def check_headers(record: Record, count: int) -> None:
    """Read the headers of the first pictures and videos of a record."""
    for number, picture in enumerate(record.images[:count]):
        with faults_of_picture(record, number):
            picture.size()


@contextmanager
def faults_of_picture(record: Record, number: int) -> Iterator[None]:
    """Turn the fault of a picture into the error of its record."""
    try:
        yield
    except ImageError as error:
        raise _image_fault(record, number, error) from error


def _image_fault(record: Record, number: int, error: ImageError) -> RecordError:
    picture = record.images[number]
    if isinstance(picture, Frame | Clip):
        name = picture.clip.name if isinstance(picture, Frame) else picture.name
        return record.where.error(error.code, "video", f"{name}: {error.what}", error.remedy, path=name)
    hint = ""
    if error.code == Code.IMAGE_MISSING and isinstance(picture, LocalPicture):
        hint = similar_file(picture.path)
    what = f"{picture.name}: {error.what}"
    return record.where.error(error.code, f"image[{number}]", what, error.remedy + hint, path=picture.name)


def _placeholders(record: Record, image_processing: ImageProcessing | None) -> list[tuple[int, ...] | str] | None:
    """Placeholders of a record's pictures and videos, from their headers; None where all take the same number."""
    if image_processing is None or image_processing.fixed:
        return None
    sizes: list[tuple[int, int] | VideoMetadata] = []
    for number, picture in enumerate(record.images):
        with faults_of_picture(record, number):
            sizes.append(picture.metadata() if isinstance(picture, Clip) else picture.size() or _NOT_FETCHED)
    with _refusals(record):
        return image_processing.placeholders(sizes)


@contextmanager
def _refusals(record: Record) -> Iterator[None]:
    """Turn what a model's processor raises for a video into the error of its record."""
    clips = [picture for picture in record.images if isinstance(picture, Clip)]
    try:
        yield
    except Exception as error:  # processors raise nearly anything
        if not clips:
            raise
        what = f"{clips[0].name}: the model's video processor refuses it ({reason_of(error)})"
        remedy = "cut or convert it, or change video_frames or video_fps"
        raise record.where.error(Code.VIDEO_FORMAT, "video", what, remedy, path=clips[0].name) from error
