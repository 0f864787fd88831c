"""Faults of pictures: limits, codes and messages, which name what the content is where it is no picture."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from mm_moslora.data.record_faults import Code
from mm_moslora.utils.errors import DataError
from mm_moslora.utils.untrusted_files import FileFault

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
FAULT_CODES = {
    FileFault.BAD_NAME: Code.BAD_IMAGE_NAME,
    FileFault.ESCAPES: Code.PATH_ESCAPES,
    FileFault.MISSING: Code.IMAGE_MISSING,
    FileFault.NOT_A_FILE: Code.IMAGE_NOT_A_FILE,
    FileFault.TOO_LARGE: Code.IMAGE_TOO_LARGE,
}
"""Code of every fault of a file."""


class ImageError(DataError):
    """A picture that cannot be used."""

    def __init__(self, code: Code, name: str, what: str, remedy: str) -> None:
        self.code, self.name, self.what, self.remedy = code, name, what, remedy
        super().__init__(f"{code}: {name}: {what}; {remedy}")

    def __reduce__(self) -> tuple[object, ...]:
        """Support pickling: worker processes send errors to the main process."""
        return ImageError, (self.code, self.name, self.what, self.remedy)


def similar_file(path: Path) -> str:
    """A hint if a missing file exists with another spelling of its name, else empty."""
    other = [path.with_name(unicodedata.normalize(form, path.name)) for form in ("NFC", "NFD")]
    other += [path.with_suffix(suffix) for suffix in (".jpg", ".JPG", ".jpeg", ".png", ".PNG", ".gif", ".webp")]
    for candidate in other:
        if candidate != path and candidate.is_file():
            return f" There is {candidate.name!a}."
    return ""


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
        start = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
        what = next((what for sign, what in _SIGNS if start.startswith(sign)), "is no picture in an accepted format")
        raise ImageError(Code.IMAGE_FORMAT, name, what, f"expected one of {', '.join(FORMATS)}") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        what, remedy = f"has more than {MAX_PIXELS} pixels", "scale it down"
        raise ImageError(Code.IMAGE_TOO_LARGE, name, what, remedy) from error
    except Exception as error:  # for broken files decoders raise many types
        what = f"is damaged or cut short and cannot be decoded ({type(error).__name__}: {str(error)[:80]})"
        raise ImageError(Code.IMAGE_DAMAGED, name, what, "replace the file") from error


def check_size(size: tuple[int, int], name: str) -> None:
    """Refuse a picture with an extreme aspect ratio or too many pixels."""
    long, short = max(size), min(size)
    shown = f"is {size[0]} x {size[1]} pixels"
    if short < 1 or long > MAX_ASPECT * short:
        remedy = f"sides may differ by a factor of {MAX_ASPECT} at most"
        raise ImageError(Code.IMAGE_ASPECT, name, shown, remedy)
    if size[0] * size[1] > MAX_PIXELS or long > MAX_SIDE:
        remedy = f"scale it down to {MAX_PIXELS} pixels and sides of {MAX_SIDE} at most"
        raise ImageError(Code.IMAGE_TOO_LARGE, name, shown, remedy)
