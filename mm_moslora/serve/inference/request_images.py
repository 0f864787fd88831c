"""Pictures of a request: base64 data URLs."""

from __future__ import annotations

import binascii
import io
import re
import threading
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

from mm_moslora.data.images.record_picture import FORMATS, ImageError, check_size, open_image_bytes
from mm_moslora.data.record_faults import Code
from mm_moslora.serve.api.api_errors import ApiError, client_left
from mm_moslora.serve.api.chat_request import MessagePicture
from mm_moslora.serve.api.request_limits import Limits

_DATA = re.compile(r"data:(?P<kind>image/[a-z0-9.+-]{1,40})(?:;[a-z-]{1,20}=[a-z0-9-]{1,20})*;base64,", re.IGNORECASE)
_SAID = {
    Code.IMAGE_EMPTY: "is empty",
    Code.IMAGE_FORMAT: f"is not a picture in an accepted format ({', '.join(FORMATS)})",
    Code.IMAGE_DAMAGED: "is damaged or cut short",
    Code.IMAGE_ASPECT: "is too narrow or has no pixels",
    Code.IMAGE_TOO_LARGE: "has too many pixels",
}


@dataclass(frozen=True, kw_only=True)
class PictureFile:
    """The bytes of a picture and the contents of its header."""

    data: bytes
    where: str
    """Its place in the request."""
    size: tuple[int, int]
    """Width and height, pixels; 0 x 0 where the header cannot be read, which decoding will report."""
    mode: str
    """Pillow's mode; with `;transparency` where one colour is transparent."""

    @property
    def pixels(self) -> int:
        """Width times height."""
        return self.size[0] * self.size[1]


def picture_files(pictures: Sequence[MessagePicture], limits: Limits, *, stop: threading.Event) -> list[PictureFile]:
    """The bytes and headers of the pictures of one request, in order; no pixel is decoded, and the URLs are emptied."""
    files, pixels_left = [], limits.images_pixels
    for picture in pictures:
        refuse_stopped(stop)
        file = _with_header(_bytes(picture), picture.where)
        picture.url = ""
        try:
            if file.mode:  # without a readable header, decoding decides
                check_size(file.size, "picture")
        except ImageError as error:
            raise _wrong(file.where, _SAID[error.code]) from None
        pixels_left -= file.pixels
        if file.pixels > limits.image_pixels:
            what = f"has {file.pixels} pixels, at most {limits.image_pixels} are allowed; scale it down"
            raise _wrong(file.where, what)
        if pixels_left < 0:
            what = f"takes the request above {limits.images_pixels} pixels in all; scale pictures down"
            raise _wrong(file.where, what)
        files.append(file)
    return files


def refuse_large(files: Sequence[PictureFile], limits: Limits, *, squares: bool) -> None:
    """Refuse pictures that take too much memory when they are decoded one after the other and processed together."""
    copies, peak, allowed = 0, 0, limits.pictures_bytes
    for file in files:
        wide = file.mode in ("I", "F", "LAB") or file.mode.startswith("I;16")
        clear = file.mode in ("RGBA", "RGBa", "LA", "La", "PA") or file.mode.endswith(";transparency")
        copies += 4 * file.pixels
        # Besides the copy that is kept: copies in the file's mode and intermediate ones, then the image processor's
        # before it scales the picture down.
        peak = max(peak, file.pixels * (24 if wide else 12 if clear else 8))
        peak = max(peak, 6 * (max(file.size) ** 2 if squares else file.pixels))
        if copies + peak > allowed:
            raise _wrong(
                file.where,
                f"takes the request to {(copies + peak) // 2**20} MiB of memory when it is opened ({file.size[0]} x "
                f"{file.size[1]} pixels, {file.mode}), at most {allowed // 2**20} are allowed; scale pictures down",
            )


def open_pictures(files: Sequence[PictureFile], *, stop: threading.Event) -> list[Image.Image]:
    """Decode pictures to RGB, in order."""
    opened = []
    for file in files:
        refuse_stopped(stop)
        try:
            opened.append(open_image_bytes(file.data, name="picture"))
        except ImageError as error:
            raise _wrong(file.where, _SAID.get(error.code, "cannot be used")) from None
    return opened


def refuse_stopped(stop: threading.Event) -> None:
    """Stop work with an abandoned result."""
    if stop.is_set():
        raise client_left()


def _bytes(picture: MessagePicture) -> bytes:
    url = picture.url
    if not url[:5].lower().startswith("data:"):  # no socket is opened for an address
        raise ApiError(
            f"{picture.where} is not a data URL; remote images are disabled on this server. Send the picture as "
            "data:image/png;base64,...",
            param=picture.where, code="remote_images_disabled",
        )  # fmt: skip
    head = _DATA.match(url)
    if head is None:
        raise _wrong(picture.where, "is not a base64 data URL of a picture; expected data:image/png;base64,...")
    text = url[head.end() :]
    try:
        if len(text) % 4:  # the decoder accepts excess padding
            raise ValueError
        return binascii.a2b_base64(text, strict_mode=True)
    except ValueError:
        raise _wrong(picture.where, "holds characters or padding that are not valid base64") from None


def _with_header(data: bytes, where: str) -> PictureFile:
    size, mode = (0, 0), ""
    try:
        # The limits of the server replace Pillow's, which would warn or raise at other sizes.
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            size = image.size
            mode = image.mode + (";transparency" if "transparency" in image.info else "")
    except Image.DecompressionBombError:
        raise _wrong(where, "has too many pixels; scale it down") from None
    except Exception:  # noqa: S110  (decoders raise nearly anything for broken headers; decoding will report the cause)
        pass
    return PictureFile(data=data, where=where, size=size, mode=mode)


def _wrong(where: str, what: str) -> ApiError:
    return ApiError(f"{where} {what}.", param=where, code="invalid_image")
