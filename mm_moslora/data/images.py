"""Opening pictures: any ordinary file becomes 8-bit RGB by documented rules, anything else one clear error.

Rules: EXIF rotation is applied; transparency is composited on white; 16-bit, 32-bit and float pictures are scaled to
their own range, never clipped; of an animation the first frame counts.
"""

from __future__ import annotations

import io
import os
import stat
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from mm_moslora.errors import DataError

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
"""Accepted file formats, whatever the suffix says."""
MAX_PIXELS = 89_478_485
"""Larger pictures are refused before they are decoded."""
MAX_ASPECT = 200
"""Longer side divided by the shorter one."""


def open_image(path: Path) -> Image.Image:
    """Open a picture file as RGB.

    Raises:
        DataError: missing, not a regular file, not a picture, cut short, or out of proportion.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise DataError(f"{path}: cannot be opened ({reason}). Check the path and the image folder.") from error
    with os.fdopen(descriptor, "rb") as stream:
        if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
            raise DataError(f"{path}: is no regular file, expected a picture.")
        return open_image_bytes(stream.read(), name=str(path))


def open_image_bytes(data: bytes, *, name: str = "image") -> Image.Image:
    """Open the bytes of a picture file as RGB; see `open_image`.

    Args:
        data: the whole file.
        name: for messages.
    """
    if not data:
        raise DataError(f"{name}: is empty (0 bytes), expected a picture.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                _check_size(image, name)
                image.seek(0)
                image.load()
                return _to_rgb(ImageOps.exif_transpose(image))
    except DataError:
        raise
    except UnidentifiedImageError as error:
        raise DataError(f"{name}: {_guess(data)}, expected one of {', '.join(FORMATS)}.") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DataError(f"{name}: has more than {MAX_PIXELS} pixels. Scale it down.") from error
    except (OSError, ValueError, SyntaxError, EOFError, TypeError, KeyError, IndexError, OverflowError) as error:
        raise DataError(f"{name}: is damaged or cut short and cannot be decoded. Replace the file.") from error


def _check_size(image: Image.Image, name: str) -> None:
    width, height = image.size
    if width < 1 or height < 1 or max(width, height) > MAX_ASPECT * min(width, height):
        raise DataError(f"{name}: is {width} x {height} pixels; sides may differ by a factor of {MAX_ASPECT} at most.")
    if width * height > MAX_PIXELS:
        raise DataError(f"{name}: has {width * height} pixels, at most {MAX_PIXELS} are accepted. Scale it down.")


def _guess(data: bytes) -> str:
    head = data[:200].lstrip().lower()
    if head.startswith(b"version https://git-lfs"):
        return "is a git-lfs pointer (run `git lfs pull`)"
    if head.startswith((b"<!doctype html", b"<html")):
        return "is an HTML page, probably a failed download"
    if head.startswith((b"<svg", b"<?xml")):
        return "is XML or SVG"
    return "is no picture"


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return _scaled(image)
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        layer = image.convert("RGBA")
        white = Image.new("RGBA", layer.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, layer).convert("RGB")
    return image.convert("RGB")


def _scaled(image: Image.Image) -> Image.Image:
    """Wide grey pictures: 16-bit by its full range, others by the range of their own finite values."""
    values = np.asarray(image).astype(np.float64)
    finite = values[np.isfinite(values)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)
    if image.mode != "F" and 0 <= low and high <= 65535:
        low, high = 0.0, 65535.0
    elif 0.0 <= low and high <= 1.0:
        low, high = 0.0, 1.0
    scaled = np.nan_to_num((values - low) / max(high - low, 1e-12), nan=0.0, posinf=1.0, neginf=0.0)
    return Image.fromarray((scaled.clip(0, 1) * 255).round().astype(np.uint8), mode="L").convert("RGB")


def pad_to_square(image: Image.Image, colour: tuple[int, int, int]) -> Image.Image:
    """Centre a picture on a square of one colour (LLaVA's rule)."""
    side = max(image.size)
    if image.width == image.height:
        return image
    square = Image.new("RGB", (side, side), colour)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square
