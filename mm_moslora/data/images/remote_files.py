"""Files of other machines that data name: pictures behind a URL, and files of a hub's data set.

A picture is fetched once, from hosts that the recipe names, and kept on this machine once it has been decoded.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path

from mm_moslora.data.images.decode_image import MAX_BYTES, ImageError, open_image_bytes, read_picture
from mm_moslora.data.record_faults import Code
from mm_moslora.utils.errors import DataError
from mm_moslora.utils.files import replacing
from mm_moslora.utils.http_fetch import FetchError, FetchFault, Rules, fetch
from mm_moslora.utils.run_paths import cache_folder

SECONDS = 120.0
"""For a whole fetch, redirects included."""


@dataclass(frozen=True)
class RemotePicture:
    """A picture on another machine."""

    name: str
    """The URL."""
    hosts: tuple[str, ...] = field(compare=False)
    """Hosts that it, and what it redirects to, may lie on."""

    @property
    def path(self) -> Path:
        """Where its bytes are kept."""
        return cache_folder("pictures") / hashlib.sha256(self.name.encode("utf-8")).hexdigest()

    @property
    def fetched(self) -> bool:
        """Whether they are there."""
        return self.path.is_file()

    def read(self) -> bytes:
        """The bytes of the picture file, fetched if need be.

        Raises:
            ImageError: the host does not answer in time, redirects elsewhere, breaks off, or sends too much or no
                picture; nothing is kept then.
        """
        if self.fetched:
            return read_picture(self.path)
        data = self._fetch()
        open_image_bytes(data, name=self.name)  # a broken one would be kept for ever
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(self.path) as part:
            part.write_bytes(data)
        return data

    def _fetch(self) -> bytes:
        try:
            return fetch(self.name, Rules(hosts=self.hosts, most=MAX_BYTES, seconds=SECONDS))
        except FetchError as error:
            if error.fault == FetchFault.TOO_LARGE:
                remedy = f"stay below {MAX_BYTES} bytes"
                raise ImageError(Code.IMAGE_TOO_LARGE, self.name, "sends too much", remedy) from error
            what = f"{error.what}{f' ({error.detail})' if error.detail else ''}"
            if error.fault == FetchFault.NOT_ALLOWED:
                what = f"redirects to {error.detail}, which image_hosts does not allow"
            remedy = "check the URL and the network, or download the pictures first"
            raise ImageError(Code.IMAGE_MISSING, self.name, what, remedy) from error


def is_of_set(path: str, dataset: str) -> bool:
    """Whether a path is that of a file of a data set on the hub, by one protocol and no chain of them."""
    return path.startswith(f"hf://datasets/{dataset}@") and "::" not in path and ".." not in path.split("/")


def read_hub_file(path: str, dataset: str) -> bytes:
    """A file of a data set on the hub, through the hub's client alone.

    Args:
        path: `hf://datasets/NAME@REVISION/...`.
        dataset: NAME; files of others are not read.

    Raises:
        DataError: the file is another's, too large, or cannot be fetched.
    """
    from huggingface_hub import HfFileSystem
    from huggingface_hub.errors import HfHubHTTPError

    if not is_of_set(path, dataset):
        raise DataError(f"{ascii(path)[:200]} is no file of {dataset}. Name one of its own files.")
    try:
        with HfFileSystem().open(path, "rb") as stream:
            data = bytes(stream.read(MAX_BYTES + 1))
    except (OSError, ValueError, HfHubHTTPError) as error:
        raise DataError(f"{path} cannot be fetched ({type(error).__name__}: {str(error)[:200]}).") from error
    if len(data) > MAX_BYTES:
        raise DataError(f"{path} takes more than {MAX_BYTES} bytes. Leave it out.")
    return data
