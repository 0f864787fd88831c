"""A checkpoint folder: its manifest, how it is written, and how it is checked."""

# All ranks write into a temporary folder, agree, write the manifest, sync and rename once. The thread that writes never
# communicates with other ranks; all commit together at the end of a step. A folder with a valid manifest is a
# checkpoint, whatever its name.

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mm_moslora import __version__
from mm_moslora.utils import distributed, files, folder_marks
from mm_moslora.utils.errors import CheckpointError, ConfigError, MoSLoRAError
from mm_moslora.utils.identity import sha256_of, sha256_of_values
from mm_moslora.utils.run_paths import MANIFEST

logger = logging.getLogger(__name__)

FORMAT = 2
"""Version of the manifest."""
Files = dict[str, dict[str, Any]]
_MARGIN = 1.1  # files take more room than their tensors


class OtherFormatError(CheckpointError):
    """The checkpoint is intact, but another version of mm_moslora wrote it."""


def folder_name(step: int) -> str:
    """Name of the checkpoint of an optimiser step."""
    return f"checkpoint-{step:06d}"


def rank_folder(checkpoint: Path, rank: int | None = None) -> Path:
    """The folder of a rank's part of the trainer state."""
    return checkpoint / "trainer" / f"rank-{distributed.rank() if rank is None else rank:05d}"


@contextmanager
def reading_state(folder: Path) -> Iterator[None]:
    """Turn what libraries raise over a rank's part into one error: its bytes are sound, and their form is another."""
    try:
        yield
    except MoSLoRAError:
        raise
    except Exception as error:  # each library has its own
        found = ", ".join(sorted(path.name for path in folder.glob("*"))) or "nothing"
        raise CheckpointError(
            f"{folder} holds {found}, and not the trainer state that this version writes for this objective "
            f"({type(error).__name__}: {error}). Choose another checkpoint, or start another run from its weights "
            "(another train.output, with adapter.weights and model.projector.weights)."
        ) from error


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
    files: Files
    """Relative path to {bytes, sha256}."""
    data: str = ""
    """Fingerprint of the training set; the data cursor is valid for this set only."""
    place: dict[str, Any] = field(default_factory=dict)
    """Place of the run in a stream of training data, see `TrainingStream.place`; empty without a stream."""
    precision: str = ""
    """Resolved `train.precision` of that machine."""
    micro_tokens: int | None = None
    """Most tokens of a micro-batch on that machine (`train.micro_tokens` or its default); None: any number."""

    def to_json(self) -> dict[str, Any]:
        """Plain data for `manifest.json`."""
        content = json.loads(json.dumps({"format": FORMAT, "version": __version__} | vars(self), default=str))
        return content | {"checksum": _checksum(content)}


def _checksum(content: Mapping[str, Any]) -> str:
    rest = {key: value for key, value in content.items() if key != "checksum"}
    return sha256_of_values(rest, ascii_only=True)


