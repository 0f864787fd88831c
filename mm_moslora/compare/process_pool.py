"""Parallel runs in processes of their own, so that a crash does not affect the others."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any, NamedTuple


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
    from mm_moslora.utils.errors import ConfigError

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
    """An item whose process has ended or goes on without it."""

    item: Any
    code: int
    """The process's exit code; 0 where it goes on."""
    alone: bool
    """Whether the process took no item before this one."""


@dataclass(kw_only=True, eq=False)
class _Worker:
    process: BaseProcess
    connection: Connection
    slot: Slot
    kind: Any
    item: Any = None
    items: int = 0


class Pool:
    """Processes that take items, one process per slot at a time.

    A process takes one item after the other. Another one replaces it after an item that ends it or asks for it, and
    before an item of another kind.

    Args:
        target: called with the slot in the process; returns a function that takes an item, and returns whether the
            process may take another one. A function or class of a module, so that it can be pickled.
        room: the slots.
        kind: the kind of an item, compared with `==`; None: the item gets a process of its own. Without it, every item.
        preload: modules that are imported once for all processes where that is safe.
    """

    def __init__(
        self,
        target: Callable[[Slot], Callable[[Any], bool]],
        room: Sequence[Slot],
        *,
        kind: Callable[[Any], Any] = lambda item: None,
        preload: Sequence[str] = (),
    ) -> None:
        self._target, self._kind = target, kind
        self._free = list(room)
        self._idle: list[_Worker] = []
        self._busy: list[_Worker] = []
        # A process that was forked after CUDA was used cannot use CUDA, so with accelerators every one is spawned.
        self._context: Any = multiprocessing.get_context("spawn" if any(s.devices for s in room) else "forkserver")
        if preload and not any(slot.devices for slot in room):
            self._context.set_forkserver_preload(list(preload))

    @property
    def free(self) -> bool:
        """Whether another item can start."""
        return bool(self._free or self._idle)

    @property
    def running(self) -> list[Any]:
        """The running items."""
        return [worker.item for worker in self._busy]

    def start(self, item: Any) -> None:
        """Give an item to a process that waits for one of its kind, else to a new process in a free slot."""
        kind = self._kind(item)
        found = [w for w in self._idle if kind is not None and w.kind == kind and w.process.exitcode is None]
        worker = found[0] if found else self._begin(kind)
        if found:
            self._idle.remove(worker)
        worker.item, worker.items = item, worker.items + 1
        self._busy.append(worker)
        with suppress(BrokenPipeError, ConnectionResetError):  # `wait` finds that the process is gone
            worker.connection.send(item)

    def _begin(self, kind: Any) -> _Worker:
        if not self._free:
            self._end(self._idle.pop(0))
        slot = self._free.pop(0)
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=_take_items, args=(self._target, theirs, slot, kind is not None))
        process.start()
        theirs.close()
        return _Worker(process=process, connection=ours, slot=slot, kind=kind)

    def wait(self, seconds: float) -> list[Ended]:
        """Wait until items end, up to a time limit; returns those that did."""
        signs = [sign for worker in self._busy for sign in (worker.connection, worker.process.sentinel)]
        multiprocessing.connection.wait(signs, timeout=seconds)
        over = []
        for worker in list(self._busy):
            try:
                if worker.process.exitcode is None and not worker.connection.poll():
                    continue
                goes_on = bool(worker.connection.poll() and worker.connection.recv())
            except (EOFError, OSError):  # it was killed
                goes_on = False
            self._busy.remove(worker)
            if goes_on:
                self._idle.append(worker)
            else:
                worker.process.join()
                self._end(worker)
            over.append(Ended(worker.item, 0 if goes_on else worker.process.exitcode or 0, worker.items == 1))
        return over

    def stop(self, *, grace: float = 120.0) -> None:
        """Ask every process to save and exit; after `grace` seconds it is killed."""
        for worker in self._busy:
            _signal(worker.process, signal.SIGTERM)
        everyone = [*self._busy, *self._idle]
        self._busy.clear()
        self._idle.clear()
        for worker in everyone:
            worker.connection.close()
        for worker in everyone:
            self._end(worker, grace=grace)

    def _end(self, worker: _Worker, *, grace: float = 120.0) -> None:
        """Free the slot of a process that has no item, or that was asked to exit."""
        worker.connection.close()
        worker.process.join(max(0.0, grace))
        if worker.process.exitcode is None:
            _signal(worker.process, signal.SIGKILL)
            worker.process.join()
        self._free.append(worker.slot)


def _take_items(
    target: Callable[[Slot], Callable[[Any], bool]], connection: Connection, slot: Slot, several: bool
) -> None:
    """Take items until one of them ends the process, or the pool has no more."""
    os.setpgrp()  # Ctrl-C reaches only the parent, which forwards it once
    threading.Thread(target=_end_with_parent, name="end with parent", daemon=True).start()
    take, goes_on = target(slot), True
    while goes_on:
        try:
            item = connection.recv()
        except EOFError:  # the pool has no more
            return
        goes_on = take(item) and several
        with suppress(BrokenPipeError, ConnectionResetError):  # the pool has been stopped
            connection.send(goes_on)


def _end_with_parent() -> None:
    """Ask this process to save and exit once its parent has been killed; otherwise it would train to the end."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)


def _signal(process: BaseProcess, number: int) -> None:
    try:
        assert process.pid is not None
        os.kill(process.pid, number)
    except ProcessLookupError:
        pass
