"""Pictures inlined as data URLs: thumbnails of samples, and heat maps of mixers.

A heat map's colour is the sign and its opacity the size, so it reads on a light page and on a dark one.
"""

from __future__ import annotations

import base64
import io
import math
from pathlib import Path

from PIL import Image

from mm_moslora.named_files import find_below, opened

THUMBNAIL = 320
"""Longest side in pixels."""
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF")
LARGEST_PIXELS = 50_000_000
LARGEST_BYTES = 64 * 2**20
POSITIVE, NEGATIVE = (217, 95, 14), (37, 99, 235)


def thumbnail(folder: Path, name: str) -> str | None:
    """A picture of a run folder as a data URL; None when it is missing, damaged or outside the folder.

    Args:
        folder: the run folder.
        name: path below it.
    """
    try:
        path = find_below(folder.resolve(), name)
        with opened(path, most=LARGEST_BYTES) as file, Image.open(file, formats=FORMATS) as image:
            if image.width * image.height > LARGEST_PIXELS:
                return None
            image.thumbnail((THUMBNAIL, THUMBNAIL))
            small = _on_white(image)
    except (OSError, ValueError, Image.DecompressionBombError):
        return None
    stream = io.BytesIO()
    if max(small.size) <= 128:  # drawings of a few pixels: JPEG would smear them
        small.save(stream, "PNG", optimize=True)
        return _data_url("png", stream)
    small.save(stream, "JPEG", quality=84, optimize=True)
    return _data_url("jpeg", stream)


def heat_map(matrix: list[list[float]], scale: float) -> str:
    """A matrix as a PNG data URL, one pixel per cell.

    Args:
        matrix: rows of equal length.
        scale: the absolute value shown in full colour.
    """
    image = Image.new("RGBA", (len(matrix[0]), len(matrix)))
    pixels = []
    for row in matrix:
        for value in row:
            strength = 0.0 if scale <= 0 else min(1.0, abs(value) / scale)
            # A square root lifts small entries, which are most of a mixer, out of the background.
            pixels.append((*(POSITIVE if value >= 0 else NEGATIVE), round(255 * math.sqrt(strength))))
    image.putdata(pixels)
    stream = io.BytesIO()
    image.save(stream, "PNG", optimize=True)
    return _data_url("png", stream)


def _on_white(image: Image.Image) -> Image.Image:
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        layer = image.convert("RGBA")
        white = Image.new("RGBA", layer.size, "white")
        return Image.alpha_composite(white, layer).convert("RGB")
    return image.convert("RGB")


def _data_url(kind: str, stream: io.BytesIO) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(stream.getvalue()).decode('ascii')}"
