"""A record's picture, from its name to 8-bit RGB; any other file gives one clear error.

A record names a file below the image folder, bytes within the data, or a URL (`remote_files`). Rules of decoding:

- EXIF rotation is applied (an orientation that does not exist is ignored); colour profiles are not.
- Transparency is composited on white.
- Grey pictures of more than 8 bits are scaled, never clipped. 16 bit: by 65535. 32-bit integers and floats: by the
  smallest of 1 (floats only), 255 and 65535 that holds all values; otherwise by the picture's minimum and maximum.
- Of an animation the first frame is used.
- The content decides the format, not the suffix.
"""

from __future__ import annotations

import base64
import binascii
import io
import os
import re
import unicodedata
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageCms, ImageOps, UnidentifiedImageError

from mm_moslora.data.record_faults import Code, Where, kind_of
from mm_moslora.utils.errors import DataError
from mm_moslora.utils.untrusted_files import FileError, FileFault, find_below, opened

if TYPE_CHECKING:
    from mm_moslora.batch import VideoSampling


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


DATA_URL = re.compile(r"data:image/[A-Za-z0-9.+-]+;base64,")
"""Start of a URL that contains a picture."""
_STRIP = 2**20
"""Approximate pixels of one strip when transparency is composited."""


@dataclass(frozen=True, kw_only=True)
class PictureRules:
    """Rules for the name of a picture or video."""

    folder: Path
    """The image folder, resolved; files must lie below it."""
    follow_links: bool = False
    """Accept symbolic links that lead out of it."""
    hosts: tuple[str, ...] = ()
    """Hosts from which pictures may be fetched."""
    video_frames: int = 8
    """Frames that are shown of a video."""
    video_fps: float | None = field(default=None, repr=False)
    """Frames a second that are shown instead."""
    video_folder_fps: float | None = field(default=None, repr=False)
    """Frames a second of folders of frames; None: unknown."""
    video_middles: bool = field(default=False, repr=False)
    """Show the middles of equal parts of a video, not frames from its first to its last."""
    videos: VideoSampling | None = field(default=None, repr=False)
    """Of a model that takes videos as such; None: a video becomes pictures."""


class Picture(Protocol):
    """A picture that a record names."""

    @property
    def name(self) -> str:
        """Path, member or URL; of a frame its video and number."""

    def rgb(self) -> Image.Image:
        """The picture as 8-bit RGB."""

    def size(self) -> tuple[int, int] | None:
        """Width and height, upright, from the header alone; None for a picture that is not fetched yet."""


@dataclass(frozen=True)
class LocalPicture:
    """A picture file."""

    path: Path

    @property
    def name(self) -> str:
        """See `Picture`."""
        return str(self.path)

    def rgb(self) -> Image.Image:
        """See `Picture`."""
        return open_image(self.path)

    def size(self) -> tuple[int, int]:
        """See `Picture`."""
        return check_image(self.path)


@dataclass(frozen=True)
class StoredPicture:
    """A picture stored as bytes in a table, a tar file or the record itself."""

    name: str
    """For messages."""
    read: Callable[[], bytes] = field(compare=False)
    """The bytes of the picture file."""

    def rgb(self) -> Image.Image:
        """See `Picture`."""
        return open_image_bytes(self.read(), name=self.name)

    def size(self) -> tuple[int, int]:
        """See `Picture`."""
        return check_image_bytes(self.read(), name=self.name)


def find_picture(value: Any, index: int, where: Where, rules: PictureRules) -> LocalPicture | StoredPicture:
    """The picture that a record names; URLs of other machines are for `remote_files.find_remote`.

    `value` is a path below the image folder, a data URL, bytes, an object with `bytes` or `path` as in Hugging Face
    tables, or a `StoredPicture`.
    """
    field_name, data = f"image[{index}]", content_of(value)
    if isinstance(data, StoredPicture):
        return data
    if isinstance(data, str) and DATA_URL.match(data):
        try:
            data = base64.b64decode(data.partition(",")[2], validate=True)
        except (binascii.Error, ValueError) as error:
            remedy = "encode the whole picture file"
            raise where.error(Code.BAD_IMAGE_NAME, field_name, f"is no base64 ({error})", remedy) from error
    if isinstance(data, bytes):
        return StoredPicture(f"{where.file}:{where.row}#{field_name}", lambda: data)
    return LocalPicture(find_file(data, field_name, where, rules))


