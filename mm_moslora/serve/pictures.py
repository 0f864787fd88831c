"""Pictures of a request: base64 data URLs, and addresses only where the server's owner allowed the host."""

from __future__ import annotations

import binascii
import io
import re
from collections.abc import Callable, Sequence

from PIL import Image

from mm_moslora.data.faults import Code
from mm_moslora.data.images import FORMATS, ImageError, open_image_bytes
from mm_moslora.serve.faults import ApiError
from mm_moslora.serve.limits import Limits
from mm_moslora.serve.wire import Picture

_DATA = re.compile(r"data:(?P<kind>image/[a-z0-9.+-]{1,40})(?:;[a-z-]{1,20}=[a-z0-9-]{1,20})*;base64,", re.IGNORECASE)
_SAID = {
    Code.IMAGE_EMPTY: "is empty",
    Code.IMAGE_FORMAT: f"is no picture in an accepted format ({', '.join(FORMATS)})",
    Code.IMAGE_DAMAGED: "is damaged or cut short",
    Code.IMAGE_ASPECT: "is too narrow or has no pixels",
    Code.IMAGE_TOO_LARGE: "has too many pixels",
}

Fetch = Callable[[str], bytes]
"""Gives the bytes behind an address, or raises `ApiError`."""


def open_pictures(pictures: Sequence[Picture], limits: Limits, *, fetch: Fetch | None = None) -> list[Image.Image]:
    """Open the pictures of one request as RGB, in order.

    Args:
        pictures: from the request.
        limits: the server's.
        fetch: for http(s) addresses; None: they are refused, and no socket is opened.

    Raises:
        ApiError: names the part that is wrong; its text is ours, never a decoder's.
    """
    files = [_bytes(picture, fetch) for picture in pictures]
    left = limits.images_pixels
    for picture, data in zip(pictures, files, strict=True):  # headers first: nothing is decoded that is refused
        pixels = _pixels(data, picture.where)
        if pixels > limits.image_pixels:
            raise _wrong(picture, f"has {pixels} pixels, at most {limits.image_pixels} are allowed; scale it down")
        left -= pixels
        if left < 0:
            raise _wrong(picture, f"takes the request above {limits.images_pixels} pixels in all; scale pictures down")
    return [_open(data, picture) for picture, data in zip(pictures, files, strict=True)]


def _bytes(picture: Picture, fetch: Fetch | None) -> bytes:
    url = picture.url
    if not url[:5].lower().startswith("data:"):
        if fetch is None or not url[:8].lower().startswith("https://"):
            raise ApiError(
                f"{picture.where} is no data URL; remote images are disabled on this server. Send the picture as "
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
        raise _wrong(picture, "is no base64 data URL of a picture; expected data:image/png;base64,...")
    text = url[head.end() :]
    try:
        if len(text) % 4:  # the decoder takes a padding that is too long
            raise ValueError
        return binascii.a2b_base64(text, strict_mode=True)
    except ValueError:
        raise _wrong(picture, "holds characters or a padding that base64 does not have") from None


def _pixels(data: bytes, where: str) -> int:
    """Width times height by the header; 0 when there is none, which opening will say."""
    try:
        # A limit of its own below: the library's would warn or raise at other sizes.
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            return image.width * image.height
    except Image.DecompressionBombError:
        raise ApiError(f"{where} has too many pixels; scale it down.", param=where, code="invalid_image") from None
    except Exception:  # decoders raise nearly anything for broken headers
        return 0


def _open(data: bytes, picture: Picture) -> Image.Image:
    try:
        return open_image_bytes(data, name="picture")
    except ImageError as error:
        raise _wrong(picture, _SAID.get(error.code, "cannot be used")) from None


def _wrong(picture: Picture, what: str) -> ApiError:
    return ApiError(f"{picture.where} {what}.", param=picture.where, code="invalid_image")
