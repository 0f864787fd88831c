"""What is measured of a run of any trainer: its peak memory, and measures that may fail."""

from __future__ import annotations

import contextlib
import logging
import resource
from collections.abc import Iterator

import torch

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def only_measuring(what: str) -> Iterator[None]:
    """A block without collectives that measures; its failure is logged and does not end the run."""
    try:
        yield
    except Exception as error:
        logger.exception("%s could not be measured (%s: %s). Training continues.", what, type(error).__name__, error)


def note_memory(counters: dict[str, float]) -> None:
    """Count the peak memory over all sessions of a run."""
    counters["memory_gib"] = max(counters.get("memory_gib", 0.0), peak_memory_gib())


def peak_memory_gib() -> float:
    """Peak memory of this process: device memory on an accelerator, resident memory on a CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
