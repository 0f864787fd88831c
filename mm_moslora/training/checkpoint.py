"""Checkpoints: complete, atomic, verified.

All ranks write into a temporary folder; success is agreed on; rank 0 writes the manifest with a sha256 of every file,
syncs, and renames the folder into place. A folder without a valid manifest does not count, whatever it is called.
`latest` is a hint for people; the newest folder with a valid manifest is the truth.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mm_moslora import __version__, distributed
from mm_moslora.errors import CheckpointError

logger = logging.getLogger(__name__)

FORMAT = 1
"""Version of the manifest."""
MANIFEST = "manifest.json"
_NAME = re.compile(r"checkpoint-(\d{6,})$")


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a checkpoint says of itself."""

    step: int
    """Optimiser steps done."""
    world_size: int
    """Ranks that wrote the trainer state."""
    recipe: dict[str, Any]
    """The resolved recipe."""
    base: dict[str, Any]
    """Ids and revisions of the base model's parts."""
    counters: dict[str, float]
    """Samples, tokens, skipped steps, seconds, ... so far."""
    trainable: dict[str, list[int]]
    """Names and shapes of all trained parameters."""
    files: dict[str, dict[str, Any]]
    """Relative path to {bytes, sha256}."""

    def to_json(self) -> dict[str, Any]:
        """Plain data for the file."""
        return {"format": FORMAT, "version": __version__} | vars(self)


def folder_name(step: int) -> str:
    """Name of the checkpoint of an optimiser step."""
    return f"checkpoint-{step:06d}"


