"""Identity of a Hugging Face data set: the checksum of a folder, or the commit of a data set from the hub."""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path
from typing import Any

from mm_moslora.utils.files import sha256_of
from mm_moslora.utils.untrusted_files import opened

_COMMIT = re.compile(r"[0-9a-f]{40}")
_DERIVED = "cache-"
"""Prefix of the cache files that `datasets` writes into the folder of the data."""


def folder_checksum(folder: Path) -> str:
    """SHA-256 over the names and contents of a folder's files; equal for a copy in another place."""
    whole = hashlib.sha256()
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            path = Path(place, name)
            if name.startswith((".", _DERIVED)) or not path.is_file():
                continue
            with opened(path, most=None) as stream:
                content = sha256_of(stream)
            whole.update(f"{path.relative_to(folder).as_posix()}\0{content}\n".encode("utf-8", "surrogateescape"))
    return whole.hexdigest()


def hub_revision(table: Any) -> str | None:
    """The commit at which a data set from the hub was read; None for local data or if `datasets` does not record it."""
    named = [str(name) for name in (getattr(table.info, "download_checksums", None) or {})]
    found = [match for name in named if name.startswith("hf://") and (match := re.search(r"@([0-9a-f]{40})/", name))]
    if found:
        return found[0][1]
    for file in table.cache_files:  # datasets/OWNER___NAME/CONFIG/VERSION/COMMIT/...
        folder = Path(file["filename"]).parent.name
        if _COMMIT.fullmatch(folder):
            return folder
    return None
