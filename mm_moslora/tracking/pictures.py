"""Pictures small enough to send to a dashboard."""

from __future__ import annotations

import logging
from pathlib import Path

from PIL import Image

from mm_moslora.data.images import FORMATS, MAX_BYTES
from mm_moslora.named_files import FileError, opened

logger = logging.getLogger(__name__)

SIDE = 256
"""Longest side in pixels."""


def thumbnail(path: Path | None, *, side: int = SIDE) -> Image.Image | None:
    """A picture as RGB, its longest side at most `side` pixels; None where there is none, or none that can be opened.

    Args:
        path: a picture file; None: there is none.
        side: pixels.
    """
    if path is None:
        return None
    try:
        with opened(path, most=MAX_BYTES) as stream, Image.open(stream, formats=FORMATS) as image:
            image.thumbnail((side, side))
            return image.convert("RGB")
    except (FileError, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        logger.info("%s is not shown by trackers: %s", path, error)
        return None
