"""Functions for the processes of the pool's tests; a separate module, so that they import little."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from mm_moslora.compare.process_pool import Pool, Slot

from mm_moslora.compare import comparison_cell
from mm_moslora.compare.comparison_cell import Job
from mm_moslora.compare.comparison_plan import Outcome


class Work:
    """Takes names of files: writes the number of this process into them, or ends as the name says."""

    def __init__(self, slot: Slot) -> None:
        """Every slot is the same."""

    def __call__(self, item: str) -> bool:
        """Whether it goes on."""
        name = Path(item).name
        if name.startswith("dies"):
            os.kill(os.getpid(), signal.SIGKILL)
        Path(item).write_text(str(os.getpid()))
        while name.startswith("stays"):
            time.sleep(0.05)
        return not name.startswith("last")


def start(item: str) -> None:
    """A pool whose process takes one item; the pool waits for it for ever."""
    pool = Pool(Work, [Slot()])
    pool.start(item)
    while pool.running:
        pool.wait(60)


class Meet(comparison_cell.Runner):
    """Runs that wait for the run on the other device; the first run of the second arm then fails."""

    def __call__(self, job: Job) -> bool:
        """Whether it goes on."""
        comparison_cell._run = _meeting
        return super().__call__(job)


def _meeting(job: Job, started: float, load_base: object) -> Outcome:
    device = os.environ["CUDA_VISIBLE_DEVICES"]
    rounds = len(list(job.folder.glob(f"here-{device}-*")))
    (job.folder / f"here-{device}-{rounds}").write_text(job.cell.name)
    deadline = time.monotonic() + 60
    while len(list(job.folder.glob(f"here-*-{rounds}"))) < 2:
        assert time.monotonic() < deadline, "no run came beside this one"
        time.sleep(0.05)
    assert not (job.cell.seed == 0 and job.cell.arm.name.startswith("moslora")), "boom"
    return Outcome(status="ok", test={"t": 0.5})


class Tired(comparison_cell.Runner):
    """Runs fail in a process that has taken one."""

    def __init__(self, slot: Slot) -> None:
        """Nothing was taken."""
        super().__init__(slot)
        self._taken = 0

    def __call__(self, job: Job) -> bool:
        """Whether it goes on."""
        self._taken += 1
        comparison_cell._run = _well if self._taken == 1 else _badly
        return super().__call__(job)


def _well(job: Job, started: float, load_base: object) -> Outcome:
    return Outcome(status="ok", test={"t": 0.5})


def _badly(job: Job, started: float, load_base: object) -> Outcome:
    raise MemoryError("leaks of earlier runs")
