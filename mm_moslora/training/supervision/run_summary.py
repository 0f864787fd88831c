"""`summary.json`: what a run of any trainer has done, for the report."""

from __future__ import annotations

import contextlib
import logging
import resource
from collections.abc import Callable, Iterator
from typing import Any

import torch

from mm_moslora.utils import distributed, files

logger = logging.getLogger(__name__)


def write_summary(run: Any, total_steps: int, content: Callable[[], dict[str, Any]]) -> None:
    """Write `summary.json` into a run's folder, of whatever trainer; `content` gives what only this kind of run has."""
    note_memory(run.counters)
    if distributed.is_main():
        with only_measuring("The summary"):
            summary = {
                "format": 1,  # of the run folder, see `mm_moslora.reporting.run_data`
                "name": run.recipe.name, "steps": run.step, "total_steps": total_steps, "counters": run.counters,
                "precision": run.precision, "world_size": distributed.world_size(), "zero": run.recipe.train.zero,
                "memory_gib": run.counters["memory_gib"], **content(),
            }  # fmt: skip
            files.replace_json(run.folder / "summary.json", summary)


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
