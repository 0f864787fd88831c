"""The training set: records, encoder and image transform in, examples out; what cannot be used is counted and named."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from mm_moslora.batch import Example
from mm_moslora.config import DataConfig, SourceConfig
from mm_moslora.data.conversation import Encoder, TooLong
from mm_moslora.data.images import open_image
from mm_moslora.data.records import Record, RecordError, RecordFile
from mm_moslora.errors import DataError

logger = logging.getLogger(__name__)

ImageTransform = Callable[[Image.Image], Tensor]


class Quarantine:
    """Bad records: one JSON line each, counted, and an error above a share.

    Args:
        path: the file; None keeps the counts only.
        total: records in all.
        config: `on_bad` and `max_bad_share`.
    """

    def __init__(self, path: Path | None, total: int, config: DataConfig) -> None:
        self.path, self.total, self.config = path, total, config
        self.seen: set[int] = set()
        self.codes: dict[str, int] = {}
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.unlink(missing_ok=True)

    def add(self, index: int, error: DataError) -> None:
        """Record one bad record.

        Raises:
            DataError: `on_bad` is error, or too large a share is bad.
        """
        if index in self.seen:
            return
        self.seen.add(index)
        code = getattr(error, "code", "BAD_IMAGE")
        self.codes[code] = self.codes.get(code, 0) + 1
        if self.path is not None:
            where = getattr(error, "where", None)
            line = {
                "record": index, "id": getattr(where, "id", None), "file": str(getattr(where, "file", "")),
                "line": getattr(where, "line", None), "field": getattr(error, "field", None), "code": code,
                "reason": str(error),
            }  # fmt: skip
            with self.path.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(line, ensure_ascii=False) + "\n")
        if self.config.on_bad == "error":
            raise error
        if len(self.seen) > self.config.max_bad_share * self.total:
            raise DataError(
                f"{len(self.seen)} of {self.total} records cannot be used, more than data.max_bad_share "
                f"({self.config.max_bad_share:.1%}): {self.codes}. The last one: {error}. "
                f"See {self.path}; repair the data or raise data.max_bad_share."
            ) from error


class TrainingSet:
    """All records of some sources.

    Args:
        sources: at least one.
        encoder: tokenises.
        transform: turns a picture into pixels; None for a language model alone.
        config: the recipe's `data`.
        quarantine_path: where bad records are written.
        on_progress: called with (records read, records in all) while lengths are counted.
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
    ) -> None:
        if not sources:
            raise DataError("data.train names no source. Add one with a path to LLaVA JSON or JSONL.")
        self.encoder, self.transform, self.config = encoder, transform, config
        self.files = [
            RecordFile(Path(source.path), Path(source.image_folder) if source.image_folder else None)
            for source in sources
        ]
        self.weights = [source.weight for source in sources]
        self.sizes = [len(file) for file in self.files]
        self.quarantine = Quarantine(quarantine_path, sum(self.sizes), config)
        self.truncated = 0
        self.lengths: list[int] = []
        self.has_image: list[bool] = []
        self._measure(on_progress)

    def __len__(self) -> int:
        return sum(self.sizes)

    @property
    def usable(self) -> list[int]:
        """Numbers of the records that can be used."""
        return [index for index in range(len(self)) if index not in self.quarantine.seen]

    def record(self, index: int) -> Record:
        """The record with a number over all sources.

        Raises:
            RecordError: it cannot be used.
        """
        for file, size in zip(self.files, self.sizes, strict=True):
            if index < size:
                return file[index]
            index -= size
        raise IndexError(index)

    def _measure(self, on_progress: Callable[[int, int], None] | None) -> None:
        for index in range(len(self)):
            length, image = 0, False
            try:
                record = self.record(index)
                encoded = self.encode(record, index)
                length, image = int(encoded.input_ids.shape[0]), bool(record.images)
                self.truncated += encoded.dropped_turns > 0
                self._check_images(record)
            except DataError as error:
                self.quarantine.add(index, error)
            self.lengths.append(length)
            self.has_image.append(image)
            if on_progress is not None:
                on_progress(index + 1, len(self))
        if self.truncated:
            logger.info("%d records lose turns that do not fit into %d tokens.", self.truncated, self.config.max_length)
        if self.quarantine.seen:
            logger.warning("%d records cannot be used: %s", len(self.quarantine.seen), self.quarantine.codes)
        if not self.usable:
            raise DataError(f"None of the {len(self)} records can be used: {self.quarantine.codes}.")

    def _check_images(self, record: Record) -> None:
        for path in record.images:
            if not path.is_file():
                raise DataError(f"{path}: does not exist or is no file. Check data.train.*.image_folder.")

    def encode(self, record: Record, index: int) -> Any:
        """Tokenise a record; see `Encoder.encode`."""
        if record.images and self.transform is None:
            raise DataError(f"record {index} (id={record.id!r}) has images, but the model has no vision encoder.")
        try:
            return self.encoder.encode(record.turns, max_length=self.config.max_length)
        except TooLong as error:
            raise DataError(f"TOO_LONG: record {index} (id={record.id!r}): {error}") from error

    def __getitem__(self, index: int) -> Example | None:
        """One example, or None when its picture turns out to be damaged (then it is in quarantine)."""
        record = self.record(index)
        encoded = self.encode(record, index)
        try:
            pixels = [self.transform(open_image(path)) for path in record.images] if self.transform else []
        except DataError as error:
            self.quarantine.add(index, error)
            return None
        kept = sum(turn.text.count("<image>") for turn in record.turns[: len(record.turns) - encoded.dropped_turns])
        pixels = pixels[:kept]
        return Example(
            id=record.id,
            input_ids=encoded.input_ids,
            supervised=encoded.supervised,
            pixel_values=torch.stack(pixels) if pixels else None,
        )


__all__ = ["ImageTransform", "Quarantine", "RecordError", "TrainingSet"]
