"""Decodes picture files to 8-bit RGB by documented rules; any other file gives one clear error.

Rules:

- EXIF rotation is applied (an orientation that does not exist is ignored); colour profiles are not.
- Transparency is composited on white.
- Grey pictures of more than 8 bits are scaled, never clipped. 16 bit: by 65535. 32-bit integers and floats: by the
  smallest of 1 (floats only), 255 and 65535 that holds all values; otherwise by the picture's minimum and maximum.
- Of an animation the first frame is used.
- The content decides the format, not the suffix.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

from mm_moslora.data.record_faults import Code
from mm_moslora.utils.errors import DataError
from mm_moslora.utils.untrusted_files import FileError, FileFault, opened

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
"""Accepted file formats, recognised by content."""
MAX_BYTES = 256 * 2**20
"""Larger files are not read."""
MAX_PIXELS = 64_000_000
"""Larger pictures are refused before they are decoded."""
MAX_SIDE = 16_384
"""Longest side in pixels: the square around a longer picture would take more than 800 MB."""
MAX_ASPECT = 200
"""Largest aspect ratio: longer side divided by shorter side."""
_STRIP = 2**20
"""Approximate pixels of one strip when transparency is composited."""

_SIGNS = (
    (b"version https://git-lfs", "is a git-lfs pointer (run `git lfs pull`)"),
    (b"<!doctype html", "is an HTML page, probably a failed download"),
    (b"<html", "is an HTML page, probably a failed download"),
    (b"<svg", "is SVG"),
    (b"<?xml", "is XML or SVG"),
    (b"%pdf", "is a PDF"),
    (b"%!ps", "is PostScript"),
    (b"pk\x03\x04", "is a zip archive"),
    (b"\x1f\x8b", "is gzip data"),
    (b"{", "is JSON or text"),
)


class ImageError(DataError):
    """A picture that cannot be used.

    Args:
        code: the fault.
        name: the file.
        what: what was found.
        remedy: what to do.
    """

    def __init__(self, code: Code, name: str, what: str, remedy: str) -> None:
        self.code, self.name, self.what, self.remedy = code, name, what, remedy
        super().__init__(f"{code}: {name}: {what}; {remedy}")

    def __reduce__(self) -> tuple[object, ...]:
        """Support pickling: worker processes send errors to the main process."""
        return ImageError, (self.code, self.name, self.what, self.remedy)


def open_image(path: Path) -> Image.Image:
    """Open a picture file as RGB.

    Raises:
        ImageError: missing, not a regular file, not a picture, cut short, too large or out of proportion.
    """
    return open_image_bytes(read_picture(path), name=str(path))


def open_image_bytes(data: bytes, *, name: str = "image") -> Image.Image:
    """Open the bytes of a picture file as RGB; see `open_image`.

    Args:
        data: the whole file.
        name: for messages.
    """
    with faults_of_pictures(name, data[:512]), _opened(io.BytesIO(data), name) as image:
        image.load()
        return as_rgb(image)


def as_rgb(image: Image.Image) -> Image.Image:
    """An opened picture as RGB, by the rules of this module."""
    return _to_rgb(_upright(image))


def check_image(path: Path) -> tuple[int, int]:
    """Check a picture by its header alone, without decoding it.

    Returns:
        Width and height in pixels, as stored.

    Raises:
        ImageError: a fault in the header, as from `open_image`; damage after the header is not detected.
    """
    with _regular_file(path) as stream:
        head = stream.read(512)
        stream.seek(0)
        with faults_of_pictures(str(path), head), _opened(stream, str(path)) as image:
            return image.size


def check_image_bytes(data: bytes, *, name: str = "image") -> tuple[int, int]:
    """Check the bytes of a picture file by their header alone; see `check_image`."""
    with faults_of_pictures(name, data[:512]), _opened(io.BytesIO(data), name) as image:
        return image.size


_FAULTS = {
    FileFault.BAD_NAME: Code.BAD_IMAGE_NAME,
    FileFault.ESCAPES: Code.PATH_ESCAPES,
    FileFault.MISSING: Code.IMAGE_MISSING,
    FileFault.NOT_A_FILE: Code.IMAGE_NOT_A_FILE,
    FileFault.TOO_LARGE: Code.IMAGE_TOO_LARGE,
}


def code_of(fault: FileFault) -> Code:
    """The code of a file's fault."""
    return _FAULTS[fault]


@contextmanager
def _regular_file(path: Path) -> Iterator[BinaryIO]:
    name = str(path)
    try:
        with opened(path, most=MAX_BYTES) as file:
            if os.fstat(file.fileno()).st_size == 0:
                raise ImageError(Code.IMAGE_EMPTY, name, "is empty (0 bytes)", "replace the file")
            yield file
    except FileError as error:
        raise ImageError(code_of(error.fault), name, error.what, error.remedy) from error


