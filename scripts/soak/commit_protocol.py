"""Crash the commit protocol at every operation, many times, on a simulated disk that may lose unsynced data.

Two ranks save some checkpoints, with retention. After a crash at any operation, the newest valid checkpoint must be at
least as new as the last one that was reported as committed, and equal what was written, bit for bit. The next save must
succeed.

    python scripts/soak/commit_protocol.py --points 12000
"""

from __future__ import annotations

import random
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

from parts import soak
from simulated_disk import Operation, SimulatedDisk, note_file, recording

from mm_moslora.training.checkpointing.checkpoint_folder import Manifest, Saver, folder_name, rank_folder
from mm_moslora.training.checkpointing.run_checkpoints import Retention, Tidier, newest_valid
from mm_moslora.utils import distributed
from mm_moslora.utils.errors import CheckpointError

RANKS = 2
GOOD = ("nothing yet", "the last reported one", "one that was just being committed")
"""What may be there after a crash."""


def manifest(step: int) -> Manifest:
    """Manifest of one small checkpoint."""
    return Manifest(
        step=step, world_size=RANKS, recipe={}, base={}, counters={"steps": step}, trainable={}, files={}
    )  # fmt: skip


@contextmanager
def as_rank(number: int, outcomes: list) -> Iterator[None]:
    """Act as one of two ranks; the script supplies the other rank's messages."""
    with (
        patch.object(distributed, "rank", lambda: number),
        patch.object(distributed, "is_main", lambda: number == 0),
        patch.object(distributed, "gather_objects", lambda value: [value, *outcomes]),
    ):
        yield


def content_of(step: int, name: str) -> bytes:
    """Content of a file of a step."""
    return random.Random(f"{step} {name}").randbytes(200 + 37 * (step % 5))


def save(run: Path, step: int, operations: list[Operation], retention: Retention) -> None:
    """One checkpoint by two ranks, then retention."""

    def writer(number: int):
        def write(folder: Path) -> None:
            names = [rank_folder(folder, number) / "optimizer.safetensors", rank_folder(folder, number) / "random.json"]
            if number == 0:
                (folder / "adapter").mkdir(exist_ok=True)
                names += [folder / "config.yaml", folder / "adapter" / "moslora.safetensors"]
            for path in names:
                note_file(operations, run, path, content_of(step, path.relative_to(folder).as_posix()))

        return write

    savers = [Saver(run) for _ in range(RANKS)]
    with as_rank(0, []):
        savers[0].start(manifest(step), writer(0))
        savers[0]._thread.join()
    with as_rank(1, []):
        savers[1].start(manifest(step), writer(1))
        savers[1]._thread.join()
    with as_rank(0, [(savers[1]._failure, savers[1].files)]):
        savers[0].finish()
    operations.append(("report", (step,)))
    with as_rank(0, []):
        tidier = Tidier(run)
        tidier.start(retention)
        tidier.wait()


def history(seed: int, work: Path) -> list[Operation]:
    """The operations of several saves, with retention."""
    rng = random.Random(seed)
    retention = Retention(last=rng.choice((1, 2, 3)), every=rng.choice((0, 4)), best=rng.choice((None, folder_name(2))))
    run = work / f"history-{seed}"
    run.mkdir(parents=True)
    with recording(run) as operations:
        for step in range(1, rng.randrange(4, 7)):
            save(run, step, operations, retention)
    shutil.rmtree(run)
    return operations


def crash_point(operations: list[Operation], stop: int, seed: int, disk: Path) -> str:
    """Crash after `stop` operations, recover, and return the outcome."""
    simulated = SimulatedDisk()
    for name, arguments in operations[:stop]:
        getattr(simulated, name)(*arguments)
    shutil.rmtree(disk, ignore_errors=True)
    simulated.crash(disk, random.Random(seed))
    try:
        newest = newest_valid(disk)
    except CheckpointError as error:
        return f"unrecoverable: {error}"
    if newest is None:
        return GOOD[0] if simulated.reported == 0 else f"lost: step {simulated.reported} was reported"
    folder, written = newest
    if written.step < simulated.reported:
        return f"lost: step {simulated.reported} was reported, step {written.step} came back"
    for name in written.files:
        if (folder / name).read_bytes() != content_of(written.step, name):
            return f"altered: {folder / name}"
    return GOOD[1] if written.step == simulated.reported else GOOD[2]


def run(points: int) -> Counter[str]:
    """Outcomes of a number of crash points."""
    outcomes: Counter[str] = Counter()
    base = "/dev/shm" if Path("/dev/shm").is_dir() else None
    with tempfile.TemporaryDirectory(dir=base) as folder:
        work, seed = Path(folder), 0
        while sum(outcomes.values()) < points:
            operations = history(seed, work)
            for stop in range(len(operations) + 1):
                for repeat in range(3):
                    if sum(outcomes.values()) < points:
                        outcomes[crash_point(operations, stop, 1000 * seed + 10 * stop + repeat, work / "crashed")] += 1
            seed += 1
    return outcomes


if __name__ == "__main__":
    count = (12_000, "crash points to try")
    sys.exit(soak(__doc__, lambda options, _: run(options.points), good=GOOD, points=count))
