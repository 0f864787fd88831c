"""Checkpoints on disk: listing, verification, retention.

A checkpoint is a folder with a valid manifest, which holds a sha256 of every file; the folder's name does not decide.
`latest` is a hint for people; resuming takes the newest valid folder. `commit_checkpoint` writes checkpoints.
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
from mm_moslora.utils import files
from mm_moslora.utils.errors import CheckpointError
from mm_moslora.utils.run_paths import MANIFEST, checkpoints, resume_folder

logger = logging.getLogger(__name__)

FORMAT = 2
"""Version of the manifest."""


class OtherFormatError(CheckpointError):
    """The checkpoint is intact, but another version of mm_moslora wrote it."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Metadata of a checkpoint."""

    step: int
    """Optimiser steps done."""
    world_size: int
    """Number of ranks that wrote the trainer state."""
    recipe: dict[str, Any]
    """The resolved recipe."""
    base: dict[str, Any]
    """Ids and revisions of the base model's parts."""
    counters: dict[str, float]
    """Cumulative samples, tokens, skipped steps, seconds, ..."""
    trainable: dict[str, list[int]]
    """Names and shapes of all trained parameters."""
    files: dict[str, dict[str, Any]]
    """Relative path to {bytes, sha256}."""
    data: str = ""
    """Fingerprint of the training set; the data cursor is valid for this set only."""
    precision: str = ""
    """Resolved `train.precision` of that machine; empty in checkpoints of older versions."""

    def to_json(self) -> dict[str, Any]:
        """Plain data for `manifest.json`."""
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
        OtherFormatError: another version wrote it.
        CheckpointError: there is no manifest, or a file is missing, truncated or altered.
    """
    manifest = _parse(folder / MANIFEST)
    for name, expected in manifest.files.items():
        _check_file(folder / name, expected, verify=verify)
    return manifest


def _parse(path: Path) -> Manifest:
    """Read a manifest without checking its files."""
    try:
        data = files.read_json(path)
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{path.parent} has no {MANIFEST}, so it is not a complete checkpoint. Choose another checkpoint folder."
        ) from error
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged ({error}). Choose an earlier checkpoint.") from error
    found = data.get("format")
    if isinstance(found, int) and found != FORMAT:
        raise OtherFormatError(
            f"{path} has format {found}, this version reads {FORMAT}. It was written by mm_moslora "
            f"{data.get('version')}; use that version, or choose another train.output."
        )
    if found != FORMAT or data.get("checksum") != _checksum(data):
        raise CheckpointError(f"{path} was altered: its checksum differs. Choose an earlier checkpoint.")
    return Manifest(**{key: data[key] for key in Manifest.__dataclass_fields__ if key in data})


def _check_file(path: Path, expected: Mapping[str, Any], *, verify: bool) -> None:
    if not path.is_file():
        raise CheckpointError(f"{path} is missing from its checkpoint. Choose an earlier checkpoint.")
    size = path.stat().st_size
    if size != expected["bytes"]:
        raise CheckpointError(
            f"{path} has {size} bytes, the manifest expects {expected['bytes']}. It was truncated or replaced; "
            "choose an earlier checkpoint."
        )
    if verify and files.sha256_of(path) != expected["sha256"]:
        raise CheckpointError(
            f"{path} was altered: its sha256 differs from the manifest. Choose an earlier checkpoint."
        )


def refuse_resume(run: Path, resume: str) -> None:
    """Refuse a value of `--resume` that contradicts the contents of the run folder.

    Args:
        run: the run folder.
        resume: `auto`, `required`, `never`, or a checkpoint folder.

    Raises:
        CheckpointError: `required` without a checkpoint, `never` with one, or a folder that does not exist.
    """
    resume_folder(resume)
    if resume == "never" and checkpoints(run):
        raise CheckpointError(
            f"{run} already holds checkpoints, but resume is never. Choose another train.output, or resume: auto."
        )
    if resume == "required" and not any(run.glob("checkpoint-*")):  # `newest_valid` reports damaged checkpoints
        raise CheckpointError(f"{run} holds no checkpoint, but resume is required. Check train.output.")


def newest_valid(run: Path) -> tuple[Path, Manifest] | None:
    """The newest valid checkpoint of a run.

    Newer checkpoints that are damaged are renamed to `*.corrupt`, logged and skipped.

    Returns:
        Folder and manifest, or None where the run has no checkpoint and none was put aside.

    Raises:
        OtherFormatError: another version of mm_moslora wrote the newest intact checkpoint; nothing is renamed.
        CheckpointError: there are checkpoints, or some that were put aside, but none is valid; nothing is renamed.
    """
    damaged: list[tuple[Path, CheckpointError]] = []
    for _, folder in reversed(checkpoints(run)):
        try:
            manifest = read_manifest(folder)
        except OtherFormatError:
            raise
        except CheckpointError as error:
            damaged.append((folder, error))
            continue
        for other, reason in damaged:
            aside = files.set_aside(other, "corrupt")
            logger.warning("Skipped a damaged checkpoint, now %s: %s", aside.name, reason)
        return folder, manifest
    if damaged:
        raise CheckpointError(
            f"All {len(damaged)} checkpoints in {run} are damaged; the newest: {damaged[0][1]} Restore one of them, or "
            "start again in another folder (train.output)."
        )
    if names := sorted(path.name for path in run.glob("checkpoint-*")):
        raise CheckpointError(
            f"{run} holds no checkpoint to resume from, but {', '.join(names[:5])}, which was damaged, put aside or "
            "made by another program. Restore it under its own name, choose another train.output, or start from step 0 "
            "beside it with --resume never."
        )
    return None


def set_aside_newer(run: Path, step: int) -> None:
    """Rename the checkpoints of a run that are newer than the step it resumes from to `*.superseded`.

    Otherwise the next start would resume from the newest of them, and retention would delete the new checkpoints first.
    """
    for number, folder in checkpoints(run):
        if number > step:
            aside = files.set_aside(folder, "superseded")
            logger.warning("%s is newer than step %d, from which the run resumes; now %s.", folder, step, aside.name)


@dataclass(frozen=True, kw_only=True)
class Retention:
    """The retention policy."""

    last: int = 2
    """Number of newest checkpoints to keep; 0 keeps all."""
    every: int = 0
    """Also keep steps that are a multiple of this; 0: none."""
    best: str | None = None
    """Also keep the checkpoint of this name."""

    def superfluous(self, found: Sequence[tuple[int, Path]]) -> list[Path]:
        """The checkpoints that may be deleted, oldest first."""
        if self.last < 1:
            return []
        return [
            folder
            for step, folder in found[: -self.last]
            if not (self.every and step % self.every == 0) and folder.name != self.best
        ]


def remove_old(run: Path, retention: Retention) -> None:
    """Delete checkpoints outside the retention policy, oldest first, after the newest checkpoint has been verified.

    A folder is kept, with a warning, where it holds files that are not in its manifest, or is not a checkpoint that
    that this version can read.

    Raises:
        CheckpointError: the newest is damaged; nothing was deleted.
    """
    found = checkpoints(run)
    superfluous = retention.superfluous(found)
    if superfluous:
        read_manifest(found[-1][1])
    for folder in superfluous:
        if reason := _why_kept(folder):
            logger.warning("%s would be deleted by train.keep_last, but %s; it is kept.", folder, reason)
            continue
        trash = folder.with_name(f".trash-{folder.name}")
        files.remove(trash, mark=MANIFEST)
        files.rename(folder, trash)
        files.remove(trash, mark=MANIFEST)


def _why_kept(folder: Path) -> str | None:
    """Why an old checkpoint must not be deleted; None where it may be."""
    present = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()}
    if not present:  # the rest of a deletion that a power loss interrupted
        return None
    try:
        manifest = _parse(folder / MANIFEST)
    except CheckpointError as error:
        return str(error)
    strangers = sorted(present - {MANIFEST, files.MARK, *manifest.files})
    return f"it holds files that are not in its manifest ({', '.join(strangers[:3])})" if strangers else None


# Recipe keys that may change on resume without changing the computation.
_FREE_KEYS = (
    "name", "track", "validate", "data.validation", "data.workers",
    "data.train.*.path", "data.train.*.image_folder", "data.cache",  # the manifest holds a fingerprint of the data
    *(f"train.{key}" for key in (
        "output", "save_every", "keep_last", "keep_every", "validate_every", "log_every", "timeout_minutes",
        "step_timeout_minutes", "rehearsal", "background_save",
    )),
)  # fmt: skip
# Keys that change the order of summation only: losses after a resume agree to rounding.
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
    """Differences between a recipe and the recipe of a checkpoint, as `key: old -> new`."""

    other_run: tuple[str, ...]
    """Keys that change the computation."""
    rounding: tuple[str, ...]
    """Keys that change the order of summation only."""


def changed_keys(before: Mapping[str, Any], after: Mapping[str, Any], *, moved: Sequence[str] = ()) -> Changes:
    """Compare two resolved recipes.

    Args:
        before: the checkpoint's.
        after: the current one.
        moved: path keys that lead to the same contents.
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
