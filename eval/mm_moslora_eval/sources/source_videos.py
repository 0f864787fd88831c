"""Videos of documents as pictures: their frames, by number or by rate, through the door of training (`video_clip`)."""

from __future__ import annotations

import io
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mm_moslora.utils.files import sha256_of
from mm_moslora.utils.untrusted_files import opened
from mm_moslora_eval.sources.document import ImageLike, StoredImage

if TYPE_CHECKING:
    from mm_moslora.data.images.record_picture import PictureRules
    from mm_moslora.data.images.video_clip import Clip

_KEPT = 4
"""Videos whose frames are kept, while they are read one after the other."""


def frames_of_record(
    videos: Any, *, file: Path, row: int, rules: PictureRules
) -> tuple[tuple[ImageLike, ...], str | None]:
    """The frames of the videos that a record names, and the first problem.

    Args:
        videos: a name, a list of names, or None.
        file: of the record, for messages.
        row: its number.
        rules: where videos may lie, and how many frames are shown.
    """
    from mm_moslora.data.images.video_clip import find_clip
    from mm_moslora.data.record_faults import RecordError, Where
    from mm_moslora.utils.errors import DataError

    items = videos if isinstance(videos, list | tuple) else [] if videos in (None, "") else [videos]
    frames: list[ImageLike] = []
    for index, item in enumerate(items):
        try:
            clip = find_clip(item, index, Where(file=file, line=None, row=row), rules)
            video = VideoFrames(clip)
            frames += [StoredImage(video.read, row, "video", n, video.identity(n)) for n in range(video.count)]
        except RecordError as error:
            return (), f"video {error.what}; {error.remedy}"
        except (DataError, OSError) as error:
            return (), f"the video cannot be read: {error}"
    return tuple(frames), None


class VideoFrames:
    """The shown frames of a video, decoded when they are needed."""

    def __init__(self, clip: Clip) -> None:
        self._clip = clip
        clip.metadata()  # a file without frames is a fault now
        self.count = len(clip.pictures())
        source = clip.source
        if isinstance(source, Path) and source.is_file():
            with opened(source, most=None) as stream:
                self._file = sha256_of(stream)
        else:  # a folder of frames, or bytes
            self._file = ""

    def identity(self, number: int) -> str:
        """A text that identifies a frame without decoding it; empty where its pixels must."""
        return f"frame {number} of {self.count} of {self._file}" if self._file else ""

    def read(self, row: int, column: str, number: int) -> bytes:
        """A frame as a PNG file."""
        clip = self._clip
        shown = _kept(clip.source, clip.name, clip.count, clip.root, clip.fps)
        buffer = io.BytesIO()
        shown.frames()[number].save(buffer, "PNG", compress_level=1)
        return buffer.getvalue()


@lru_cache(maxsize=_KEPT)
def _kept(source: Any, name: str, count: int, root: Path | None, fps: float | None) -> Clip:
    from mm_moslora.data.images.video_clip import Clip

    return Clip(source, name, count, root=root, fps=fps)
