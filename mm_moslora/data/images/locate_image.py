"""Finds a record's picture: a file below the image folder, bytes within the data, or a URL of an allowed host.

A `Picture` is a reference. Opening it gives 8-bit RGB by the rules of `decode_image`. A check reads only the header.
"""

from __future__ import annotations

import base64
import binascii
import re
import unicodedata
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from PIL import Image

from mm_moslora.data.images.decode_image import check_image, check_image_bytes, code_of, open_image, open_image_bytes
from mm_moslora.data.images.remote_files import RemotePicture
from mm_moslora.data.images.video_clip import Clip, Frame
from mm_moslora.data.record_faults import Code, Where, kind_of
from mm_moslora.utils.untrusted_files import BAD_CHARACTER, SCHEME, FileError, FileFault, find_below

_DATA_URL = re.compile(r"data:image/[A-Za-z0-9.+-]+;base64,")


@dataclass(frozen=True)
class StoredPicture:
    """A picture stored as bytes in a table, a tar file or the record itself."""

    name: str
    """For messages."""
    read: Callable[[], bytes] = field(compare=False)
    """The bytes of the picture file."""


Picture = Path | StoredPicture | RemotePicture | Frame


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


def picture_name(picture: Picture) -> str:
    """Path, member or URL; of a frame its video and number."""
    return str(picture) if isinstance(picture, Path) else picture.name


def open_picture(picture: Picture) -> Image.Image:
    """The picture as RGB.

    Raises:
        ImageError: it cannot be read, fetched or decoded.
    """
    if isinstance(picture, Path):
        return open_image(picture)
    if isinstance(picture, Frame):
        return picture.clip.frames()[picture.index]
    return open_image_bytes(picture.read(), name=picture.name)


def check_picture(picture: Picture) -> tuple[int, int] | None:
    """Width and height as stored, from the header alone; None for a picture that is not fetched yet.

    Of a video the first frame is decoded.

    Raises:
        ImageError: a fault in the header, as from `open_picture`.
    """
    if isinstance(picture, Path):
        return check_image(picture)
    if isinstance(picture, Frame):
        return picture.clip.size()
    if isinstance(picture, RemotePicture) and not picture.fetched:
        return None
    return check_image_bytes(picture.read(), name=picture.name)


def find_picture(given: Any, index: int, where: Where, rules: PictureRules) -> Picture:
    """The picture that a record names.

    Args:
        given: a path below the image folder, a URL of an allowed host, a data URL, bytes, an object with `bytes` or
            `path` as in Hugging Face tables, or a `Picture`.
        index: number of the picture within the record.
        where: for messages.
        rules: rules for names.

    Raises:
        RecordError: BAD_IMAGE_NAME or PATH_ESCAPES.
    """
    name = f"{where.file}:{where.row}#image[{index}]"
    if isinstance(given, StoredPicture):
        return given
    if isinstance(given, Mapping) and ("bytes" in given or "path" in given):
        given = given["bytes"] if given.get("bytes") is not None else given.get("path")
    if isinstance(given, bytes):
        data = given
        return StoredPicture(name, lambda: data)
    if isinstance(given, Mapping) and "url" in given:  # OpenAI's image_url parts
        given = given["url"]
    if isinstance(given, str) and _DATA_URL.match(given):
        return _from_data_url(given, name, index, where)
    return _named(given, index, where, rules)


def find_clip(given: Any, index: int, where: Where, rules: PictureRules) -> Clip:
    """The video that a record names.

    Args:
        given: a path below the image folder (of a file, or of a folder of frames), bytes, or an object with `bytes` or
            `path` as in Hugging Face tables.
        index: number of the video within the record.
        where: for messages.
        rules: rules for names.

    Raises:
        RecordError: BAD_IMAGE_NAME or PATH_ESCAPES.
    """
    field_name = f"video[{index}]"
    if isinstance(given, Mapping) and "url" in given:
        given = given["url"]
    if isinstance(given, Mapping) and ("bytes" in given or "path" in given):
        given = given["bytes"] if given.get("bytes") is not None else given.get("path")
    if isinstance(given, StoredPicture):
        return Clip(given.read, given.name, rules.video_frames)
    if isinstance(given, bytes):
        data = given
        return Clip(lambda: data, f"{where.file}:{where.row}#{field_name}", rules.video_frames)
    path = _local(given, field_name, where, rules)
    return Clip(path, str(path), rules.video_frames, root=None if rules.follow_links else rules.folder)


def _from_data_url(text: str, name: str, index: int, where: Where) -> StoredPicture:
    try:
        data = base64.b64decode(text.partition(",")[2], validate=True)
    except (binascii.Error, ValueError) as error:
        remedy = "encode the whole picture file"
        raise where.error(Code.BAD_IMAGE_NAME, f"image[{index}]", f"is no base64 ({error})", remedy) from error
    return StoredPicture(name, lambda: data)


def _named(name: Any, index: int, where: Where, rules: PictureRules) -> Path | RemotePicture:
    field_name = f"image[{index}]"
    if isinstance(name, str) and SCHEME.match(name) and rules.hosts and not BAD_CHARACTER.search(name):
        return _remote(name, ascii(name)[:100], field_name, where, rules)
    return _local(name, field_name, where, rules)


def _local(name: Any, field_name: str, where: Where, rules: PictureRules) -> Path:
    """The file below the image folder that a plain path names; `imagefolder` tables contain absolute paths."""
    if not isinstance(name, str) or not name.strip():
        found = kind_of(name) if not isinstance(name, str) else "empty"
        raise where.error(Code.BAD_IMAGE_NAME, field_name, f"is {found}", "write a path below the image folder")
    try:
        return find_below(rules.folder, name, follow_links=rules.follow_links)
    except FileError as error:
        what, remedy = f"{error.name} {error.what}", error.remedy
        if error.fault == FileFault.BAD_NAME:
            remedy += "; nothing is downloaded unless the source names its host in image_hosts"
        elif "links" in error.what:
            remedy += ", or set follow_links for this source"
        raise where.error(code_of(error.fault), field_name, what, remedy, path=name) from error


def _remote(name: str, shown: str, field_name: str, where: Where, rules: PictureRules) -> RemotePicture:
    try:
        parts = urlsplit(name)
        host = parts.hostname or ""
    except ValueError:
        parts, host = None, ""
    if parts is None or parts.scheme not in ("http", "https") or host not in rules.hosts or parts.username is not None:
        remedy = f"use http or https and one of the hosts in image_hosts ({', '.join(rules.hosts)})"
        raise where.error(Code.BAD_IMAGE_NAME, field_name, f"{shown} may not be fetched", remedy, path=name)
    return RemotePicture(name, rules.hosts)


def similar_file(path: Path) -> str:
    """A hint if a missing file exists with another spelling of its name, else empty."""
    other = [
        path.with_name(unicodedata.normalize("NFC", path.name)),
        path.with_name(unicodedata.normalize("NFD", path.name)),
    ]
    other += [path.with_suffix(suffix) for suffix in (".jpg", ".JPG", ".jpeg", ".png", ".PNG", ".gif", ".webp")]
    for candidate in other:
        if candidate != path and candidate.is_file():
            return f" There is {candidate.name!a}."
    return ""
