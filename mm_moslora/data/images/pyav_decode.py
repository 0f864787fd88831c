"""Frames of a video file, read by FFmpeg through PyAV.

A file cannot make the decoder open another file. Only listed containers are accepted, without playlists, and a
container is refused any other file.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO

from PIL import Image

from mm_moslora.data.images.record_picture import ImageError, check_size
from mm_moslora.data.record_faults import Code
from mm_moslora.utils.errors import DataError
from mm_moslora.utils.package_requirements import install_command

CONTAINERS = ("mov", "mp4", "matroska", "webm", "avi", "mpegts", "mpeg", "ogg", "flv", "asf")
"""Accepted, by FFmpeg's names."""
MAX_SECONDS = 4 * 3600
"""Longer videos are refused."""
MAX_FRAMES = 2_000_000
"""More frames in one file are refused."""
MAX_PIXELS = 256_000_000
"""Most pixels of all shown frames of one video together (768 MB)."""
_MISSING_SHARE = 0.02
"""A file that lacks more of the length that it declares, and more than two frames, is cut short."""
MAX_DECODED = 64_000_000_000
"""Most pixels of all frames that are decoded to reach the shown ones: 31,000 frames of 1920 x 1080."""


@dataclass(frozen=True)
class VideoFacts:
    """What decides which frames of a video are shown."""

    frames: int
    """All of them."""
    fps: float | None
    """Frames per second on average; None: unknown."""
    size: tuple[int, int]
    """Width and height in pixels of the first frame, upright."""


Choose = Callable[[VideoFacts], Sequence[int]]
"""The numbers of the frames to show."""


