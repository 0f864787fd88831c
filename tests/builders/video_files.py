"""Small real videos, made here: every frame is grey, and how bright says which it is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

STEP = 10


def shade(number: int) -> int:
    """How bright a frame is."""
    return 20 + STEP * number


def number_of(image: Image.Image) -> int:
    """Which frame a picture shows."""
    return round((float(np.asarray(image.convert("L")).mean()) - 20) / STEP)


def write_video(
    path: Path, frames: int = 20, *, codec: str = "libx264", size: tuple[int, int] = (64, 48), rotation: int = 0,
    options: dict[str, str] | None = None, rate: int = 10, container: dict[str, str] | None = None, sound: float = 0,
) -> Path:  # fmt: skip
    """A video file of the kind of its suffix; the left third is a little darker, so that its sides differ.

    Args:
        path: of the file.
        frames: how many.
        codec: of the pictures.
        size: of the pictures.
        rotation: in degrees.
        options: of the codec.
        rate: frames a second.
        container: options of the container.
        sound: seconds of silence beside the pictures.
    """
    import av

    with av.open(path, "w", options=container or {}) as file:
        track = file.add_stream(codec, rate=rate, options=options or {})
        track.width, track.height, track.pix_fmt = *size, "yuv420p"
        silence = file.add_stream("aac", rate=8000) if sound else None
        quiet = av.AudioFrame.from_ndarray(np.zeros((1, int(sound * 8000)), np.float32), format="fltp", layout="mono")
        quiet.sample_rate = 8000
        if rotation:
            track.set_display_rotation(rotation)
        for number in range(frames):
            pixels = np.full((size[1], size[0], 3), shade(number), dtype=np.uint8)
            pixels[:, : size[0] // 3] -= 6
            file.mux(track.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        file.mux(track.encode())
        if silence is not None:
            file.mux([*silence.encode(quiet), *silence.encode()])
    return path


def write_animation(path: Path, frames: int = 20, *, size: tuple[int, int] = (64, 48)) -> Path:
    """An animated GIF, WebP or PNG."""
    first, *rest = [Image.new("RGB", size, (shade(number),) * 3) for number in range(frames)]
    first.save(path, save_all=True, append_images=rest, duration=100, lossless=True)
    return path


def write_frames(folder: Path, frames: int = 20, *, size: tuple[int, int] = (64, 48)) -> Path:
    """A folder of frames, numbered without leading zeros."""
    folder.mkdir(parents=True)
    for number in range(frames):
        Image.new("RGB", size, (shade(number),) * 3).save(folder / f"frame_{number}.png")
    return folder
