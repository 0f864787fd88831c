"""Writing a checkpoint: all ranks write into a temporary folder, agree, write the manifest, sync and rename once.

A thread writes and hashes the files while training continues; it never communicates with other ranks. All ranks commit
together at the end of a step, after every rank has written.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from mm_moslora.training.checkpointing.checkpoint_folder import (
    Manifest,
    Retention,
    folder_name,
    read_manifest,
    remove_old,
)
from mm_moslora.utils import distributed, files
from mm_moslora.utils.errors import CheckpointError, ConfigError
from mm_moslora.utils.run_paths import MANIFEST

logger = logging.getLogger(__name__)

Files = dict[str, dict[str, Any]]
_MARGIN = 1.1  # files take more room than their tensors


def rank_folder(checkpoint: Path, rank: int | None = None) -> Path:
    """The folder of a rank's part of the trainer state."""
    return checkpoint / "trainer" / f"rank-{distributed.rank() if rank is None else rank:05d}"


class Saver:
    """Writes one checkpoint at a time.

    Every rank makes the same calls in the same order: `start`, `busy` any number of times, then `finish` or `discard`.

    Args:
        run: the run folder, shared by all ranks.
    """

    def __init__(self, run: Path) -> None:
        self.run = run
        self.pending: Manifest | None = None
        """Manifest of the checkpoint being written; None when nothing is."""
        self._temporary = run
        self._thread: threading.Thread | None = None
        self._tidier: threading.Thread | None = None
        self._failure: str | None = None
        self.files: Files = {}
        """Size and hash of the files that this rank has written; of all ranks after `wait`."""

    def start(self, manifest: Manifest, write: Callable[[Path], None], *, size: int = 0) -> None:
        """Start to write.

        Args:
            manifest: of the state to be written; `files` is filled in later.
            write: called on every rank with the temporary folder, in a thread. Each rank may write into its own
                `rank_folder`; rank 0 may write anywhere else, too.
            size: estimate of the bytes that this rank will write.

        Raises:
            CheckpointError: too little disk space, or the folder cannot be made; the same on every rank.
        """
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
                files.remove(leftover, mark=files.MARK if (leftover / files.MARK).exists() else MANIFEST)
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
                self.files[name] = {"bytes": path.stat().st_size, "sha256": files.sha256_of(path)}
        except Exception as error:  # reported by `finish`, on every rank
            self._failure = f"{type(error).__name__}: {error}"

    def _own_files(self) -> list[Path]:
        own = rank_folder(self._temporary)
        if not distributed.is_main():
            return sorted(path for path in own.rglob("*") if path.is_file())
        others = self._temporary / "trainer"
        mark = self._temporary / files.MARK
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
        """Wait until all ranks have written.

        Returns:
            The temporary folder, complete but not committed.

        Raises:
            CheckpointError: a rank could not write, the same on every rank; its files are deleted.
        """
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
        """Wait until all ranks have written, and commit.

        Returns:
            The checkpoint.

        Raises:
            CheckpointError: a rank could not write, the same on every rank; earlier checkpoints are untouched.
        """
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

    def tidy(self, retention: Retention) -> None:
        """Apply the retention policy in a thread, after the newest checkpoint has been verified."""
        if not distributed.is_main():
            return
        self.rest()
        self._tidier = threading.Thread(target=self._tidy, args=(retention,), name="retention", daemon=True)
        self._tidier.start()

    def _tidy(self, retention: Retention) -> None:
        try:
            remove_old(self.run, retention)
        except (OSError, CheckpointError, ConfigError) as error:
            logger.warning("No old checkpoint was deleted: %s", error)

    def rest(self) -> None:
        """Wait until `tidy` is done."""
        if self._tidier is not None:
            self._tidier.join()
            self._tidier = None


def seal(temporary: Path, final: Path, manifest: Manifest) -> None:
    """Turn a complete temporary folder into a checkpoint.

    The writers have synced their files. This function syncs folders, writes the manifest and renames, in this order.

    Raises:
        CheckpointError: a file of another rank is not complete here.
    """
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
    files.sync(temporary)
    if final.exists():
        try:
            read_manifest(final)
        except CheckpointError:
            files.set_aside(final, "corrupt")
        else:  # the same step of the same run: the existing checkpoint is equivalent
            files.remove(temporary)
            return
    files.discard(temporary / files.MARK)
    files.rename(temporary, final)
    files.sync(final.parent)
    files.replace_text(final.parent / "latest", final.name)


def amend(checkpoint: Path, counters: Mapping[str, float]) -> None:
    """Replace the counters of a committed checkpoint atomically; after a disk error it keeps the old ones."""
    try:
        manifest = read_manifest(checkpoint, verify=False)
        files.replace_json(checkpoint / MANIFEST, replace(manifest, counters=dict(counters)).to_json())
    except OSError as error:
        logger.warning("%s does not record the end of the run (%s); the end is measured again.", checkpoint, error)


def commit(run: Path, manifest: Manifest, write: Callable[[Path], None]) -> Path:
    """Write one checkpoint and wait for it; see `Saver`.

    Raises:
        CheckpointError: a rank could not write; earlier checkpoints are untouched.
    """
    saver = Saver(run)
    saver.start(manifest, write)
    return saver.finish()
