"""Functions for the processes of the pool's tests; a separate module, so that they import little."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from mm_moslora.compare import comparison_cell
from mm_moslora.compare.comparison_cell import Job
from mm_moslora.compare.comparison_plan import Outcome
from mm_moslora.compare.process_pool import Slot


def work(item: str, slot: Slot) -> None:
    """End by signal 9 if requested, else write a file."""
    if item == "dies":
        os.kill(os.getpid(), signal.SIGKILL)
    Path(item).write_text("lived")


def meet(job: Job, slot: Slot) -> None:
    """A run that waits for the run on the other device; the first run of the second arm then fails."""
    comparison_cell._run = _meeting
    comparison_cell.run(comparison_cell.dataclasses.replace(job, devices=slot.devices))


def _meeting(job: Job, started: float) -> Outcome:
    device = os.environ["CUDA_VISIBLE_DEVICES"]
    rounds = len(list(job.folder.glob(f"here-{device}-*")))
    (job.folder / f"here-{device}-{rounds}").write_text(job.cell.name)
    deadline = time.monotonic() + 60
    while len(list(job.folder.glob(f"here-*-{rounds}"))) < 2:
        assert time.monotonic() < deadline, "no run came beside this one"
        time.sleep(0.05)
    assert not (job.cell.seed == 0 and job.cell.arm.name.startswith("moslora")), "boom"
    return Outcome(status="ok", test={"t": 0.5})
