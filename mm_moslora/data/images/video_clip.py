"""Videos: some frames of a video file, an animation, or a folder of frames.

Rules:

- For a model that takes videos as such its own processor chooses the frames, and gets them with what it must know of
  the file (`Video`).
- For others every frame is a picture. Of F frames the n at indices round(i (F - 1) / (n - 1)) are taken, which include
  the first and the last. A video with fewer than n frames repeats some. For n = 1 the first frame is taken. A rate r
  stands for n = max(1, floor(F min(1, r / fps))).
- Of a clip that a record cuts out of a video (`Excerpt`) the same frames are taken as if it were a file of its own. Its
  frames are those from round(start * fps) to round(end * fps), as far as the video has them.
- Frames become 8-bit RGB with the file's rotation applied, by the rules for pictures (`record_picture`).
- The content decides the kind, not the suffix. Pillow reads GIF, WebP and PNG. The frames of a folder are its pictures
  in natural order of their names. FFmpeg reads everything else through PyAV (`pyav_decode`).
"""

from __future__ import annotations

import io
import math
import os
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from PIL import Image

from mm_moslora.config.data_config import MAX_VIDEO_FRAMES
from mm_moslora.data.images.pyav_decode import (
    MAX_FRAMES,
    Choose,
    VideoFacts,
    check_decoded,
    check_pixels,
    check_shown,
    decode_frames,
    frame_indices,
)
from mm_moslora.data.images.record_picture import (
    FAULT_CODES,
    ImageError,
    PictureRules,
    StoredPicture,
    as_rgb,
    check_image,
    content_of,
    faults_of_pictures,
    find_file,
    open_image,
)
from mm_moslora.data.record_faults import Code, Where
from mm_moslora.utils.untrusted_files import FileError, opened

if TYPE_CHECKING:
    from transformers.video_utils import VideoMetadata

    from mm_moslora.batch import Video, VideoSampling

