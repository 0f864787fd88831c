"""Pictures small enough to send to a dashboard."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

SIDE = 256
"""Longest side in pixels."""
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF")


def thumbnail(path: Path, *, side: int = SIDE) -> Image.Image:
    """A picture as RGB, its longest side at most `side` pixels.

    Args:
        path: a picture file.
        side: pixels.
    """
    with Image.open(path, formats=FORMATS) as image:
        image.thumbnail((side, side))
        return image.convert("RGB")