class Saver:
    """Writes one checkpoint at a time; every rank calls `start`, `busy` as often as it likes, `finish` or `discard`."""

    def __init__(self, run: Path) -> None:
        self.run = run
        self.pending: Manifest | None = None
        """Manifest of the checkpoint being written; None when nothing is."""
        self._temporary = run
        self._thread: threading.Thread | None = None
        self._failure: str | None = None
        self.files: Files = {}
        """Size and hash of the files that this rank has written; of all ranks after `wait`."""

    def start(self, manifest: Manifest, write: Callable[[Path], None], *, size: int = 0) -> None:
        """Call `write` with the temporary folder in a thread: each rank writes its `rank_folder`, rank 0 the rest."""
        assert self.pending is None, "one at a time"
        self._temporary = self.run / f".tmp-{folder_name(manifest.step)}"
        (needed,) = distributed.sum_over_ranks([float(size)])
        problem = None
        if distributed.is_main():
            problem = self._prepare(needed * _MARGIN)
        problem = distributed.from_main(problem)
        if problem is not None:
            raise CheckpointError(f"The checkpoint of step {manifest.step} was not written: {problem}")
        self.pending, self._failure, self.files = manifest, None, {}
        self._thread = threading.Thread(target=self._work, args=(write,), name="checkpoint", daemon=True)
        self._thread.start()

    def _prepare(self, needed: float) -> str | None:
        try:
            for leftover in [*self.run.glob(".tmp-checkpoint-*"), *self.run.glob(".trash-checkpoint-*")]:
                # A complete one has a manifest in place of the mark.
                files.remove(leftover, mark=folder_marks.MARK if (leftover / folder_marks.MARK).exists() else MANIFEST)
            free = files.free_bytes(self.run)
            if free < needed:
                return (
                    f"{self.run} has {free / 2**20:,.0f} MiB free, {needed / 2**20:,.0f} MiB are needed, "
                    f"{(needed - free) / 2**20:,.0f} MiB are missing. Earlier checkpoints are untouched; make room, or "
                    "lower train.keep_last."
                )
            self._temporary.mkdir(parents=True)
            files.mark(self._temporary, "checkpoint")
        except (OSError, ConfigError) as error:
            return f"{error}. Earlier checkpoints are untouched."
        return None

    def _work(self, write: Callable[[Path], None]) -> None:
        try:
            rank_folder(self._temporary).mkdir(parents=True, exist_ok=True)
            write(self._temporary)
            for path in self._own_files():
                files.sync(path)
                name = path.relative_to(self._temporary).as_posix()
                self.files[name] = {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
        except Exception as error:  # reported by `finish`, on every rank
            self._failure = f"{type(error).__name__}: {error}"

    def _own_files(self) -> list[Path]:
        own = rank_folder(self._temporary)
        if not distributed.is_main():
            return sorted(path for path in own.rglob("*") if path.is_file())
        others = self._temporary / "trainer"
        mark = self._temporary / folder_marks.MARK
        return sorted(
            path
            for path in self._temporary.rglob("*")
            if path.is_file() and path != mark and (own in path.parents or others not in path.parents)
        )

    @property
    def busy(self) -> bool:
        """Whether this rank is still writing."""
        return self._thread is not None and self._thread.is_alive()

    def wait(self) -> Path:
        """Wait until all ranks have written, or all raise CheckpointError; the temporary folder, not yet committed."""
        assert self.pending is not None and self._thread is not None, "start() comes first"  # noqa: PT018
        self._thread.join()
        self._thread = None
        outcomes = distributed.gather_objects((self._failure, self.files))
        failed = [f"rank {index}: {text}" for index, (text, _) in enumerate(outcomes) if text is not None]
        if failed:
            step = self.pending.step
            self.discard()
            raise CheckpointError(
                f"The checkpoint of step {step} could not be written to {self._temporary} ({'; '.join(failed[:3])}). "
                f"Free there: {files.free_bytes(self.run) / 2**20:,.0f} MiB. Earlier checkpoints are untouched."
            )
        self.files = {name: entry for _, files in outcomes for name, entry in sorted(files.items())}
        return self._temporary

    def finish(self) -> Path:
        """Wait until all ranks have written, and commit, or all raise CheckpointError; returns the checkpoint."""
        self.wait()
        assert self.pending is not None
        final = self.run / folder_name(self.pending.step)
        problem = None
        if distributed.is_main():
            try:
                seal(self._temporary, final, replace(self.pending, files=self.files))
            except (OSError, CheckpointError) as error:
                problem = f"{type(error).__name__}: {error}"
        problem = distributed.from_main(problem)
        if problem is not None:
            self.discard()
            raise CheckpointError(f"{final} could not be committed ({problem}). Earlier checkpoints are untouched.")
        self.pending = None
        return final

    def discard(self) -> None:
        """Delete the written files once no rank reads them any more; all ranks take part."""
        self.pending = None
        distributed.barrier()
        if distributed.is_main():
            files.remove(self._temporary)


def seal(temporary: Path, final: Path, manifest: Manifest) -> None:
    """Turn a complete temporary folder, whose files are synced, into a checkpoint."""
    for name, entry in manifest.files.items():
        path = temporary / name
        if not path.is_file() or path.stat().st_size != entry["bytes"]:
            raise CheckpointError(
                f"{path} was written by another rank and is not complete here. The run folder must be on a file system "
                "that all ranks share."
            )
    files.replace_json(temporary / MANIFEST, manifest.to_json())
    folders = [path for path in temporary.rglob("*") if path.is_dir()]
    for folder in sorted(folders, key=lambda path: -len(path.parts)):
        files.sync(folder)
    if final.exists():
        try:
            read_manifest(final)
        except CheckpointError:
            files.set_aside(final, "corrupt")
        else:  # the same step of the same run: the existing checkpoint is equivalent
            files.remove(temporary)
            return
    files.discard(temporary / folder_marks.MARK)
    files.rename(temporary, final)
    files.sync(final.parent)
    try:
        files.replace_text(final.parent / "latest", final.name)
    except OSError as error:  # a hint for people; the checkpoint is committed
        logger.warning("%s is not written: %s", final.parent / "latest", error)


def amend(checkpoint: Path, counters: Mapping[str, float]) -> None:
    """Replace the counters of a committed checkpoint atomically; after a disk error it keeps the old ones."""
    try:
        manifest = read_manifest(checkpoint, verify=False)
        files.replace_json(checkpoint / MANIFEST, replace(manifest, counters=dict(counters)).to_json())
    except OSError as error:
        logger.warning("%s does not record the end of the run (%s); the end is measured again.", checkpoint, error)


def read_manifest(folder: Path, *, verify: bool = True) -> Manifest:
    """A checkpoint's manifest; CheckpointError for a file that differs. Without `verify` sizes are compared only."""
    manifest = parse_manifest(folder / MANIFEST)
    for name, expected in manifest.files.items():
        _check_file(folder / name, expected, verify=verify)
    return manifest


def parse_manifest(path: Path) -> Manifest:
    """Read `manifest.json` without checking the files that it names; see `read_manifest`."""
    try:
        data = files.read_json(path)
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{path.parent} has no {MANIFEST}, so it is not a complete checkpoint. Choose another checkpoint folder."
        ) from error
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged ({error}). Choose an earlier checkpoint.") from error
    stored = data.get("format")
    if isinstance(stored, int) and stored != FORMAT and data.get("version") != __version__:  # else a damaged number
        raise OtherFormatError(
            f"{path} has format {stored}, this version reads {FORMAT}. It was written by mm_moslora "
            f"{data.get('version')}; use that version, or choose another train.output."
        )
    if stored != FORMAT or data.get("checksum") != _checksum(data):
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
    if verify and sha256_of(path) != expected["sha256"]:
        raise CheckpointError(
            f"{path} was altered: its sha256 differs from the manifest. Choose an earlier checkpoint."
        )
