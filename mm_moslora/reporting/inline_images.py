"""Small pictures for pages: thumbnails of samples, and heat maps of mixers."""

from __future__ import annotations

import base64
import io
import logging
import math
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from mm_moslora.utils.untrusted_files import FileError, find_below, opened

logger = logging.getLogger(__name__)

SIDE = 320
"""Longest side in pixels."""
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF")
LARGEST_PIXELS = 64_000_000
LARGEST_BYTES = 256 * 2**20
POSITIVE, NEGATIVE = (217, 95, 14), (37, 99, 235)
_DRAWING = 128
"""Longest side, in pixels, of pictures that JPEG would blur."""


def shrunk(path: Path, *, side: int = SIDE, formats: tuple[str, ...] = FORMATS) -> Image.Image | None:
    """A picture file as RGB on white; None where it is missing, damaged or too large."""
    try:
        with opened(path, most=LARGEST_BYTES) as file, Image.open(file, formats=formats) as image:
            if image.width * image.height > LARGEST_PIXELS:
                return None
            image.thumbnail((side, side))
            return on_white(image)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        logger.info("%s is not shown: %s", path, error)
        return None


def encoded(picture: Image.Image) -> tuple[str, bytes]:
    """The better file format for a small picture, `jpeg` or `png`, and the encoded bytes."""
    stream = io.BytesIO()
    if picture.mode != "RGB" or max(picture.size) <= _DRAWING:
        picture.save(stream, "PNG", optimize=True)
        return "png", stream.getvalue()
    picture.save(stream, "JPEG", quality=84, optimize=True)
    return "jpeg", stream.getvalue()


def data_url(picture: Image.Image) -> str:
    """A data URL of a small picture."""
    kind, data = encoded(picture)
    return f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}"


def thumbnail(folder: Path, name: str) -> str | None:
    """A picture of a run folder as a data URL; None where it is missing, damaged, too large or outside the folder."""
    try:
        picture = shrunk(find_below(folder.resolve(), name))
    except (OSError, FileError):
        return None
    return None if picture is None else data_url(picture)


def heat_map(matrix: Sequence[Sequence[float]], scale: float) -> Image.Image:
    """A matrix as a picture, one pixel per cell; `scale` is the absolute value with full colour."""
    image = Image.new("RGBA", (len(matrix[0]), len(matrix)))
    pixels = []
    for row in matrix:
        for value in row:
            strength = 0.0 if scale <= 0 else min(1.0, abs(value) / scale)
            # A square root makes small entries visible, which are most of a mixer's.
            pixels.append((*(POSITIVE if value >= 0 else NEGATIVE), round(255 * math.sqrt(strength))))
    image.putdata(pixels)
    return image


def on_white(image: Image.Image) -> Image.Image:
    """A picture as RGB, with transparent pixels white."""
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        layer = image.convert("RGBA")
        white = Image.new("RGBA", layer.size, "white")
        return Image.alpha_composite(white, layer).convert("RGB")
    return image.convert("RGB")