def read_picture(path: Path) -> bytes:
    """The bytes of a picture file, undecoded; see `open_image`."""
    with _regular_file(path) as stream:
        data = stream.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise ImageError(Code.IMAGE_TOO_LARGE, str(path), "grows while it is read", f"stay below {MAX_BYTES} bytes")
    return data


@contextmanager
def faults_of_pictures(name: str, head: bytes) -> Iterator[None]:
    """Turn every exception of a decoder into an `ImageError`."""
    if not head:
        raise ImageError(Code.IMAGE_EMPTY, name, "is empty (0 bytes)", "replace the file")
    try:
        yield
    except ImageError:
        raise
    except UnidentifiedImageError as error:
        raise ImageError(Code.IMAGE_FORMAT, name, _guess(head), f"expected one of {', '.join(FORMATS)}") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        what, remedy = f"has more than {MAX_PIXELS} pixels", "scale it down"
        raise ImageError(Code.IMAGE_TOO_LARGE, name, what, remedy) from error
    except Exception as error:  # for broken files decoders raise many types
        what = f"is damaged or cut short and cannot be decoded ({type(error).__name__}: {str(error)[:80]})"
        raise ImageError(Code.IMAGE_DAMAGED, name, what, "replace the file") from error


@contextmanager
def _opened(stream: BinaryIO, name: str) -> Iterator[Image.Image]:
    with Image.open(stream, formats=FORMATS) as image:
        check_size(image.size, name)
        yield image


def check_size(size: tuple[int, int], name: str) -> None:
    """Refuse a picture with an extreme aspect ratio or too many pixels.

    Raises:
        ImageError: IMAGE_ASPECT or IMAGE_TOO_LARGE.
    """
    long, short = max(size), min(size)
    shown = f"is {size[0]} x {size[1]} pixels"
    if short < 1 or long > MAX_ASPECT * short:
        remedy = f"sides may differ by a factor of {MAX_ASPECT} at most"
        raise ImageError(Code.IMAGE_ASPECT, name, shown, remedy)
    if size[0] * size[1] > MAX_PIXELS or long > MAX_SIDE:
        remedy = f"scale it down to {MAX_PIXELS} pixels and sides of {MAX_SIDE} at most"
        raise ImageError(Code.IMAGE_TOO_LARGE, name, shown, remedy)


def _guess(head: bytes) -> str:
    start = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    return next((what for sign, what in _SIGNS if start.startswith(sign)), "is no picture in an accepted format")


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # with broken EXIF the pixels may still be sound
        return image


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return _scaled(image)
    if image.mode == "LAB":
        convert = ImageCms.buildTransform(ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB"), "LAB", "RGB")
        converted = ImageCms.applyTransform(image, convert)
        assert converted is not None
        return converted
    if image.mode == "La":  # alpha premultiplied
        image = image.convert("LA")
    if image.mode in ("RGBA", "RGBa", "LA", "PA") or "transparency" in image.info:
        return _on_white(image)
    return image.convert("RGB")


def _on_white(image: Image.Image) -> Image.Image:
    """RGB of a picture with transparency, strip by strip.

    Compositing makes several copies and holds the GIL: 40 million pixels at once take 440 MiB and most of a second.
    """
    made = Image.new("RGB", image.size)
    rows = max(1, _STRIP // image.width)
    for top in range(0, image.height, rows):
        box = (0, top, image.width, min(image.height, top + rows))
        layer = image.crop(box).convert("RGBA")
        white = Image.new("RGBA", layer.size, (255, 255, 255, 255))
        made.paste(Image.alpha_composite(white, layer).convert("RGB"), box)
    return made


def _scaled(image: Image.Image) -> Image.Image:
    """8-bit RGB of a grey picture of more than 8 bits, by the rules of this module. NaN becomes black."""
    exact = np.float64 if image.mode == "I" else np.float32
    values: NDArray[np.floating[Any]] = np.asarray(image).astype(exact)
    finite = np.isfinite(values)
    low, high = 0.0, 0.0
    if finite.any():
        low, high = float(values.min(where=finite, initial=np.inf)), float(values.max(where=finite, initial=-np.inf))
    tops: tuple[float, ...] = (65535,) if image.mode.startswith("I;16") else (255, 65535)
    if image.mode == "F":
        tops = (1, *tops)
    held = next((top for top in tops if low >= 0 and high <= top), None)
    if held is not None:
        low, high = 0.0, float(held)
    with np.errstate(all="ignore"):  # in place: a wide picture may take half a gigabyte
        values -= low
        values /= max(high - low, 1e-12)
    np.nan_to_num(values, copy=False, nan=0.0, posinf=1.0, neginf=0.0)
    np.clip(values, 0, 1, out=values)
    values *= 255
    return Image.fromarray(np.rint(values, out=values).astype(np.uint8)).convert("RGB")
