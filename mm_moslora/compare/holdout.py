"""Hold out a validation split of the training records, by whole pictures."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mm_moslora.config import Recipe, SourceConfig
from mm_moslora.data.sources.record_source import RecordFile
from mm_moslora.utils.errors import ConfigError
from mm_moslora.utils.files import rename
from mm_moslora.utils.untrusted_data import StrictJsonError

MOST = 2000
"""Maximum number of held-out records, over all sources: more would cost time without a better choice."""


def with_holdout(recipe: Recipe, folder: Path, *, share: float) -> Recipe:
    """Split the recipe's records into training and validation; the split is written once and reused.

    All records with the same picture (or the same list of pictures) stay on one side, which depends on its name. The
    split therefore does not change with the seed or with the order of records.

    Args:
        recipe: without validation sources.
        folder: for the two files of every source.
        share: of the records, 0 to 1.

    Raises:
        ConfigError: no record would be held out, or none left for training.
    """
    if not 0 < share < 1:
        raise ConfigError(f"--hold-out is {share}, expected more than 0 and less than 1, such as 0.05.")
    train, validation = [], []
    for number, source in enumerate(recipe.data.train):
        kept, held = folder / f"train-{number}.jsonl", folder / f"validation-{number}.jsonl"
        if not (kept.is_file() and held.is_file()):
            _split(Path(source.path), kept, held, share=share, most=MOST // len(recipe.data.train))
        images = source.image_folder or str(Path(source.path).parent)
        train.append(dataclasses.replace(source, path=str(kept), image_folder=images))
        validation.append(
            SourceConfig(
                path=str(held), image_folder=images, follow_links=source.follow_links, video_frames=source.video_frames
            )
        )
    return dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, train=train, validation=validation))


def _split(path: Path, kept: Path, held: Path, *, share: float, most: int) -> None:
    kept.parent.mkdir(parents=True, exist_ok=True)
    counts, share = [0, 0], _capped(path, share, most)
    parts = [target.with_suffix(".part") for target in (kept, held)]
    with parts[0].open("w", encoding="utf-8") as rest, parts[1].open("w", encoding="utf-8") as out:
        for record in _records(path):
            aside = _position(record) < share
            (out if aside else rest).write(json.dumps(record, ensure_ascii=False) + "\n")
            counts[aside] += 1
    if not all(counts):
        raise ConfigError(
            f"{path}: holding out {share:g} of its records leaves {counts[0]} for training and {counts[1]} for "
            "validation. Change --hold-out, or give data.validation or --validation TASK."
        )
    for part, target in zip(parts, (kept, held), strict=True):
        rename(part, target)


def _capped(path: Path, share: float, most: int) -> float:
    """The share, or a smaller one whose whole pictures hold at most so many records, and at least one picture."""
    held = sorted(place for record in _records(path) if (place := _position(record)) < share)
    return share if len(held) <= most else max(held[most], math.nextafter(held[0], 1.0))


def _records(path: Path) -> Iterator[Any]:
    file = RecordFile(path)
    for row in range(len(file)):
        try:
            yield file.value(row)
        except StrictJsonError:
            continue  # the trainer counts unreadable records, in the file that the user gave


def _position(record: Any) -> float:
    """A number between 0 and 1 for a record, from its picture, else from its text."""
    image = record.get("image") if isinstance(record, dict) else None
    key = json.dumps(image if image else record, sort_keys=True)
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:6]) / 2**48
