"""Checkpoints on disk: which there are, whether they are whole, which may go.

A folder without a valid manifest, which holds a sha256 of every file, does not count, whatever it is called. `latest`
is a hint for people; the newest folder with a valid manifest is the truth. `commit_checkpoint` writes them.
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
    """A checkpoint is not damaged, but another version of mm_moslora wrote it."""


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
        OtherFormatError: another version wrote it.
        CheckpointError: no manifest, or a file that is missing, cut or altered.
    """
    manifest = _parse(folder / MANIFEST)
    for name, expected in manifest.files.items():
        _check_file(folder / name, expected, verify=verify)
    return manifest


def _parse(path: Path) -> Manifest:
    """A manifest, without a look at the files it names."""
    try:
        data = files.read_json(path)
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{path.parent} has no {MANIFEST}, so it is no complete checkpoint. Choose another checkpoint folder."
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
            f"{path} has {size} bytes, the manifest says {expected['bytes']}. It was cut or replaced; "
            "choose an earlier checkpoint."
        )
    if verify and files.sha256_of(path) != expected["sha256"]:
        raise CheckpointError(
            f"{path} was altered: its sha256 differs from the manifest. Choose an earlier checkpoint."
        )


def refuse_resume(run: Path, resume: str) -> None:
    """Refuse `--resume` where what is in the run folder contradicts it.

    Args:
        run: the run folder.
        resume: `auto`, `required`, `never`, or a checkpoint folder.

    Raises:
        CheckpointError: `required` without a checkpoint, `never` with one, or no such folder.
    """
    resume_folder(resume)
    if resume == "never" and checkpoints(run):
        raise CheckpointError(
            f"{run} already holds checkpoints and resume is never. Choose another train.output, or resume: auto."
        )
    if resume == "required" and not any(run.glob("checkpoint-*")):  # one that is damaged is told by `newest_valid`
        raise CheckpointError(f"{run} holds no checkpoint, but resume is required. Check train.output.")


def newest_valid(run: Path) -> tuple[Path, Manifest] | None:
    """The newest checkpoint of a run whose files are all as written.

    Damaged ones that are newer are renamed to `*.corrupt`, named in the log and passed over.

    Returns:
        Folder and manifest, or None when the run has no checkpoint and never lost one.

    Raises:
        OtherFormatError: another version of mm_moslora wrote the newest that is not damaged; nothing is renamed.
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
            logger.warning("Passed over a damaged checkpoint, now %s: %s", aside.name, reason)
        return folder, manifest
    if damaged:
        raise CheckpointError(
            f"All {len(damaged)} checkpoints in {run} are damaged; the newest: {damaged[0][1]} Restore one of them, or "
            "start again in another folder (train.output)."
        )
    if names := sorted(path.name for path in run.glob("checkpoint-*")):
        raise CheckpointError(
            f"{run} holds no checkpoint to go on from, but {', '.join(names[:5])}, which was damaged, put aside or "
            "made by another program. Restore it under its own name, choose another train.output, or start from step 0 "
            "beside it with --resume never."
        )
    return None


def set_aside_newer(run: Path, step: int) -> None:
    """Rename the checkpoints of a run that are newer than the step it goes on from to `*.superseded`.

    Left there, the next start would go on from the newest of them, and the first to be deleted would be this stretch's.
    """
    for number, folder in checkpoints(run):
        if number > step:
            aside = files.set_aside(folder, "superseded")
            logger.warning("%s is newer than step %d, which the run goes on from; now %s.", folder, step, aside.name)


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

    A folder stays, with a warning, where it holds files that the checkpoint was not written with, or is no checkpoint
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
    """Why an old checkpoint must not be deleted; None where it may."""
    present = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()}
    if not present:  # what a loss of power left of a deletion
        return None
    try:
        manifest = _parse(folder / MANIFEST)
    except CheckpointError as error:
        return str(error)
    strangers = sorted(present - {MANIFEST, files.MARK, *manifest.files})
    return f"it holds files that are not of the checkpoint ({', '.join(strangers[:3])})" if strangers else None


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
