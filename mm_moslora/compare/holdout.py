"""Hold out a validation split of the training records, by whole pictures."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
from collections.abc import Iterator, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

from mm_moslora.config import Recipe, SourceConfig
from mm_moslora.data.images.record_picture import LocalPicture, Picture, StoredPicture
from mm_moslora.data.images.video_clip import Frame
from mm_moslora.data.record_faults import RecordError
from mm_moslora.data.sources.open_sources import open_source
from mm_moslora.data.sources.record_file import RecordFile, RecordSource
from mm_moslora.utils.errors import ConfigError
from mm_moslora.utils.files import rename, writing_in_place
from mm_moslora.utils.identity import number_of, sha256_of_bytes
from mm_moslora.utils.untrusted_data import StrictJsonError
from mm_moslora.utils.untrusted_files import FileError, opened

MOST = 2000
"""Maximum number of held-out records, over all sources: more would cost time without a better choice."""
_END = 4096


def check_share(share: float) -> float:
    """The share of the records to hold out; ConfigError where it is not between 0 and 1."""
    if not 0 < share < 1:
        raise ConfigError(f"--hold-out is {share}, expected more than 0 and less than 1, such as 0.05.")
    return share


def with_holdout(recipe: Recipe, folder: Path, *, share: float, reuse: bool) -> Recipe:
    """Split the records of a recipe without validation sources into two files of every source in `folder`."""
    # Records that share a picture stay on one side, in whatever form and under whatever name they hold it, and so do
    # those that are linked by others. The side depends on the pictures' contents: it does not change with the seed or
    # with the order of records. `reuse`: files that are there hold the split of these records.
    sources = recipe.data.train
    files = [
        tuple(folder / f"{side}-{number}.jsonl" for side in ("train", "validation")) for number in range(len(sources))
    ]
    if not (reuse and all(path.is_file() for pair in files for path in pair)):
        records = [_opened(source) for source in sources]
        for each, positions, (train_file, validation_file) in zip(records, _positions(records), files, strict=True):
            _split(each, positions, train_file, validation_file, share=share, most=MOST // len(sources))
    train, validation = [], []
    for source, (train_file, validation_file) in zip(sources, files, strict=True):
        images = source.image_folder or str(Path(source.path).parent)
        train.append(dataclasses.replace(source, path=str(train_file), image_folder=images))
        validation.append(SourceConfig(
            path=str(validation_file), image_folder=images, follow_links=source.follow_links,
            video_frames=source.video_frames, video_fps=source.video_fps,
        ))  # fmt: skip
    return dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, train=train, validation=validation))


def _opened(source: SourceConfig) -> RecordSource:
    records = open_source(dataclasses.replace(source, limit=None))
    if not isinstance(records, RecordFile):
        raise ConfigError(
            f"{source.path} is no JSON or JSONL file, and --hold-out splits no other source. Set hold_out of the "
            "source itself (data.train), or give data.validation or --validation TASK."
        )
    return records


def _split(
    source: RecordSource, positions: Sequence[float], train_file: Path, validation_file: Path, *,
    share: float, most: int,
) -> None:  # fmt: skip
    train_file.parent.mkdir(parents=True, exist_ok=True)
    counts, capped = [0, 0], _capped(positions, share, most)
    parts = [target.with_suffix(".part") for target in (train_file, validation_file)]
    with writing_in_place(parts[0]) as rest, writing_in_place(parts[1]) as out:
        for (_, record), position in zip(_records(source), positions, strict=True):
            aside = position < capped
            (out if aside else rest).write(json.dumps(record, ensure_ascii=False) + "\n")
            counts[aside] += 1
    if not all(counts):
        raise ConfigError(
            f"{source.path}: holding out {capped:g} of its records leaves {counts[0]} for training and {counts[1]} for "
            "validation; records that share a picture stay together. Change --hold-out, or give data.validation or "
            "--validation TASK."
        )
    for part, target in zip(parts, (train_file, validation_file), strict=True):
        rename(part, target)


def _capped(positions: Sequence[float], share: float, most: int) -> float:
    """The share, or a smaller one whose whole pictures hold at most so many records, and at least one picture."""
    below = sorted(position for position in positions if position < share)
    return share if len(below) <= most else max(below[most], math.nextafter(below[0], 1.0))


def _records(source: RecordSource) -> Iterator[tuple[int, Any]]:
    for row in range(len(source)):
        try:
            yield row, source.value(row)
        except StrictJsonError:
            continue  # the trainer counts unreadable records, in the file that the user gave


def _positions(sources: Sequence[RecordSource]) -> list[list[float]]:
    """A number between 0 and 1 for every readable record: one for all that are linked by pictures."""
    parents: dict[str, str] = {}

    def root(key: str) -> str:
        while (above := parents.setdefault(key, key)) != key:
            parents[key] = key = parents[above]
        return key

    firsts: list[list[str]] = []
    for source in sources:
        firsts.append([])
        for row, value in _records(source):
            keys = _keys(source, row, value)
            for key in keys:
                # The least key stands for its group, whatever the order of records.
                low, high = sorted((root(keys[0]), root(key)))
                parents[high] = low
            firsts[-1].append(keys[0])
    return [[_number(root(key)) for key in keys] for keys in firsts]


def _keys(source: RecordSource, row: int, value: Any) -> list[str]:
    """Keys by which a record is grouped: its pictures, or its text if it has none."""
    try:
        images = source[row].images
    except RecordError:  # the trainer counts it
        images = ()
    return [_identity(picture) for picture in images] or [json.dumps(value, sort_keys=True)]


def _identity(picture: Picture) -> str:
    """The content of a picture, or its name where it cannot be read here."""
    source = picture.clip.source if isinstance(picture, Frame) else picture
    if isinstance(source, StoredPicture):
        source = source.read
    path = source.path if isinstance(source, LocalPicture) else source
    if isinstance(path, Path):
        return _identity_of_file(Path(os.path.realpath(path)))
    return _content(BytesIO(path())) if callable(path) else picture.name


@functools.cache
def _identity_of_file(path: Path) -> str:
    try:
        with opened(path, most=None) as stream:
            return _content(stream)
    except FileError:  # missing, or a folder of frames
        return str(path)


def _content(stream: BinaryIO) -> str:
    """Size and both ends of a file: pictures that agree in these are one."""
    first = stream.read(_END)
    size = stream.seek(0, os.SEEK_END)
    stream.seek(max(0, size - _END))
    return f"{size} {sha256_of_bytes(first, stream.read(_END))}"


def _number(key: str) -> float:
    return (number_of(key) >> 8) / 2**48
