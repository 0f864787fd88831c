"""Parallel runs, each in its own process, so that a crash does not affect the others."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from typing import Any

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.2


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
        ConfigError: fewer accelerators than one run needs.
    """
    from mm_moslora.utils.errors import ConfigError

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


@dataclass(kw_only=True)
class _Running:
    process: BaseProcess
    slot: Slot
    item: Any
    started: float = field(default_factory=time.monotonic)


class Pool:
    """Starts processes as slots become free.

    Args:
        target: called with (item, slot) in the process; a function of a module, so that it can be pickled.
        room: the slots.
        preload: a module that is imported once for all processes where that is safe.
    """

    def __init__(
        self, target: Callable[[Any, Slot], None], room: Sequence[Slot], *, preload: str | None = None
    ) -> None:
        self._target, self._free = target, list(room)
        self._running: list[_Running] = []
        # A process that was forked after CUDA was used cannot use CUDA, so with accelerators every run is spawned.
        self._context: Any = multiprocessing.get_context("spawn" if any(s.devices for s in room) else "forkserver")
        if preload is not None and not any(slot.devices for slot in room):
            self._context.set_forkserver_preload([preload])

    @property
    def free(self) -> bool:
        """Whether another run can start."""
        return bool(self._free)

    @property
    def running(self) -> list[Any]:
        """The running items."""
        return [item.item for item in self._running]

    def start(self, item: Any) -> None:
        """Start a process in a free slot."""
        slot = self._free.pop(0)
        process = self._context.Process(target=self._target, args=(item, slot))
        process.start()
        self._running.append(_Running(process=process, slot=slot, item=item))

    def wait(self, seconds: float) -> list[tuple[Any, int]]:
        """Wait until a process ends, up to a time limit; returns (item, exit code) of those that did."""
        deadline = time.monotonic() + seconds
        while True:
            over = [item for item in self._running if item.process.exitcode is not None]
            if over or not self._running or time.monotonic() >= deadline:
                break
            time.sleep(POLL_SECONDS)
        for item in over:
            self._running.remove(item)
            self._free.append(item.slot)
            item.process.join()
        return [(item.item, item.process.exitcode or 0) for item in over]

    def stop(self, *, grace: float = 120.0) -> None:
        """Ask every process to save and exit; after `grace` seconds it is killed."""
        for item in self._running:
            _signal(item.process, signal.SIGTERM)
        for item in self._running:
            item.process.join(max(0.0, grace))
            if item.process.exitcode is None:
                _signal(item.process, signal.SIGKILL)
                item.process.join()
        self._free += [item.slot for item in self._running]
        self._running.clear()


def _signal(process: BaseProcess, number: int) -> None:
    try:
        assert process.pid is not None
        os.kill(process.pid, number)
    except ProcessLookupError:
        pass
