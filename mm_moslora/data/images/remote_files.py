"""Remote files that data name: pictures by URL, and files of a data set on the hub.

A picture is fetched once, from hosts that the recipe allows, and cached on this machine if it can be decoded.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from PIL import Image

from mm_moslora.data.images.record_picture import (
    DATA_URL,
    MAX_BYTES,
    ImageError,
    PictureRules,
    check_image_bytes,
    content_of,
    open_image_bytes,
    read_picture,
)
from mm_moslora.data.record_faults import Code, Where
from mm_moslora.utils.errors import DataError
from mm_moslora.utils.files import replacing
from mm_moslora.utils.identity import sha256_of_text
from mm_moslora.utils.network.http_fetch import FetchError, FetchFault, fetch
from mm_moslora.utils.run_paths import cache_folder
from mm_moslora.utils.untrusted_files import BAD_CHARACTER, SCHEME

SECONDS = 120.0
"""Seconds for a whole fetch, redirects included."""


@dataclass(frozen=True)
class RemotePicture:
    """A picture on another machine."""

    name: str
    """The URL."""
    hosts: tuple[str, ...] = field(compare=False)
    """Allowed hosts of the URL and its redirects."""

    @property
    def path(self) -> Path:
        """File of its cached bytes."""
        return cache_folder("pictures") / sha256_of_text(self.name)

    @property
    def fetched(self) -> bool:
        """Whether its bytes are cached."""
        return self.path.is_file()

    def rgb(self) -> Image.Image:
        """See `Picture`."""
        return open_image_bytes(self.read(), name=self.name)

    def size(self) -> tuple[int, int] | None:
        """See `Picture`."""
        return check_image_bytes(self.read(), name=self.name) if self.fetched else None

    def read(self) -> bytes:
        """The bytes of the picture file, fetched if need be; nothing is cached that is no picture."""
        if self.fetched:
            return read_picture(self.path)
        data = self._fetch()
        open_image_bytes(data, name=self.name)  # a broken picture must not be cached
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(self.path) as part:
            part.write_bytes(data)
        return data

    def _fetch(self) -> bytes:
        try:
            return fetch(self.name, hosts=self.hosts, most=MAX_BYTES, seconds=SECONDS)
        except FetchError as error:
            if error.fault == FetchFault.TOO_LARGE:
                remedy = f"stay below {MAX_BYTES} bytes"
                raise ImageError(Code.IMAGE_TOO_LARGE, self.name, "sends too much", remedy) from error
            what = f"{error.what}{f' ({error.detail})' if error.detail else ''}"
            if error.fault == FetchFault.NOT_ALLOWED:
                what = f"redirects to {error.detail}, which image_hosts does not allow"
            remedy = "check the URL and the network, or download the pictures first"
            raise ImageError(Code.IMAGE_MISSING, self.name, what, remedy) from error


def find_remote(value: Any, index: int, where: Where, rules: PictureRules) -> RemotePicture | None:
    """The picture that a record of a source with hosts names by a URL; None for any other name."""
    name = content_of(value)
    plain = not isinstance(name, str) or not SCHEME.match(name) or DATA_URL.match(name) or BAD_CHARACTER.search(name)
    if plain:
        return None
    try:
        parts = urlsplit(name)
        allowed = parts.scheme in ("http", "https") and parts.hostname in rules.hosts and parts.username is None
    except ValueError:
        allowed = False
    if not allowed:
        remedy = f"use http or https and one of the hosts in image_hosts ({', '.join(rules.hosts)})"
        what = f"{ascii(name)[:100]} may not be fetched"
        raise where.error(Code.BAD_IMAGE_NAME, f"image[{index}]", what, remedy, path=name)
    return RemotePicture(name, rules.hosts)


def is_of_set(path: str, dataset: str) -> bool:
    """Whether a path names a file of a data set on the hub, by a single protocol without chaining."""
    return path.startswith(f"hf://datasets/{dataset}@") and "::" not in path and ".." not in path.split("/")


def read_hub_file(path: str, dataset: str) -> bytes:
    """A file of the hub (`hf://datasets/NAME@REVISION/...`), through its client; of no other data set than NAME."""
    from huggingface_hub import HfFileSystem
    from huggingface_hub.errors import HfHubHTTPError

    if not is_of_set(path, dataset):
        raise DataError(f"{ascii(path)[:200]} is not a file of {dataset}. Name one of its own files.")
    try:
        with HfFileSystem().open(path, "rb") as stream:
            data = bytes(stream.read(MAX_BYTES + 1))
    except (OSError, ValueError, HfHubHTTPError) as error:
        raise DataError(f"{path} cannot be fetched ({type(error).__name__}: {str(error)[:200]}).") from error
    if len(data) > MAX_BYTES:
        raise DataError(f"{path} takes more than {MAX_BYTES} bytes. Leave it out.")
    return data
