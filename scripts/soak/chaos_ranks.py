"""What goes wrong inside the ranks of `chaos.py`; `train` is called in every rank, see `ranks.Ranks.start`."""

from __future__ import annotations

import contextlib
import json
import math
import os
import resource
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

NOTE_BYTES = 64
KEPT: list[bytearray] = []


def train(text: str, recipe: str) -> int:
    """Train a recipe; a fault may hit one rank.

    Args:
        text: JSON: `notes`, the beginning of the files to which the ranks write their phases, and the fault's `name`
            (`memory`, `file size`, `clock`, `nan`, or anything else for none), `rank`, `step`, `seconds` and `size`.
        recipe: the recipe's file.
    """
    from ranks import train_recipes

    from mm_moslora.utils import distributed

    fault = json.loads(text)
    note = os.open(f"{fault['notes']}.{distributed.rank()}", os.O_WRONLY | os.O_CREAT)
    armed = _armed(fault) if distributed.rank() == fault["rank"] else None
    if armed is not None and fault["step"] < 0:
        armed()
        armed = None
    _follow(note, armed, fault["step"])
    return train_recipes([recipe])


def _armed(fault: dict[str, Any]) -> Callable[[], None] | None:
    """Start the fault's clock; None for a fault that comes from outside."""
    act = {"memory": _use_up_memory, "file size": _limit_files, "clock": _turn_clock, "nan": _poison}.get(fault["name"])
    if act is None:
        return None

    def strike() -> None:
        with contextlib.suppress(MemoryError):
            Path(f"{fault['notes']}.hit").touch()
            act(fault)

    def begin() -> None:
        timer = threading.Timer(fault["seconds"], strike)
        timer.daemon = True
        timer.start()

    return strike if fault["name"] == "nan" else begin


def _follow(note: int, armed: Callable[[], None] | None, at: int) -> None:
    """Write every phase down, and start the fault's clock at a step."""
    from mm_moslora.training.supervision.watchdog import Watchdog

    real, waiting = Watchdog.phase, [armed]

    def phase(self: Watchdog, what: str, step: int, limit_seconds: float) -> None:
        real(self, what, step, limit_seconds)
        os.pwrite(note, f"{step} {what}".ljust(NOTE_BYTES).encode(), 0)
        if waiting[0] is not None and step >= at and what == "data":
            begin, waiting[0] = waiting[0], None
            begin()

    Watchdog.phase = phase  # type: ignore[method-assign]


def _use_up_memory(fault: dict[str, Any]) -> None:
    """Set the limit to what the process has, and take what is left of it, for ever or for a while."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + fault["size"], hard))
    for size in (1 << 24, 1 << 20, 1 << 16, 1 << 12):
        with contextlib.suppress(MemoryError):
            while True:
                KEPT.append(bytearray(size))


def _limit_files(fault: dict[str, Any]) -> None:
    """No file may grow beyond some bytes, for a while."""
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (fault["size"] % 20_000, hard))
    time.sleep(fault["size"] % 3000 / 1000)
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))


def _turn_clock(fault: dict[str, Any]) -> None:
    """An hour forth or back, and later back again."""
    real, offset = time.time, 3600 if fault["size"] % 2 else -3600
    time.time = lambda: real() + offset
    if fault["size"] % 3:
        time.sleep(fault["size"] % 3000 / 1000)
        time.time = real


def _poison(fault: dict[str, Any]) -> None:
    """The next loss of this rank, or its gradient, is not a number: once, or from now on."""
    from mm_moslora.training.engine import LossModule

    forward, left = LossModule.forward, [1 if fault["size"] % 3 else math.inf]

    def poisoned(self: LossModule, *args: Any, **more: Any) -> Any:
        loss = forward(self, *args, **more)
        if left[0] and loss.requires_grad:
            left[0] -= 1
            if fault["size"] % 2:
                return loss * math.nan
            loss.register_hook(lambda gradient: gradient * math.nan)
        return loss

    LossModule.forward = poisoned  # type: ignore[method-assign]


if __name__ == "__main__":
    print(f"{__doc__}\nA part of chaos.py; there is nothing to run.")