def sha256_of(path: Path) -> str:
    """Hex digest of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def checkpoints(run: Path) -> list[tuple[int, Path]]:
    """Committed checkpoints of a run as (step, folder), oldest first. Nothing is verified."""
    found = [(int(match[1]), path) for path in run.glob("checkpoint-*") if (match := _NAME.match(path.name))]
    return sorted(found)


def commit(
    run: Path,
    step: int,
    *,
    write: Callable[[Path], None],
    describe: Callable[[dict[str, dict[str, Any]]], Manifest],
) -> Path:
    """Write one checkpoint, atomically.

    Args:
        run: the run folder, shared by all ranks.
        step: optimiser steps done.
        write: called on every rank with the temporary folder; each rank writes its own files.
        describe: called on rank 0 with the files' sizes and hashes; gives the manifest.

    Raises:
        CheckpointError: this rank could not write; nothing was committed and the previous checkpoint is untouched.
        DistributedError: another rank could not write.
    """
    final, temporary = run / folder_name(step), run / f".tmp-{folder_name(step)}"
    failure: Exception | None = None
    if distributed.is_main():
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    distributed.barrier()
    try:
        write(temporary)
    except (OSError, RuntimeError, ValueError) as error:
        failure = CheckpointError(
            f"The checkpoint of step {step} could not be written to {temporary} ({error}). Free bytes there: "
            f"{_free_bytes(run)}. Earlier checkpoints are untouched."
        )
    try:
        distributed.agree(failure, what=f"Writing the checkpoint of step {step}")
        if distributed.is_main():
            _seal(temporary, final, describe)
    except Exception:
        if distributed.is_main():
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    distributed.barrier()
    return final


def _free_bytes(folder: Path) -> int:
    return shutil.disk_usage(folder).free


def _seal(temporary: Path, final: Path, describe: Callable[[dict[str, dict[str, Any]]], Manifest]) -> None:
    files = {}
    for path in sorted(item for item in temporary.rglob("*") if item.is_file()):
        _sync(path)
        files[path.relative_to(temporary).as_posix()] = {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
    write_json(temporary / MANIFEST, describe(files).to_json())
    _sync(temporary)
    if final.exists():
        shutil.rmtree(final)
    temporary.rename(final)
    _sync(final.parent)
    write_text(final.parent / "latest", final.name)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Replace a text file so that a reader sees the old or the new one, never a half."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(path)


def write_json(path: Path, data: Any) -> None:
    """Replace a JSON file; see `write_text`."""
    write_text(path, json.dumps(data, indent=1, sort_keys=False, default=str))


def read_manifest(folder: Path, *, verify: bool = True) -> Manifest:
    """Read a checkpoint's manifest and check its files against it.

    Args:
        folder: a checkpoint folder.
        verify: hash every file; False compares sizes only.

    Raises:
        CheckpointError: no manifest, another format, or a file that is missing, cut or altered.
    """
    path = folder / MANIFEST
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{folder} has no {MANIFEST}, so it is no complete checkpoint. Choose another checkpoint folder."
        ) from error
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged ({error}). Choose an earlier checkpoint.") from error
    if data.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} has format {data.get('format')!r}, this version reads {FORMAT}. "
            f"It was written by mm_moslora {data.get('version')}; use that version."
        )
    manifest = Manifest(**{key: data[key] for key in Manifest.__dataclass_fields__})
    for name, expected in manifest.files.items():
        _check_file(folder / name, expected, verify=verify)
    return manifest


def _check_file(path: Path, expected: Mapping[str, Any], *, verify: bool) -> None:
    if not path.is_file():
        raise CheckpointError(f"{path} is missing from its checkpoint. Choose an earlier checkpoint.")
    size = path.stat().st_size
    if size != expected["bytes"]:
        raise CheckpointError(
            f"{path} has {size} bytes, the manifest says {expected['bytes']}. It was cut or replaced; "
            "choose an earlier checkpoint."
        )
    if verify and sha256_of(path) != expected["sha256"]:
        raise CheckpointError(
            f"{path} was altered: its sha256 differs from the manifest. Choose an earlier checkpoint."
        )


def newest_valid(run: Path) -> tuple[Path, Manifest] | None:
    """The newest checkpoint of a run whose files are all as written.

    Damaged ones are renamed to `*.corrupt`, named in the log and passed over.

    Returns:
        Folder and manifest, or None when the run has no checkpoint at all.

    Raises:
        CheckpointError: there are checkpoints, but none is valid.
    """
    found = checkpoints(run)
    for _, folder in reversed(found):
        try:
            return folder, read_manifest(folder)
        except CheckpointError as error:
            aside = folder.with_name(f"{folder.name}.corrupt")
            folder.rename(aside)
            logger.warning("Passed over a damaged checkpoint, now %s: %s", aside.name, error)
    if found:
        raise CheckpointError(
            f"All {len(found)} checkpoints in {run} are damaged (renamed *.corrupt). Start again in another folder."
        )
    return None


def remove_old(run: Path, *, keep_last: int) -> None:
    """Delete all but the newest checkpoints, after verifying that the newest is whole.

    Args:
        run: the run folder.
        keep_last: how many to keep; 0 keeps all.
    """
    found = checkpoints(run)
    if keep_last < 1 or len(found) <= keep_last:
        return
    read_manifest(found[-1][1], verify=False)
    for _, folder in found[:-keep_last]:
        trash = folder.with_name(f".trash-{folder.name}")
        folder.rename(trash)
        shutil.rmtree(trash, ignore_errors=True)


# Keys of a recipe that may differ between a run and its continuation without changing what is computed.
_FREE_KEYS = ("name", "track", "train.output", "train.save_every", "train.keep_last", "train.validate_every",
              "train.log_every", "train.timeout_minutes", "data.workers",
              "data.validation")  # fmt: skip


def changed_keys(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Dotted recipe keys that differ and change what is computed, as `key: old -> new`."""
    old, new = _flatten(before), _flatten(after)
    return [
        f"{key}: {old.get(key)!r} -> {new.get(key)!r}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and not any(key == free or key.startswith(f"{free}.") for free in _FREE_KEYS)
    ]


def _flatten(data: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(data, Mapping) and data:
        items: Any = data.items()
    elif isinstance(data, list) and data:
        items = enumerate(data)
    else:
        return {prefix.rstrip("."): data}
    return {key: value for name, item in items for key, value in _flatten(item, f"{prefix}{name}.").items()}
