"""Videos as pictures: a number of frames at even distances, from a video file, an animation, or a folder of frames.

Rules:

- Of F frames the n at indices round(i (F - 1) / (n - 1)) are taken, which include the first and the last. A video with
  fewer than n frames repeats some. For n = 1 the first frame is taken.
- Frames become 8-bit RGB with the file's rotation applied, by the rules for pictures (`record_picture`).
- The content decides the kind, not the suffix. Pillow reads GIF, WebP and PNG. The frames of a folder are its pictures
  in natural order of their names. FFmpeg reads everything else through PyAV (`pyav_decode`).
"""

from __future__ import annotations

import io
import os
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from PIL import Image

from mm_moslora.data.images.picture_faults import FAULT_CODES, ImageError, faults_of_pictures
from mm_moslora.data.images.pyav_decode import (
    MAX_FRAMES,
    check_decoded,
    check_pixels,
    check_shown,
    decode_frames,
    frame_indices,
)
from mm_moslora.data.images.record_picture import (
    PictureRules,
    StoredPicture,
    as_rgb,
    check_image,
    content_of,
    find_file,
    open_image,
)
from mm_moslora.data.record_faults import Code, Where
from mm_moslora.utils.untrusted_files import FileError, opened

SUFFIXES = frozenset({".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".ogv", ".flv", ".wmv"})
"""Suffixes of files that count as videos on a command line and in a tar file."""
MAX_BYTES = 4 * 2**30
"""Larger files are not read."""
_ANIMATIONS = ("GIF", "WEBP", "PNG")
_MAX_COMPOSED = 1_000_000_000
"""Most pixels of all frames of an animation: Pillow composes each on the whole canvas, 75 million pixels a second."""
_PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
_DIGITS = re.compile(r"(\d+)")


@dataclass(eq=False)
class Clip:
    """A video of a record, of which some frames are shown.

    All frames are decoded when the first one is needed, and kept as long as the clip exists.
    """

    source: Path | Callable[[], bytes]
    """A file, a folder, or a function that returns the bytes of a file."""
    name: str
    """For messages."""
    count: int
    """Frames to show."""
    root: Path | None = None
    """Folder below which the frames of a folder must lie, links resolved; None: anywhere."""
    _frames: list[Image.Image] | None = field(default=None, repr=False)
    _size: tuple[int, int] | None = field(default=None, repr=False)
    _lock: Any = field(default_factory=threading.Lock, repr=False)

    def pictures(self) -> list[Frame]:
        """The frames, as pictures."""
        return [Frame(self, index) for index in range(self.count)]

    def frames(self) -> list[Image.Image]:
        """The frames as RGB.

        Raises:
            ImageError: missing, of no accepted kind, broken, too long or too large.
            DataError: PyAV is needed and not installed.
        """
        with self._lock:
            if self._frames is None:
                self._frames = self._decoded(self.count)
            return self._frames

    def size(self) -> tuple[int, int]:
        """Width and height in pixels, from the first frame.

        Raises:
            ImageError: a fault in the file's header or its first frame.
            DataError: PyAV is needed and not installed.
        """
        if self._size is None:
            if self._is_folder():
                self._size = check_image(self._files()[0])
            else:
                self._size = (self._frames or self._decoded(1))[0].size
        return self._size

    def _is_folder(self) -> bool:
        return isinstance(self.source, Path) and self.source.is_dir()

    def _decoded(self, count: int) -> list[Image.Image]:
        if self._is_folder():
            files = self._files()
            shown = [files[index] for index in frame_indices(len(files), count)]
            sizes = [check_image(path) for path in shown]
            check_shown(
                sum(width * height for width, height in sizes), f"{count} frames of its pictures' sizes", self.name
            )
            return [open_image(path) for path in shown]
        with self._opened() as stream:
            if _is_animation(stream):
                return _of_animation(stream, count, shown=self.count, name=self.name)
            return decode_frames(stream, count, shown=self.count, name=self.name)

    def _files(self) -> list[Path]:
        """The pictures of a folder of frames, in order."""
        assert isinstance(self.source, Path)
        try:
            frames = sorted((path for path in self.source.iterdir() if path.suffix.lower() in _PICTURES), key=_natural)
        except OSError as error:
            remedy = "check its permissions"
            raise ImageError(Code.IMAGE_MISSING, self.name, f"cannot be opened ({error.strerror})", remedy) from error
        if not frames:
            what = f"is a folder without pictures ({', '.join(_PICTURES)})"
            raise ImageError(Code.VIDEO_FORMAT, self.name, what, "put the frames there, named in order")
        for path in frames:
            if self.root is not None and not Path(os.path.realpath(path)).is_relative_to(self.root):
                what = f"holds {path.name!a}, which links out of {self.root}"
                remedy = "copy the frames there, or set follow_links for this source"
                raise ImageError(Code.PATH_ESCAPES, self.name, what, remedy)
        return frames

    @contextmanager
    def _opened(self) -> Iterator[BinaryIO]:
        if not isinstance(self.source, Path):
            data = self.source()
            _check_bytes(len(data), self.name)
            yield io.BytesIO(data)
            return
        try:
            with opened(self.source, most=None) as file:
                _check_bytes(os.fstat(file.fileno()).st_size, self.name)
                yield file
        except FileError as error:
            raise ImageError(FAULT_CODES[error.fault], self.name, error.what, error.remedy) from error


@dataclass(frozen=True)
class Frame:
    """One frame of a video, a picture like any other."""

    clip: Clip
    index: int

    @property
    def name(self) -> str:
        """See `Picture`."""
        return f"{self.clip.name}#frame={self.index + 1}of{self.clip.count}"

    def rgb(self) -> Image.Image:
        """See `Picture`; all frames of the clip are decoded."""
        return self.clip.frames()[self.index]

    def size(self) -> tuple[int, int]:
        """See `Picture`; the first frame of the clip is decoded."""
        return self.clip.size()


def find_clip(value: Any, index: int, where: Where, rules: PictureRules) -> Clip:
    """The video that a record names.

    Args:
        value: a path below the image folder (of a file, or of a folder of frames), bytes, or an object with `bytes` or
            `path` as in Hugging Face tables.
        index: number of the video within the record.
        where: for messages.
        rules: rules for names.

    Raises:
        RecordError: BAD_IMAGE_NAME or PATH_ESCAPES.
    """
    field_name, data = f"video[{index}]", content_of(value)
    if isinstance(data, StoredPicture):
        return Clip(data.read, data.name, rules.video_frames)
    if isinstance(data, bytes):
        return Clip(lambda: data, f"{where.file}:{where.row}#{field_name}", rules.video_frames)
    path = find_file(data, field_name, where, rules)
    return Clip(path, str(path), rules.video_frames, root=None if rules.follow_links else rules.folder)


def _natural(path: Path) -> list[tuple[int, str]]:
    """frame_2 before frame_10."""
    return [(int(part), "") if part.isdigit() and part.isascii() else (-1, part) for part in _DIGITS.split(path.name)]


def _check_bytes(size: int, name: str) -> None:
    if size == 0:
        raise ImageError(Code.IMAGE_EMPTY, name, "is empty (0 bytes)", "replace the file")
    if size > MAX_BYTES:
        raise ImageError(Code.VIDEO_TOO_LARGE, name, f"takes {size} bytes", f"stay below {MAX_BYTES}, or cut it")


def _is_animation(stream: BinaryIO) -> bool:
    head = stream.read(16)
    stream.seek(0)
    return head[:4] == b"GIF8" or head[:8] == b"\x89PNG\r\n\x1a\n" or (head[:4] == b"RIFF" and head[8:12] == b"WEBP")


def _of_animation(stream: BinaryIO, count: int, *, shown: int, name: str) -> list[Image.Image]:
    with faults_of_pictures(name, b"GIF"), Image.open(stream, formats=_ANIMATIONS) as image:
        frames = int(getattr(image, "n_frames", 1)) if count > 1 else 1
        if frames > MAX_FRAMES:
            raise ImageError(Code.VIDEO_TOO_LONG, name, f"has {frames} frames", f"stay below {MAX_FRAMES}")
        pictures: dict[int, Image.Image] = {}
        wanted = frame_indices(frames, count)
        for index in range(max(wanted) + 1):
            image.seek(index)
            check_pixels(image.size, shown, name)  # a frame beyond the edge makes a GIF larger
            check_decoded(frames * image.width * image.height, name, most=_MAX_COMPOSED)
            if index in wanted:
                pictures[index] = as_rgb(image.copy())
        return [pictures[index] for index in wanted]
