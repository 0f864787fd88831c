"""The few things that a checkpoint does to the disk, each with the guarantee that the commit protocol stands on."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any


def sync(path: Path) -> None:
    """Make a file's content, or the names in a folder, survive a loss of power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def rename(path: Path, target: Path) -> None:
    """Give a file or folder another name in one move; whether that survives a loss of power, `sync` decides."""
    path.rename(target)


def replace_text(path: Path, text: str) -> None:
    """Replace a text file so that a reader sees the old or the new one, never a half."""
    temporary = path.with_name(f".{path.name}.{os.urandom(6).hex()}.tmp")  # process ids repeat from host to host
    with temporary.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(path)


def replace_json(path: Path, data: Any) -> None:
    """Replace a JSON file; see `replace_text`."""
    replace_text(path, json.dumps(data, indent=1, sort_keys=False, default=str))


def remove(folder: Path) -> None:
    """Remove a folder and what is in it; one that is not there is fine."""
    shutil.rmtree(folder, ignore_errors=True)


def free_bytes(folder: Path) -> int:
    """Bytes that may still be written in the file system of a folder."""
    return shutil.disk_usage(folder).free


def sha256_of(path: Path) -> str:
    """Hex digest of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
