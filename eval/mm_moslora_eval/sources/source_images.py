"""Pictures of documents: found and opened by the rules of training, identified, and replaced in controls.

The two controls are the mean colour (blind) and another item's picture (wrong).
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mm_moslora.utils.errors import EvalError
from mm_moslora.utils.identity import sha256_of, sha256_of_bytes
from mm_moslora.utils.untrusted_files import opened
from mm_moslora_eval.sources.document import ImageLike, StoredImage
from mm_moslora_eval.sources.source import Source
from mm_moslora_eval.sources.source_videos import WholeVideo, frames_of_record

if TYPE_CHECKING:
    from PIL.Image import Image

    from mm_moslora.data.images.record_picture import PictureRules


FRAMES = 8
"""Frames of a video, where neither a task nor the training of the model says how many."""


def rules_of(folder: Path, source: Source) -> PictureRules:
    """Rules for pictures: files below a resolved folder, bytes and data URLs are accepted; links out of it if asked."""
    from mm_moslora.data.images.record_picture import PictureRules

    return PictureRules(
        folder=folder, follow_links=source.follow_links, video_frames=source.video_frames or FRAMES,
        video_fps=source.video_fps,
        video_folder_fps=source.video_folder_fps, video_middles=source.video_sampling == "middles",
    )  # fmt: skip


def shown_of_record(
    record: Mapping[str, Any], *, file: Path, row: int, rules: PictureRules
) -> tuple[tuple[ImageLike, ...], str | None]:
    """The pictures of a record and the frames of its videos after them, and the first problem."""
    pictures, problem = pictures_of_record(record.get("image"), file=file, row=row, rules=rules)
    if record.get("video") in (None, ""):
        return pictures, problem
    frames, other = frames_of_record(record["video"], record.get, file=file, row=row, rules=rules)
    return ((), problem or other) if problem or other else (pictures + frames, None)


def pictures_of_record(
    images: Any, *, file: Path, row: int, rules: PictureRules
) -> tuple[tuple[ImageLike, ...], str | None]:
    """The pictures that a record gives (names, bytes, objects with either, a list, None), and the first problem."""
    from mm_moslora.data.images.record_picture import LocalPicture, find_picture
    from mm_moslora.data.record_faults import RecordError, Where

    where = Where(file=file, line=None, row=row)
    items = images if isinstance(images, list | tuple) else [] if images in (None, "") else [images]
    pictures: list[ImageLike] = []
    for index, item in enumerate(items):
        try:
            picture = find_picture(item, index, where, rules)
        except RecordError as error:
            return (), f"image {error.what}; {error.remedy}"
        pictures.append(picture.path if isinstance(picture, LocalPicture) else picture.read())
    return tuple(pictures), None


ImageMode = Literal["own", "blind", "wrong"]
MODES: tuple[ImageMode, ...] = ("own", "blind", "wrong")


class Hasher:
    """SHA-256 of pictures; a file is read once per process."""

    def __init__(self) -> None:
        self._known: dict[Path | StoredImage, str] = {}

    def __call__(self, image: ImageLike) -> str:
        """Hash of the file's bytes, or of size, mode and pixels of an opened picture."""
        if isinstance(image, bytes):
            return sha256_of_bytes(image)
        if isinstance(image, Path | StoredImage):
            if image not in self._known:
                self._known[image] = _digest(image)
            return self._known[image]
        return sha256_of_bytes(f"{image.size} {image.mode} ".encode(), image.tobytes())


def _digest(image: Path | StoredImage) -> str:
    from mm_moslora.data.images.record_picture import MAX_BYTES

    if isinstance(image, StoredImage):
        return sha256_of_bytes(image.identity.encode() or image.read())
    with opened(image, most=MAX_BYTES) as stream:
        return sha256_of(stream)


def open_image(image: ImageLike) -> Image:
    """Decode to RGB by the rules of training (`mm_moslora.data.images.record_picture`)."""
    from mm_moslora.data.images import record_picture

    if isinstance(image, Path):
        return record_picture.open_image(image)
    if isinstance(image, StoredImage):
        image = image.read()
    return record_picture.open_image_bytes(image) if isinstance(image, bytes) else record_picture.as_rgb(image)


def image_size(image: ImageLike) -> tuple[int, int]:
    """Width and height of a picture, upright, by its header where it has one; see `open_image`."""
    from mm_moslora.data.images import record_picture

    if isinstance(image, Path):
        return record_picture.check_image(image)
    if isinstance(image, StoredImage):
        image = image.read()
    return record_picture.check_image_bytes(image) if isinstance(image, bytes) else open_image(image).size


def mean_image(image: ImageLike) -> ImageLike:
    """A picture of the same size filled with the mean colour of all pixels; of a video a video."""
    from PIL import Image as Pillow
    from PIL import ImageStat

    if isinstance(image, WholeVideo):
        return replace(image, blank=True)
    opened = open_image(image)
    colour = tuple(round(value) for value in ImageStat.Stat(opened).mean)
    return Pillow.new("RGB", opened.size, (colour[0], colour[1], colour[2]))


def derangement(identities: Iterable[str], *, seed: int, apart: Iterable[Sequence[str]] = ()) -> dict[str, str]:
    """Another picture for every picture: a seeded permutation without fixed points."""
    distinct = sorted(set(identities))
    if len(distinct) < 2:
        raise EvalError(f"Image mode `wrong` needs two different pictures, the data has {len(distinct)}.")
    random.Random(seed).shuffle(distinct)
    # A cyclic shift of the shuffled list has no fixed point.
    return _spread_apart(dict(zip(distinct, [*distinct[1:], distinct[0]], strict=True)), _companions(apart))


def _companions(documents: Iterable[Sequence[str]]) -> dict[str, set[str]]:
    """Picture -> all pictures that occur in a document with it, including itself."""
    companions: dict[str, set[str]] = {}
    for names in documents:
        for name in names if len(set(names)) > 1 else ():
            companions.setdefault(name, {name}).update(names)
    return companions


def _spread_apart(other: dict[str, str], companions: Mapping[str, set[str]]) -> dict[str, str]:
    """The permutation with pictures exchanged until, if possible, none replaces a picture of the same document."""
    # Quadratic, but only in pictures of documents with several; without a partner to exchange, a pair stays.
    names = list(other)
    for name in companions:
        if other[name] not in companions[name]:
            continue
        for third in names:
            fits = other[third] not in companions[name] | {name}
            if fits and other[name] not in companions.get(third, {third}):
                other[name], other[third] = other[third], other[name]
                break
    return other