SUFFIXES = frozenset({".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".ogv", ".flv", ".wmv"})
"""Suffixes of files that count as videos on a command line and in a tar file."""
MAX_BYTES = 4 * 2**30
"""Larger files are not read."""
_ANIMATIONS = ("GIF", "WEBP", "PNG")
_MAX_COMPOSED = 1_000_000_000
"""Most pixels of all frames of an animation: Pillow composes each on the whole canvas, 75 million pixels a second."""
_PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
_DIGITS = re.compile(r"(\d+)")


@dataclass(frozen=True)
class Excerpt:
    """The clip of a video that is shown, in seconds from its beginning."""

    start: float = 0.0
    end: float = math.inf


@dataclass(eq=False)
class Clip:
    """A video of a record, of which some frames are shown, decoded when the first one is needed.

    With `sampling` it stands for one picture of the record (see `Picture`), the first frame; else for its frames.
    """

    source: Path | Callable[[], bytes]
    """A file, a folder, or a function that returns the bytes of a file."""
    name: str
    """For messages."""
    count: int
    """Frames to show."""
    root: Path | None = None
    """Folder below which the frames of a folder must lie, links resolved; None: anywhere."""
    fps: float | None = None
    """Frames a second to show instead."""
    sampling: VideoSampling | None = field(default=None, repr=False)
    """Of a model that takes videos as such."""
    excerpt: Excerpt | None = None
    """None: the whole video."""
    folder_fps: float | None = None
    """Frames a second of a folder of frames, which does not say it; None: unknown."""
    middles: bool = False
    """Take the middles of equal parts instead of frames from the first to the last one."""
    _frames: list[Image.Image] | None = field(default=None, repr=False)
    _facts: VideoFacts | None = field(default=None, repr=False)
    _indices: list[int] = field(default_factory=list, repr=False)
    _size: tuple[int, int] | None = field(default=None, repr=False)
    _lock: Any = field(default_factory=threading.Lock, repr=False)

    def pictures(self) -> list[Clip] | list[Frame]:
        """What it stands for in a record; with a rate, the number of frames depends on the file."""
        if self.sampling is not None:
            return [self]
        count = self.count if self.fps is None else len(self._known()[1])
        return [Frame(self, index, count) for index in range(count)]

    def frames(self) -> list[Image.Image]:
        """The shown frames as RGB."""
        with self._lock:
            if self._frames is None:
                self._frames = self._decoded(self._chosen)
            return self._frames

    def metadata(self) -> VideoMetadata:
        """What the model's processor must know, without decoding the shown frames; for errors see `frames`."""
        facts, indices = self._known()
        return _metadata(facts, indices)

    def video(self) -> Video:
        """It for the model's processor; for errors see `frames`."""
        from mm_moslora.batch import Video

        frames = self.frames()
        if len({frame.size for frame in frames}) > 1:
            what = "has frames of different sizes, and the model takes a video as a whole"
            raise ImageError(Code.VIDEO_FORMAT, self.name, what, "bring all frames to one size")
        width, height = frames[0].size  # headers name that before a rotation
        return Video(metadata=replace(self.metadata(), width=width, height=height), frames=frames)

    def rgb(self) -> Image.Image:
        """See `Picture`; the shown frames are decoded."""
        return self.frames()[0]

    def size(self) -> tuple[int, int]:
        """Width and height in pixels, from the first frame."""
        if self._facts is not None:
            return self._facts.size
        if self._size is None:
            self._size = check_image(self._files()[0]) if self._is_folder() else self._decoded(None)[0].size
        return self._size

    def _known(self) -> tuple[VideoFacts, list[int]]:
        """The file's facts and the numbers of the shown frames."""

        def look(facts: VideoFacts) -> list[int]:
            self._chosen(facts)
            return []

        with self._lock:
            if self._facts is None:
                self._decoded(look)
            assert self._facts is not None
            return self._facts, self._indices

    def _chosen(self, facts: VideoFacts) -> list[int]:
        """The numbers of the frames to show; their numbers within the clip, and its facts, are kept."""
        first = 0
        if self.excerpt is not None:
            first, facts = self._within(self.excerpt, facts)
        if self.fps is not None and facts.fps is None:
            remedy = "set video_frames for its source instead of video_fps"
            raise ImageError(Code.VIDEO_FORMAT, self.name, "has no frame rate", remedy)
        if self.sampling is not None:
            frames = self.count if self.fps is None else None
            self._indices = self.sampling.sample(_metadata(facts), frames=frames, fps=self.fps)
        else:
            count = self.count
            if self.fps is not None and facts.fps is not None:
                count = max(1, int(facts.frames * min(1.0, self.fps / facts.fps)))
            self._indices = frame_indices(facts.frames, count, middles=self.middles)
        if (shown := len(self._indices)) > MAX_VIDEO_FRAMES:
            remedy = "lower video_frames or video_fps of its source"
            what = f"gives {shown} frames, at most {MAX_VIDEO_FRAMES}"
            raise ImageError(Code.VIDEO_TOO_LONG, self.name, what, remedy)
        self._facts = facts
        return [first + index for index in self._indices]

    def _within(self, excerpt: Excerpt, facts: VideoFacts) -> tuple[int, VideoFacts]:
        """The number of the first frame of a part of the file, and the facts of that part."""
        if facts.fps is None:
            remedy = "name its frames a second (video_folder_fps), or cut the clip out yourself"
            raise ImageError(Code.VIDEO_FORMAT, self.name, "has no frame rate, which a clip needs", remedy)
        start, end = (min(seconds * facts.fps, float(facts.frames)) for seconds in (excerpt.start, excerpt.end))
        if not (start <= end and end >= 0 and round(start) < facts.frames):
            until = "its end" if math.isinf(excerpt.end) else f"{excerpt.end:g} seconds"
            what = f"has no clip from {excerpt.start:g} to {until}"
            remedy = f"name seconds from 0 to {facts.frames / facts.fps:g}, its length, the first one first"
            raise ImageError(Code.VIDEO_FORMAT, self.name, what, remedy)
        first, last = max(0, round(start)), min(round(end), facts.frames - 1)
        return first, replace(facts, frames=last - first + 1)

    def _is_folder(self) -> bool:
        return isinstance(self.source, Path) and self.source.is_dir()

    def _decoded(self, choose: Choose | None) -> list[Image.Image]:
        """The chosen frames; None: the first one."""
        if self._is_folder():
            files = self._files()
            facts = VideoFacts(len(files), self.folder_fps, check_image(files[0]))
            shown = [files[index] for index in (choose(facts) if choose else [0])]
            pixels = sum(width * height for width, height in map(check_image, shown))
            check_shown(pixels, f"{len(shown)} frames of its pictures' sizes", self.name)
            return [open_image(path) for path in shown]
        with self._opened() as stream:
            if _is_animation(stream):
                return _of_animation(stream, choose, name=self.name)
            return decode_frames(stream, choose, name=self.name)

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
    count: int

    @property
    def name(self) -> str:
        """See `Picture`."""
        return f"{self.clip.name}#frame={self.index + 1}of{self.count}"

    def rgb(self) -> Image.Image:
        """See `Picture`; all frames of the clip are decoded."""
        return self.clip.frames()[self.index]

    def size(self) -> tuple[int, int]:
        """See `Picture`; the first frame of the clip is decoded."""
        return self.clip.size()


def find_clip(value: Any, index: int, where: Where, rules: PictureRules, *, excerpt: Excerpt | None = None) -> Clip:
    """The video that a record names: a path of a file or of a folder of frames, bytes, or a table's object of these."""
    field_name, data = f"video[{index}]", content_of(value)
    clip = partial(
        Clip, count=rules.video_frames, fps=rules.video_fps, sampling=rules.videos, excerpt=excerpt,
        folder_fps=rules.video_folder_fps, middles=rules.video_middles,
    )  # fmt: skip
    if isinstance(data, StoredPicture):
        return clip(data.read, data.name)
    if isinstance(data, bytes):
        return clip(lambda: data, f"{where.file}:{where.row}#{field_name}")
    path = find_file(data, field_name, where, rules)
    return clip(path, str(path), root=None if rules.follow_links else rules.folder)


def _metadata(facts: VideoFacts, indices: Sequence[int] | None = None) -> VideoMetadata:
    """The facts of a file as processors of transformers take them."""
    from transformers.video_utils import VideoMetadata

    return VideoMetadata(
        total_num_frames=facts.frames, fps=facts.fps, width=facts.size[0], height=facts.size[1],
        duration=facts.frames / facts.fps if facts.fps else None, video_backend="pyav",
        frames_indices=None if indices is None else list(indices),
    )  # fmt: skip


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


def _of_animation(stream: BinaryIO, choose: Choose | None, *, name: str) -> list[Image.Image]:
    with faults_of_pictures(name, b"GIF"), Image.open(stream, formats=_ANIMATIONS) as image:
        frames = int(getattr(image, "n_frames", 1)) if choose else 1
        if frames > MAX_FRAMES:
            raise ImageError(Code.VIDEO_TOO_LONG, name, f"has {frames} frames", f"stay below {MAX_FRAMES}")
        pictures: dict[int, Image.Image] = {}
        milliseconds = image.info.get("duration") or 0
        fps = 1000 / milliseconds if milliseconds > 0 else None
        wanted = choose(VideoFacts(frames, fps, image.size)) if choose else [0]
        for index in range(max(wanted, default=-1) + 1):
            image.seek(index)
            check_pixels(image.size, len(wanted), name)  # a frame beyond the edge makes a GIF larger
            check_decoded(frames * image.width * image.height, name, most=_MAX_COMPOSED)
            if index in wanted:
                pictures[index] = as_rgb(image.copy())
        return [pictures[index] for index in wanted]
