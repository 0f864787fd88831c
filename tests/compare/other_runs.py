"""The command line with another function in place of training and measuring: $RUN_OF_TESTS names it."""

from __future__ import annotations

import os
import signal
import sys

from waiting import wait_until

from mm_moslora import cli
from mm_moslora.compare import comparison_cell
from mm_moslora.compare.comparison_cell import CellRun
from mm_moslora.compare.comparison_plan import Outcome


def meet(run: CellRun, started: float, stop_at: int | None) -> Outcome:
    """Wait for the run on the other device; the first run of the second arm then fails, each time."""
    device = os.environ["CUDA_VISIBLE_DEVICES"]
    assert run.cards == 1
    before = [place.read_text() for place in run.folder.glob("here-*")]
    assert run.cell.name not in before, "boom"
    rounds = len(list(run.folder.glob(f"here-{device}-*")))
    (run.folder / f"here-{device}-{rounds}").write_text(run.cell.name)
    wait_until(lambda: len(list(run.folder.glob(f"here-*-{rounds}"))) == 2, "no run came beside this one")
    assert not (run.cell.seed == 0 and run.cell.arm.name.startswith("moslora")), "boom"
    return Outcome(status="ok", test={"t": 0.5})


def die(run: CellRun, started: float, stop_at: int | None) -> Outcome:
    """The runs of LoRA are killed."""
    if run.cell.arm.name == "lora":
        os.kill(os.getpid(), signal.SIGKILL)
    return Outcome(status="ok", test={"t": 0.5})


def last(run: CellRun, started: float, stop_at: int | None) -> Outcome:
    """Say that it took ten minutes."""
    return Outcome(status="ok", test={"t": 0.5}, total_seconds=600)


def wait(run: CellRun, started: float, stop_at: int | None) -> Outcome:
    """Wait until the test lets it go; count the starts."""
    with (run.folder / "begun").open("a") as begun:
        begun.write(f"{run.cell.name}\n")
    wait_until((run.folder / "go").exists)
    return Outcome(status="ok", test={"t": 0.5})


if __name__ == "__main__":
    comparison_cell._run = globals()[os.environ["RUN_OF_TESTS"]]
    sys.exit(cli.run(sys.argv[1:]))