def frame_indices(frames: int, count: int, *, middles: bool = False) -> list[int]:
    """Numbers of `count` frames at even distances, the first and last included, or the middles of as many equal parts.

    Middles are rounded as MVBench rounds them.
    """
    if middles:
        part = (frames - 1) / count
        return [int(part / 2 + round(part * index)) for index in range(count)]
    if count == 1:
        return [0]
    return [(2 * index * (frames - 1) + count - 1) // (2 * (count - 1)) for index in range(count)]


def check_pixels(size: tuple[int, int], count: int, name: str) -> None:
    """Refuse an extreme aspect ratio, and too many pixels, of a video of which `count` frames are shown."""
    check_size(size, name)
    check_shown(size[0] * size[1] * count, f"{count} frames of {size[0]} x {size[1]} pixels", name)


def check_shown(pixels: int, frames: str, name: str) -> None:
    """Refuse too many pixels in all shown frames together."""
    if pixels > MAX_PIXELS:
        remedy = f"lower video_frames of its source, or scale it down to {MAX_PIXELS} pixels together"
        raise ImageError(Code.VIDEO_TOO_LARGE, name, f"gives {frames}", remedy)


def check_decoded(pixels: int, name: str, *, most: int = MAX_DECODED) -> None:
    """Refuse too many pixels in all frames that are decoded: compressed, a frame may take one byte."""
    if pixels > most:
        what = f"takes more than {most} decoded pixels to show its frames"
        raise ImageError(Code.VIDEO_TOO_LARGE, name, what, "cut it, scale it down, or encode it with more key frames")


def decode_frames(stream: BinaryIO, choose: Choose | None, *, name: str) -> list[Image.Image]:
    """Chosen frames of a seekable video file as RGB; None: the first one, without reading the rest of the file."""
    av = _pyav()
    with _faults(name), _container(av, stream, name) as container:
        if not container.streams.video:
            raise ImageError(Code.VIDEO_FORMAT, name, "holds no video stream", "name a file with moving pictures")
        seconds = (container.duration or 0) / av.time_base
        if seconds > MAX_SECONDS:
            what = f"lasts {seconds:.0f} seconds"
            raise ImageError(Code.VIDEO_TOO_LONG, name, what, f"cut it into parts of at most {MAX_SECONDS} seconds")
        track = container.streams.video[0]
        check_pixels((track.codec_context.width, track.codec_context.height), 1, name)
        track.thread_type = "NONE"  # callers run one process per processor
        if choose is None:
            return [_picture(next(_decoded(container, track, name)), 1, name)]
        return _taken(container, track, choose, name)


def _container(av: Any, stream: BinaryIO, name: str) -> Any:
    options = {"format_whitelist": ",".join(CONTAINERS), "protocol_whitelist": "none"}
    try:
        return av.open(stream, container_options=options, buffer_size=2**18, io_open=_refuse)
    except (av.error.FFmpegError, ValueError) as error:
        what = f"is damaged, or no video in an accepted container ({str(error)[:80]})"
        raise ImageError(Code.VIDEO_FORMAT, name, what, f"expected one of {', '.join(CONTAINERS)}, or GIF") from error


def _taken(container: Any, track: Any, choose: Choose, name: str) -> list[Image.Image]:
    """Chosen frames: one pass without decoding lists all, then each is decoded from its key frame on."""
    times, keys = _times(container, track, name)
    size = _picture(next(_from(times[0], container, track, name)), 1, name).size
    seconds = float((times[-1] - times[0]) * track.time_base)
    fps = float(track.average_rate or 0) or (len(times) - 1) / (seconds or 1)
    wanted = [times[index] for index in choose(VideoFacts(len(times), fps or None, size))]
    check_pixels(size, len(wanted), name)
    pictures: dict[int, Image.Image] = {}
    frames: Iterator[Any] = iter(())
    current: Any = None
    decoded = 0
    for time in sorted(set(wanted)):
        key = max((start for start in keys if start <= time), default=times[0])
        if current is None or key > current.pts:
            frames = _from(key, container, track, name)
            current = next(frames)
        while current.pts < time:
            following = next(frames, None)
            if following is None:
                break  # the last frames cannot be decoded; the frame before replaces them
            current = following
            decoded += current.width * current.height
            check_decoded(decoded, name)
        pictures[time] = _picture(current, len(wanted), name)
    return [pictures[time] for time in wanted]


def _from(key: int, container: Any, track: Any, name: str) -> Iterator[Any]:
    """Frames from a key frame on; from the start of the file if the container cannot seek to it."""
    container.seek(key, stream=track, backward=True)
    frames = _decoded(container, track, name)
    first = next(frames)
    if first.pts > key:
        container.seek(0)
        frames = _decoded(container, track, name)
        first = next(frames)
    return itertools.chain([first], frames)


def _times(container: Any, track: Any, name: str) -> tuple[list[int], list[int]]:
    """Times of all frames and of the key frames, in units of the stream."""
    times: set[int] = set()
    keys: list[int] = []
    first, end = math.inf, -math.inf
    # A file that declares one length for all of its streams may have longer sound than pictures.
    streams = [track] if track.duration else [stream for stream in container.streams if stream.time_base]
    for packet in itertools.islice(container.demux(streams), 4 * MAX_FRAMES):
        time = packet.dts if packet.pts is None else packet.pts
        if time is None or not packet.size or packet.is_corrupt:
            continue
        first = min(first, float(time * packet.time_base))
        end = max(end, float((time + (packet.duration or 0)) * packet.time_base))
        if packet.stream_index != track.index:
            continue
        times.add(time)
        if packet.is_keyframe:
            keys.append(time)
        if len(times) > MAX_FRAMES:
            raise ImageError(Code.VIDEO_TOO_LONG, name, f"has more than {MAX_FRAMES} frames", "cut it into parts")
    if not times:
        raise ImageError(Code.VIDEO_DAMAGED, name, "has no frames with a time", "replace the file")
    seconds = track.duration * track.time_base if track.duration else (container.duration or 0) / _pyav().time_base
    if float(seconds) - (end - first) > max(_MISSING_SHARE * float(seconds), 2 / float(track.average_rate or 10)):
        what = f"is cut short: it declares {float(seconds):.1f} seconds and holds {end - first:.1f}"
        raise ImageError(Code.VIDEO_DAMAGED, name, what, "replace the file")
    return sorted(times), sorted(keys)


def _decoded(container: Any, track: Any, name: str) -> Iterator[Any]:
    """Frames with a time, from the container's current position on."""
    none = True
    for frame in container.decode(track):
        if frame.pts is not None:
            none = False
            yield frame
    if none:
        raise ImageError(Code.VIDEO_DAMAGED, name, "has no frame that can be decoded", "replace the file")


def _picture(frame: Any, shown: int, name: str) -> Image.Image:
    """A frame as RGB, with the file's rotation applied."""
    check_pixels((frame.width, frame.height), shown, name)  # a frame's size may differ from that in the header
    image: Image.Image = frame.to_image()
    turn = round(frame.rotation / 90) % 4
    return image.rotate(90 * turn, expand=True) if turn else image


@contextmanager
def _faults(name: str) -> Iterator[None]:
    """Turn every exception of a decoder into an `ImageError`."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:  # for broken files decoders raise many types
        what = f"is damaged or cut short and cannot be decoded ({type(error).__name__}: {str(error)[:80]})"
        raise ImageError(Code.VIDEO_DAMAGED, name, what, "replace the file") from error


def _refuse(url: str, *_: Any) -> Any:
    raise ValueError(f"it asks for {url[:80]!a}, and nothing but the file itself is read")


def _pyav() -> Any:
    try:
        import av
    except ImportError as error:
        raise DataError(
            "The data hold video files, and PyAV, which decodes them, is not installed. "
            f"Run: {install_command('av')}, or name a folder of frames instead."
        ) from error
    av.logging.set_level(av.logging.PANIC)
    return av
