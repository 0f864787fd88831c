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
    options: dict[str, str] | None = None, rate: int = 10,
) -> Path:  # fmt: skip
    """A video file of the kind of its suffix; the left third is a little darker, so that its sides differ."""
    import av

    with av.open(path, "w") as container:
        track = container.add_stream(codec, rate=rate, options=options or {})
        track.width, track.height, track.pix_fmt = *size, "yuv420p"
        if rotation:
            track.set_display_rotation(rotation)
        for number in range(frames):
            pixels = np.full((size[1], size[0], 3), shade(number), dtype=np.uint8)
            pixels[:, : size[0] // 3] -= 6
            container.mux(track.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(track.encode())
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
