"""Videos of documents through the door of training (`video_clip`): frames as pictures, or a model's own videos."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields, replace
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mm_moslora.utils.errors import DataError
from mm_moslora.utils.identity import sha256_of, sha256_of_bytes
from mm_moslora_eval.sources.document import Document, ImageLike, StoredImage

if TYPE_CHECKING:
    from transformers.video_utils import VideoMetadata

    from mm_moslora.batch import Video, VideoSampling
    from mm_moslora.data.images.record_picture import PictureRules
    from mm_moslora.data.images.video_clip import Clip, Excerpt

TAG = "<image>"
"""The place of a picture in a question."""
START, END = "video_start", "video_end"
"""Fields of a record: where the clip of its videos begins and ends, in seconds or as `h:mm:ss`."""
_CLOCK = re.compile(r"(?:(\d+):)?(\d+):(\d+(?:\.\d+)?)")
_KEPT = 4
"""Videos whose frames are kept, while they are read one after the other."""


def frames_of_record(
    videos: Any, cell: Callable[[str], Any], *, file: Path, row: int, rules: PictureRules
) -> tuple[tuple[ImageLike, ...], str | None]:
    """The frames of the videos that a record names, and the first problem."""
    from mm_moslora.data.images.video_clip import find_clip
    from mm_moslora.data.record_faults import RecordError, Where

    items = videos if isinstance(videos, list | tuple) else [] if videos in (None, "") else [videos]
    frames: list[ImageLike] = []
    try:
        excerpt = _excerpt(cell(START), cell(END)) if items else None
    except ValueError as error:
        return (), str(error)
    for index, item in enumerate(items):
        try:
            clip = find_clip(item, index, Where(file=file, line=None, row=row), rules, excerpt=excerpt)
            video = VideoFrames(clip)
            frames += [
                VideoFrame(video.read, row, "video", n, video.identity(n), video=video) for n in range(video.count)
            ]
        except RecordError as error:
            return (), f"video {error.what}; {error.remedy}"
        except (DataError, OSError) as error:
            return (), f"the video cannot be read: {error}"
    return tuple(frames), None


def _excerpt(start: Any, end: Any) -> Excerpt | None:
    """The part of a video between two cells; None without either."""
    from mm_moslora.data.images.video_clip import Excerpt

    first, last = _seconds(start, START), _seconds(end, END)
    if first is None and last is None:
        return None
    return Excerpt(first or 0.0, math.inf if last is None else last)


def _seconds(value: Any, name: str) -> float | None:
    text = "" if value is None else str(value).strip()
    if text in ("", "nan", "NaN", "None"):
        return None
    clock = _CLOCK.fullmatch(text)
    try:
        seconds = (int(clock[1] or 0) * 60 + int(clock[2])) * 60 + float(clock[3]) if clock else float(text)
    except (ValueError, OverflowError):
        seconds = math.nan
    if not math.isfinite(seconds):
        raise ValueError(f"{name} is {text[:40]!r}, expected seconds, such as 12.5 or 1:02:03")
    return seconds


class VideoFrames:
    """The shown frames of a video, decoded when they are needed."""

    def __init__(self, clip: Clip) -> None:
        self._clip = clip
        self._part = f" from {clip.excerpt.start} to {clip.excerpt.end} s" if clip.excerpt else ""
        self._part += " in middles" if clip.middles else ""
        clip.metadata()  # a file without frames is a fault now
        self.count = len(clip.pictures())
        self._whole: WholeVideo | None = None
        source = clip.source
        if isinstance(source, Path) and source.is_file():
            self._file = sha256_of(source)
        else:  # a folder of frames, or bytes
            self._file = ""

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of its frames, by the file's header."""
        return self._clip.size()

    def identity(self, number: int) -> str:
        """A text that identifies a frame without decoding it; empty where its pixels must."""
        return f"frame {number} of {self.count}{self._part} of {self._file}" if self._file else ""

    def read(self, row: int, column: str, number: int) -> bytes:
        """A frame as a PNG file."""
        buffer = io.BytesIO()
        self._shown(None).frames()[number].save(buffer, "PNG", compress_level=1)
        return buffer.getvalue()

    def whole(self, sampling: VideoSampling) -> WholeVideo:
        """It for a model that takes videos as such."""
        if self._whole is not None and self._whole.sampling is sampling:
            return self._whole
        clip = self._shown(sampling)
        about = clip.metadata()
        shown = about.frames_indices or ()
        file = self._file
        if not file:
            frames = clip.video().frames
            file = sha256_of_bytes(more=(f"{frame.size} ".encode() + frame.tobytes() for frame in frames))
        identity = f"video {list(shown)}{self._part} of {file}"
        self._whole = WholeVideo(self.read, 0, "video", 0, identity, frames=self, sampling=sampling, about=about)
        return self._whole

    def video(self, sampling: VideoSampling) -> Video:
        """It for the model's processor; for errors see `Clip.video`."""
        return self._shown(sampling).video()

    def _shown(self, sampling: VideoSampling | None) -> Clip:
        """The clip with its frames, the same object for the same ones of several documents."""
        own = {field.name: getattr(self._clip, field.name) for field in fields(self._clip) if field.name[0] != "_"}
        return _kept(tuple((own | {"sampling": sampling}).items()))


