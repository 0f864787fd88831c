"""Programs for the processes of runs in tests."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from mm_moslora.compare import run_processes
from mm_moslora.compare.comparison_cell import Job
from mm_moslora.compare.comparison_plan import Outcome
from mm_moslora.compare.run_processes import RunProcesses, Slot

CHECKOUT = Path(__file__).parents[2]


def program(run: str) -> str:
    """The program of a run with a function of this module in place of training and measuring."""
    return (
        f"import sys; sys.path.insert(0, {str(CHECKOUT)!r});"
        "from mm_moslora.compare import comparison_cell; from tests.compare import dying;"
        f"comparison_cell._run = dying.{run}; comparison_cell.main()"
    )


def start(job: Job) -> None:
    """Start one run, and wait for it for ever."""
    run_processes.PROGRAM = program("work")
    runs = RunProcesses([Slot()])
    runs.start(job)
    while runs.running:
        runs.wait(60)


def work(job: Job, started: float) -> Outcome:
    """Write the id of this process, or end as the name of the folder says."""
    if job.place.name.startswith("dies"):
        os.kill(os.getpid(), signal.SIGKILL)
    (job.place / "process").write_text(str(os.getpid()))
    while job.place.name.startswith("stays"):
        time.sleep(0.05)
    return Outcome(status="ok")


def meet(job: Job, started: float) -> Outcome:
    """Wait for the run on the other device; the first run of the second arm then fails."""
    device = os.environ["CUDA_VISIBLE_DEVICES"]
    assert job.accelerators == (device,)
    rounds = len(list(job.folder.glob(f"here-{device}-*")))
    (job.folder / f"here-{device}-{rounds}").write_text(job.cell.name)
    deadline = time.monotonic() + 60
    while len(list(job.folder.glob(f"here-*-{rounds}"))) < 2:
        assert time.monotonic() < deadline, "no run came beside this one"
        time.sleep(0.05)
    assert not (job.cell.seed == 0 and job.cell.arm.name.startswith("moslora")), "boom"
    return Outcome(status="ok", test={"t": 0.5})


_DEVICES = os.environ.get("CUDA_VISIBLE_DEVICES")
"""As libraries read them while they are imported."""


def tell_devices(job: Job, started: float) -> Outcome:
    """Report the devices that the process had at its start."""
    return Outcome(status="ok", reason=str(_DEVICES))
