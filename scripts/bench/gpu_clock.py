"""Times work on a device for the GPU benchmark."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any, TypeVar

import torch

T = TypeVar("T")
WARM_UP, STEPS = 3, 10
"""Steps before the measured ones, and measured steps."""


class Clock:
    """Times work on a device, and knows when this process should end."""

    def __init__(self, device: torch.device, deadline: float) -> None:
        self.device = device
        self.deadline = deadline
        """On `time.monotonic`, which all processes of a machine share."""

    @property
    def is_over(self) -> bool:
        """Whether the time of this process is over."""
        return time.monotonic() > self.deadline

    def timed(self, work: Callable[[], T]) -> tuple[float, T]:
        """Seconds on the device, the host's waits included, and the result."""
        if self.device.type == "cpu":
            start = time.perf_counter()
            result = work()
            return time.perf_counter() - start, result
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(self.device)
        begin.record()
        result = work()
        end.record()
        torch.cuda.synchronize(self.device)
        return begin.elapsed_time(end) / 1e3, result

    def median(self, work: Callable[[], Any], *, warm_up: int = WARM_UP, steps: int = STEPS) -> float:
        """Median seconds of repeated work."""
        times = [self.timed(work)[0] for _ in range(warm_up + steps)]
        return statistics.median(times[warm_up:])
