"""Parallel runs of a comparison, each in a process of its own, so that a crash does not affect the others."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import NamedTuple

from mm_moslora.compare.comparison_cell import LOG, Job
from mm_moslora.launch.child_processes import (
    PIPE,
    Child,
    child_environment,
    kill_tree,
    python_words,
    start,
    terminate,
)
from mm_moslora.utils.errors import ConfigError
from mm_moslora.utils.files import writing_in_place

PROGRAM = "from mm_moslora.compare.comparison_cell import main; main()"
_PAUSE = 0.1
"""Seconds between two looks at the processes."""


@dataclass(frozen=True, kw_only=True)
class Slot:
    """Resources of one run: its accelerators, none on a CPU."""

    devices: tuple[str, ...] = ()


def slots(*, parallel: int | None, devices_per_run: int) -> list[Slot]:
    """The slots of this machine: one per group of accelerators, or `parallel` (one) on a CPU.

    Args:
        parallel: maximum number of parallel runs; None: as many as the accelerators allow.
        devices_per_run: accelerators of one run.

    Raises:
        ConfigError: fewer accelerators than one run needs, or a number below 1.
    """
    for option, number in (("--parallel", parallel), ("--gpus-per-run", devices_per_run)):
        if number is not None and number < 1:
            raise ConfigError(f"{option} is {number}, expected 1 or more.")
    names = _devices()
    if not names:
        if devices_per_run > 1:
            raise ConfigError(f"--gpus-per-run is {devices_per_run}, but there is no accelerator here. Leave it out.")
        return [Slot() for _ in range(parallel or 1)]
    if len(names) < devices_per_run:
        raise ConfigError(
            f"--gpus-per-run is {devices_per_run}, but there are {len(names)} accelerators. Give at most that many."
        )
    groups = [tuple(names[start : start + devices_per_run]) for start in range(0, len(names), devices_per_run)]
    full = [Slot(devices=group) for group in groups if len(group) == devices_per_run]
    return full[:parallel]


def _devices() -> list[str]:
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    named = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return named.split(",")[:count] if named else [str(index) for index in range(count)]


class Ended(NamedTuple):
    """A run whose process has ended."""

    job: Job
    code: int
    """The process's exit code."""


class RunProcesses:
    """The processes of runs, one per slot at a time."""

    def __init__(self, room: Sequence[Slot]) -> None:
        self._free = list(room)
        self._busy: list[tuple[Job, Slot, Child]] = []

    @property
    def free(self) -> bool:
        """Whether another run can start."""
        return bool(self._free)

    @property
    def running(self) -> list[Job]:
        """The runs whose processes have not ended."""
        return [job for job, _, _ in self._busy]

    def start(self, job: Job) -> None:
        """Start a run in a free slot; its output goes into its log."""
        slot = self._free.pop(0)
        settings = {"TRANSFORMERS_VERBOSITY": os.environ.get("TRANSFORMERS_VERBOSITY", "error")}
        if slot.devices:
            settings["CUDA_VISIBLE_DEVICES"] = ",".join(slot.devices)
        job.place.mkdir(parents=True, exist_ok=True)
        with writing_in_place(job.place / LOG, append=True) as log:
            child = start(
                python_words("-c", PROGRAM), env=child_environment(settings), stdin=PIPE, stdout=log, stderr=log,
                process_group=0,  # Ctrl-C reaches only this process, which asks each run once
            )  # fmt: skip
        self._busy.append((job, slot, child))
        assert child.stdin is not None
        with suppress(BrokenPipeError):  # `wait` finds that the process is gone
            child.stdin.write(f"{dataclasses.replace(job, accelerators=slot.devices).to_json()}\n".encode())
            child.stdin.flush()  # and it stays open: its end tells the run that this process is gone

    def wait(self, seconds: float) -> list[Ended]:
        """Wait until runs end, up to a time limit; returns those that did."""
        deadline = time.monotonic() + seconds
        while True:
            over = [running for running in self._busy if running[2].poll() is not None]
            if over or time.monotonic() > deadline:
                break
            time.sleep(_PAUSE)
        return [self._end(*running) for running in over]

    def stop(self, *, grace: float = 120.0) -> None:
        """Ask every run to save and exit; after `grace` seconds it is killed."""
        for _, _, child in self._busy:
            terminate(child.pid)
        deadline = time.monotonic() + grace
        while self._busy and time.monotonic() < deadline:
            self.wait(_PAUSE)
        for job, slot, child in list(self._busy):
            kill_tree(child.pid)
            self._end(job, slot, child)

    def _end(self, job: Job, slot: Slot, child: Child) -> Ended:
        code = child.wait()
        if child.stdin is not None:
            with suppress(BrokenPipeError):
                child.stdin.close()
        self._busy.remove((job, slot, child))
        self._free.append(slot)
        return Ended(job, code)
