"""Identity of a Hugging Face data set in a folder: its checksum."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from mm_moslora.utils.files import sha256_of
from mm_moslora.utils.untrusted_files import opened

_DERIVED = "cache-"
"""Prefix of the cache files that `datasets` writes into the folder of the data."""


def folder_checksum(folder: Path) -> str:
    """SHA-256 over the names and contents of a folder's files; equal for a copy in another place."""
    whole = hashlib.sha256()
    for directory, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            path = Path(directory, name)
            if name.startswith((".", _DERIVED)) or not path.is_file():
                continue
            with opened(path, most=None) as stream:
                content = sha256_of(stream)
            whole.update(f"{path.relative_to(folder).as_posix()}\0{content}\n".encode("utf-8", "surrogateescape"))
    return whole.hexdigest()