def content_of(value: Any) -> Any:
    """The bytes, path or URL in an object of a table or of a content part; any other value unchanged."""
    if isinstance(value, Mapping) and ("bytes" in value or "path" in value):
        value = value["bytes"] if value.get("bytes") is not None else value.get("path")
    return value["url"] if isinstance(value, Mapping) and "url" in value else value  # OpenAI's image_url parts


def find_file(name: Any, field_name: str, where: Where, rules: PictureRules) -> Path:
    """The file below the image folder that a plain path names; `imagefolder` tables contain absolute paths."""
    if not isinstance(name, str) or not name.strip():
        kind = kind_of(name) if not isinstance(name, str) else "empty"
        raise where.error(Code.BAD_IMAGE_NAME, field_name, f"is {kind}", "write a path below the image folder")
    try:
        return find_below(rules.folder, name, follow_links=rules.follow_links)
    except FileError as error:
        what, remedy = f"{error.name} {error.what}", error.remedy
        if error.fault == FileFault.BAD_NAME:
            remedy += "; nothing is downloaded unless the source names its host in image_hosts"
        elif "links" in error.what:
            remedy += ", or set follow_links for this source"
        raise where.error(FAULT_CODES[error.fault], field_name, what, remedy, path=name) from error


def open_image(path: Path) -> Image.Image:
    """Open a picture file as RGB."""
    return open_image_bytes(read_picture(path), name=str(path))


def open_image_bytes(data: bytes, *, name: str = "image") -> Image.Image:
    """Open the bytes of a picture file as RGB; see `open_image`."""
    with _opened(io.BytesIO(data), name) as image:
        image.load()
        return as_rgb(image)


def check_image(path: Path) -> tuple[int, int]:
    """Check a picture by its header alone; its width and height in pixels, upright."""
    with _regular_file(path) as stream, _opened(stream, str(path)) as image:
        return _upright_size(image)


def check_image_bytes(data: bytes, *, name: str = "image") -> tuple[int, int]:
    """Check the bytes of a picture file by their header alone; see `check_image`."""
    with _opened(io.BytesIO(data), name) as image:
        return _upright_size(image)


def _upright_size(image: Image.Image) -> tuple[int, int]:
    """The size that `as_rgb` gives. Only orientations ahead of the pixels are seen: the others need them all."""
    with suppress(Exception):  # see `as_rgb`
        if "exif" in image.info and image.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8):
            return image.height, image.width
    return image.size


@contextmanager
def _regular_file(path: Path) -> Iterator[BinaryIO]:
    name = str(path)
    try:
        with opened(path, most=MAX_BYTES) as file:
            if os.fstat(file.fileno()).st_size == 0:
                raise ImageError(Code.IMAGE_EMPTY, name, "is empty (0 bytes)", "replace the file")
            yield file
    except FileError as error:
        raise ImageError(FAULT_CODES[error.fault], name, error.what, error.remedy) from error


def read_picture(path: Path) -> bytes:
    """The bytes of a picture file, undecoded; see `open_image`."""
    with _regular_file(path) as stream:
        data = stream.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise ImageError(Code.IMAGE_TOO_LARGE, str(path), "grows while it is read", f"stay below {MAX_BYTES} bytes")
    return data


@contextmanager
def _opened(stream: BinaryIO, name: str) -> Iterator[Image.Image]:
    head = stream.read(512)
    stream.seek(0)
    with faults_of_pictures(name, head), Image.open(stream, formats=FORMATS) as image:
        check_size(image.size, name)
        yield image


def as_rgb(image: Image.Image) -> Image.Image:
    """An opened picture as RGB, by the rules of this module."""
    with suppress(Exception):  # with broken EXIF the pixels may still be sound
        image = ImageOps.exif_transpose(image)
    if image.mode in ("RGB", "L", "P") and "transparency" not in image.info:
        return image.convert("RGB")
    return _rgb_of_mode(image)


def _rgb_of_mode(image: Image.Image) -> Image.Image:
    """An opened picture of any mode as RGB."""
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
    scale = next((top for top in tops if low >= 0 and high <= top), None)
    if scale is not None:
        low, high = 0.0, float(scale)
    with np.errstate(all="ignore"):  # in place: a wide picture may take half a gigabyte
        values -= low
        values /= max(high - low, 1e-12)
    np.nan_to_num(values, copy=False, nan=0.0, posinf=1.0, neginf=0.0)
    np.clip(values, 0, 1, out=values)
    values *= 255
    return Image.fromarray(np.rint(values, out=values).astype(np.uint8)).convert("RGB")
