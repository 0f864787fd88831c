"""Checkpoints on disk: which there are, whether they are whole, which may go.

A folder without a valid manifest, which holds a sha256 of every file, does not count, whatever it is called. `latest`
is a hint for people; the newest folder with a valid manifest is the truth. `mm_moslora.training.commit` writes them.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from mm_moslora import __version__
from mm_moslora.errors import CheckpointError
from mm_moslora.folders import MANIFEST, checkpoints
from mm_moslora.training import disk

logger = logging.getLogger(__name__)

FORMAT = 2
"""Version of the manifest."""


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
    data: str = ""
    """Fingerprint of the training set, on which the place in the data depends."""
    precision: str = ""
    """What `train.precision` was on that machine; empty in checkpoints that are older than this."""

    def to_json(self) -> dict[str, Any]:
        """Plain data for the file."""
        content = json.loads(json.dumps({"format": FORMAT, "version": __version__} | vars(self), default=str))
        return content | {"checksum": _checksum(content)}


def _checksum(content: Mapping[str, Any]) -> str:
    rest = {key: value for key, value in content.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def folder_name(step: int) -> str:
    """Name of the checkpoint of an optimiser step."""
    return f"checkpoint-{step:06d}"


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
        damage = None if isinstance(data, dict) and "format" in data else "it is no manifest"
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{folder} has no {MANIFEST}, so it is no complete checkpoint. Choose another checkpoint folder."
        ) from error
    except ValueError as error:
        damage = str(error)
    if damage is not None:
        raise CheckpointError(f"{path} is damaged ({damage}). Choose an earlier checkpoint.")
    if data["format"] != FORMAT:
        raise CheckpointError(
            f"{path} has format {data.get('format')!r}, this version reads {FORMAT}. "
            f"It was written by mm_moslora {data.get('version')}; use that version."
        )
    if data.get("checksum") != _checksum(data):
        raise CheckpointError(f"{path} was altered: its checksum differs. Choose an earlier checkpoint.")
    manifest = Manifest(**{key: data[key] for key in Manifest.__dataclass_fields__ if key in data})
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
    if verify and disk.sha256_of(path) != expected["sha256"]:
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
            aside = unused(folder.with_name(f"{folder.name}.corrupt"))
            disk.rename(folder, aside)
            logger.warning("Passed over a damaged checkpoint, now %s: %s", aside.name, error)
    if found:
        raise CheckpointError(
            f"All {len(found)} checkpoints in {run} are damaged (renamed *.corrupt). Start again in another folder."
        )
    return None


def set_aside_newer(run: Path, step: int) -> None:
    """Rename the checkpoints of a run that are newer than the step it goes on from to `*.superseded`.

    Left there, the next start would go on from the newest of them, and the first to be deleted would be this stretch's.
    """
    for number, folder in checkpoints(run):
        if number > step:
            aside = unused(folder.with_name(f"{folder.name}.superseded"))
            disk.rename(folder, aside)
            logger.warning("%s is newer than step %d, which the run goes on from; now %s.", folder, step, aside.name)


def unused(path: Path) -> Path:
    """The path, with a number behind it where something has that name already."""
    number = 0
    while (candidate := path.with_name(f"{path.name}{number or ''}")).exists():
        number += 1
    return candidate


@dataclass(frozen=True, kw_only=True)
class Retention:
    """Which checkpoints to keep."""

    last: int = 2
    """The newest ones; 0 keeps all."""
    every: int = 0
    """Also those whose step is a multiple of this; 0: none."""
    best: str | None = None
    """Also this one, by name."""

    def superfluous(self, found: Sequence[tuple[int, Path]]) -> list[Path]:
        """Those that may go, of all there are, oldest first."""
        if self.last < 1:
            return []
        return [
            folder
            for step, folder in found[: -self.last]
            if not (self.every and step % self.every == 0) and folder.name != self.best
        ]


def remove_old(run: Path, retention: Retention) -> None:
    """Delete what need not be kept, oldest first, once the newest checkpoint has been read back and is whole.

    Raises:
        CheckpointError: the newest is damaged; nothing was deleted.
    """
    found = checkpoints(run)
    superfluous = retention.superfluous(found)
    if superfluous:
        read_manifest(found[-1][1])
    for folder in superfluous:
        trash = folder.with_name(f".trash-{folder.name}")
        disk.remove(trash)
        disk.rename(folder, trash)
        disk.remove(trash)


# Keys of a recipe that may differ between a run and its continuation without changing what is computed.
_FREE_KEYS = (
    "name", "track", "validate", "data.validation", "data.workers",
    "data.train.*.path", "data.train.*.image_folder", "data.cache",  # the manifest knows the data by a fingerprint
    *(f"train.{key}" for key in (
        "output", "save_every", "keep_last", "keep_every", "validate_every", "log_every", "timeout_minutes",
        "step_timeout_minutes", "rehearsal", "background_save",
    )),
)  # fmt: skip
# Keys that change the order of summation only: a continuation gives the same numbers to rounding.
_ROUNDING_KEYS = (
    "train.zero",
    "train.micro_batch",
    "train.gradient_checkpointing",
    "train.compile",
    "model.attention",
    "model.lean_layers",
    "model.kernels",
    "model.vision.feature_cache",
    "model.vision.feature_cache_gib",
)


@dataclass(frozen=True, kw_only=True)
class Changes:
    """How a recipe differs from the one that a checkpoint was written with, as `key: old -> new`."""

    other_run: tuple[str, ...]
    """Keys that change what is computed."""
    rounding: tuple[str, ...]
    """Keys that change the order of summation only."""


def changed_keys(before: Mapping[str, Any], after: Mapping[str, Any], *, moved: Sequence[str] = ()) -> Changes:
    """Compare two resolved recipes.

    Args:
        before: of the checkpoint.
        after: of now.
        moved: keys of paths that lead to the same contents.
    """
    old, new = _flatten(before), _flatten(after)
    changed = {
        key: f"{key}: {old.get(key)!r} -> {new.get(key)!r}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and not _is_below(key, (*_FREE_KEYS, *moved))
    }
    return Changes(
        other_run=tuple(text for key, text in changed.items() if not _is_below(key, _ROUNDING_KEYS)),
        rounding=tuple(text for key, text in changed.items() if _is_below(key, _ROUNDING_KEYS)),
    )


def _is_below(key: str, prefixes: Sequence[str]) -> bool:
    return any(fnmatchcase(key, prefix) or key.startswith(f"{prefix}.") for prefix in prefixes)


def _flatten(data: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(data, Mapping) and data:
        items: Any = data.items()
    elif isinstance(data, list) and data:
        items = enumerate(data)
    else:
        return {prefix.rstrip("."): data}
    return {key: value for name, item in items for key, value in _flatten(item, f"{prefix}{name}.").items()}
