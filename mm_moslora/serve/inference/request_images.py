"""Pictures of a request: base64 data URLs, and http(s) URLs of the hosts that the server's owner allowed."""

from __future__ import annotations

import binascii
import io
import re
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from PIL import Image

from mm_moslora.data.images.record_picture import FORMATS, ImageError, check_size, open_image_bytes
from mm_moslora.data.record_faults import Code
from mm_moslora.serve.api.api_errors import ApiError
from mm_moslora.serve.api.chat_request import Picture
from mm_moslora.serve.api.request_limits import Limits

_DATA = re.compile(r"data:(?P<kind>image/[a-z0-9.+-]{1,40})(?:;[a-z-]{1,20}=[a-z0-9-]{1,20})*;base64,", re.IGNORECASE)
_SAID = {
    Code.IMAGE_EMPTY: "is empty",
    Code.IMAGE_FORMAT: f"is not a picture in an accepted format ({', '.join(FORMATS)})",
    Code.IMAGE_DAMAGED: "is damaged or cut short",
    Code.IMAGE_ASPECT: "is too narrow or has no pixels",
    Code.IMAGE_TOO_LARGE: "has too many pixels",
}

Fetch = Callable[[str], bytes]
"""Returns the bytes at a URL, or raises `ApiError`."""


@dataclass(frozen=True, kw_only=True)
class PictureFile:
    """The bytes of a picture and the contents of its header."""

    data: bytes
    picture: Picture
    size: tuple[int, int]
    """Width and height, pixels; 0 x 0 where the header cannot be read, which decoding will report."""
    mode: str
    """Pillow's mode; with `;transparency` where one colour is transparent."""

    @property
    def pixels(self) -> int:
        """Width times height."""
        return self.size[0] * self.size[1]

    def opening(self) -> int:
        """Largest memory of decoding, bytes: copies in the file's mode, in RGB, and intermediate ones."""
        wide = self.mode in ("I", "F", "LAB") or self.mode.startswith("I;16")
        clear = self.mode in ("RGBA", "RGBa", "LA", "La", "PA") or self.mode.endswith(";transparency")
        return self.pixels * (28 if wide else 16 if clear else 12)

    def looking(self, *, squares: bool) -> int:
        """Largest memory of the image processor before it scales the picture down, bytes."""
        return 6 * (max(self.size) ** 2 if squares else self.pixels)


def picture_files(
    pictures: Sequence[Picture], limits: Limits, *, fetch: Fetch | None = None, stop: threading.Event
) -> list[PictureFile]:
    """The bytes and headers of the pictures of one request, in order; no pixel is decoded.

    Args:
        pictures: from the request.
        limits: the server's.
        fetch: for http(s) URLs; None: they are refused, and no socket is opened.
        stop: set when the result is no longer needed.

    Raises:
        ApiError: names the picture that is wrong. The text is this project's own, never a decoder's.
    """
    files, left = [], limits.images_pixels
    for picture in pictures:
        refuse_stopped(stop)
        file = _with_header(_bytes(picture, fetch), picture)
        try:
            if file.mode:  # without a readable header, decoding decides
                check_size(file.size, "picture")
        except ImageError as error:
            raise _wrong(picture, _SAID[error.code]) from None
        if file.pixels > limits.image_pixels:
            raise _wrong(picture, f"has {file.pixels} pixels, at most {limits.image_pixels} are allowed; scale it down")
        left -= file.pixels
        if left < 0:
            raise _wrong(picture, f"takes the request above {limits.images_pixels} pixels in all; scale pictures down")
        files.append(file)
    return files


def memory_of(files: Sequence[PictureFile], limits: Limits, *, squares: bool) -> int:
    """Bytes of memory for decoding pictures one after the other and for processing all of them.

    Args:
        files: from `picture_files`.
        limits: the server's.
        squares: whether the image processor pads pictures to squares.

    Raises:
        ApiError: more than `pictures_bytes`.
    """
    kept, most = 0, 0
    for file in files:
        kept += 4 * file.pixels
        most = max(most, file.opening() - 4 * file.pixels, file.looking(squares=squares))
        if kept + most > limits.pictures_bytes:
            raise _wrong(
                file.picture,
                f"takes the request to {(kept + most) // 2**20} MiB of memory when it is opened ({file.size[0]} x "
                f"{file.size[1]} pixels, {file.mode}), at most {limits.pictures_bytes // 2**20} are allowed; scale "
                "pictures down",
            )
    return kept + most


def open_pictures(files: Sequence[PictureFile], *, stop: threading.Event) -> list[Image.Image]:
    """Decode pictures to RGB, in order.

    Raises:
        ApiError: names the part that is wrong.
    """
    opened = []
    for file in files:
        refuse_stopped(stop)
        opened.append(_open(file.data, file.picture))
    return opened


def refuse_stopped(stop: threading.Event) -> None:
    """Stop work with an abandoned result.

    Raises:
        ApiError: it was abandoned.
    """
    if stop.is_set():
        raise ApiError("The request was abandoned.", status=499, code="client_left")


def _bytes(picture: Picture, fetch: Fetch | None) -> bytes:
    url = picture.url
    if not url[:5].lower().startswith("data:"):
        if fetch is None or not url[:8].lower().startswith("https://"):
            raise ApiError(
                f"{picture.where} is not a data URL; remote images are disabled on this server. Send the picture as "
                "data:image/png;base64,...",
                param=picture.where, code="remote_images_disabled",
            )  # fmt: skip
        try:
            return fetch(url)
        except ApiError as error:
            error.param = picture.where
            raise
    head = _DATA.match(url)
    if head is None:
        raise _wrong(picture, "is not a base64 data URL of a picture; expected data:image/png;base64,...")
    text = url[head.end() :]
    try:
        if len(text) % 4:  # the decoder accepts excess padding
            raise ValueError
        return binascii.a2b_base64(text, strict_mode=True)
    except ValueError:
        raise _wrong(picture, "holds characters or padding that are not valid base64") from None


def _with_header(data: bytes, picture: Picture) -> PictureFile:
    size, mode = (0, 0), ""
    try:
        # The limit above replaces Pillow's, which would warn or raise at other sizes.
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            size = image.size
            mode = image.mode + (";transparency" if "transparency" in image.info else "")
    except Image.DecompressionBombError:
        raise _wrong(picture, "has too many pixels; scale it down") from None
    except Exception:  # noqa: S110  (decoders raise nearly anything for broken headers; decoding will report the cause)
        pass
    return PictureFile(data=data, picture=picture, size=size, mode=mode)


def _open(data: bytes, picture: Picture) -> Image.Image:
    try:
        return open_image_bytes(data, name="picture")
    except ImageError as error:
        raise _wrong(picture, _SAID.get(error.code, "cannot be used")) from None


def _wrong(picture: Picture, what: str) -> ApiError:
    return ApiError(f"{picture.where} {what}.", param=picture.where, code="invalid_image")