@dataclass(frozen=True, eq=False)
class VideoFrame(StoredImage):
    """A frame of a video as a picture."""

    video: VideoFrames | None = field(default=None, kw_only=True)


@dataclass(frozen=True, eq=False)
class WholeVideo(StoredImage):
    """A video that a model takes as such; as a picture it is its first frame."""

    frames: VideoFrames = field(kw_only=True)
    sampling: VideoSampling = field(kw_only=True)
    about: VideoMetadata = field(kw_only=True)
    blank: bool = field(default=False, kw_only=True)
    """Every frame has the mean colour of all."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """Frames that are shown, width and height."""
        return len(self.about.frames_indices or ()), self.about.width or 0, self.about.height or 0

    def video(self) -> Video:
        """It for the model's processor; for errors see `Clip.video`."""
        from PIL import Image, ImageStat

        video = self.frames.video(self.sampling)
        if not self.blank:
            return video
        means = [ImageStat.Stat(frame).mean for frame in video.frames]
        red, green, blue = (round(sum(values) / len(means)) for values in zip(*means, strict=True))
        return replace(video, frames=[Image.new("RGB", video.frames[0].size, (red, green, blue))] * len(means))


def with_whole_videos(document: Document, sampling: VideoSampling | None) -> Document:
    """The document with each video as one picture; unchanged where other tags than theirs stand between its frames."""
    images: list[ImageLike] = []
    question = document.question
    if sampling is None or not any(isinstance(image, VideoFrame) for image in document.images):
        return document
    for video, group in groupby(document.images, lambda image: getattr(image, "video", None)):
        frames = list(group)
        if not isinstance(video, VideoFrames):
            images += frames
            continue
        try:
            images.append(video.whole(sampling))
        except DataError as error:
            return document.with_problem(f"the video cannot be read: {error}")
        question = question.replace(TAG * len(frames), TAG, 1)
    if document.question.count(TAG) == len(document.images) and question.count(TAG) != len(images):
        return document
    return replace(document, images=tuple(images), question=question)


def about_videos(documents: Iterable[Document]) -> dict[str, Any]:
    """How videos are shown, and the least and the most frames of one; empty without videos."""
    images = [image for document in documents for image in document.images]
    native = [image.shape[0] for image in images if isinstance(image, WholeVideo)]
    pictures = {id(image.video): image.video.count for image in images if isinstance(image, VideoFrame) and image.video}
    forms = [form for form, shown in (("native", native), ("frames", pictures)) if shown]
    counts = [*native, *pictures.values()]
    return {"video": " and ".join(forms), "video_frames": [min(counts), max(counts)]} if counts else {}


@lru_cache(maxsize=_KEPT)
def _kept(values: tuple[tuple[str, Any], ...]) -> Clip:
    from mm_moslora.data.images.video_clip import Clip

    return Clip(**dict(values))
