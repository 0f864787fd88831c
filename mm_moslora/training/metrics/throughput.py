"""Throughput, time split and device utilisation of a run, over all ranks."""

from __future__ import annotations

import time
from collections.abc import Mapping, MutableMapping, Sequence

import torch
from transformers import PreTrainedModel

from mm_moslora.batch import Batch
from mm_moslora.training.engine import StepResult
from mm_moslora.training.metrics.gpu_memory import RunEstimate
from mm_moslora.training.metrics.model_cost import FlopCounter, StepShape
from mm_moslora.training.supervision.run_summary import peak_memory_gib
from mm_moslora.utils import distributed


def rank_figures(*, seconds: float, data_seconds: float = 0.0, work_seconds: float = 0.0) -> dict[str, float]:
    """Measures of this rank: of the last step, and `work_seconds` per step since the last record, without waits."""
    on_gpu = torch.cuda.is_available()
    return {
        "step_seconds": seconds,
        "data_seconds": data_seconds,
        "work_seconds": work_seconds,
        "memory_gib": peak_memory_gib(),
        "memory_reserved_gib": torch.cuda.max_memory_reserved() / 2**30 if on_gpu else 0.0,
        "allocator_retries": float(torch.cuda.memory_stats().get("num_alloc_retries", 0)) if on_gpu else 0.0,
    }


class Clock:
    """The wall time of a run: `wall_seconds` grows with all time, `seconds` with optimiser steps only."""

    def __init__(self, counters: MutableMapping[str, float], step: int) -> None:
        self._counters = counters
        self._ticked = time.monotonic()
        self.begin(step)

    def begin(self, step: int) -> None:
        """Start counting rates, before the first step."""
        self._recorded_at = self._began = time.monotonic()
        self._first = self._recorded = step
        self._waited = self._tokens = self._samples = 0.0

    def tick(self) -> None:
        """Update `wall_seconds`."""
        now = time.monotonic()
        self._counters["wall_seconds"] = self._counters.get("wall_seconds", 0.0) + now - self._ticked
        self._ticked = now

    def waited(self, seconds: float) -> None:
        """Record a wait for other ranks."""
        self._waited += seconds

    def count(self, result: StepResult) -> None:
        """Record a step."""
        self._tokens, self._samples = self._tokens + result.tokens, self._samples + result.samples
        self.waited(result.wait_seconds)
        self.tick()

    def record(self, step: int, total: int) -> tuple[dict[str, float], float]:
        """Metrics and this rank's `work_seconds` since the last record; rates include saves, validations and waits."""
        now = time.monotonic()
        wall, steps = max(now - self._recorded_at, 1e-9), max(1, step - self._recorded)
        per_step = (now - self._began) / max(1, step - self._first)
        metrics = {
            "wall_seconds": wall / steps,
            "tokens_per_second": self._tokens / wall,
            "samples_per_second": self._samples / wall,
            "tokens_seen": self._counters["tokens"],
            "samples_seen": self._counters["samples"],
            "elapsed_seconds": self._counters["wall_seconds"],
            "eta_seconds": per_step * (total - step),
        }
        work = max(0.0, wall - self._waited) / steps
        self._recorded_at, self._recorded = now, step
        self._waited = self._tokens = self._samples = 0.0
        return metrics, work


class Speedometer:
    """A step's shares from its counts and the figures of all ranks; all ranks make and call it together."""

    # MFU counts the FLOPs that the step needs (no padding, no recomputation) against the ranks' dense half-precision
    # peaks.

    def __init__(self, model: PreTrainedModel, estimate: RunEstimate, *, copies: int = 1) -> None:
        self.copies, self.peak = copies, estimate.peak
        counts = self.peak and estimate.picture is not None and hasattr(model.get_decoder(), "layers")
        self.counter = FlopCounter(model, picture=estimate.picture) if counts else None

    def of(self, result: StepResult, micro_batches: Sequence[Batch], own: Mapping[str, float]) -> dict[str, float]:
        """Metrics of one step; every rank calls it with its own micro-batches and `rank_figures`."""
        tokens = sum(batch.tokens for batch in micro_batches) / self.copies
        table = distributed.table_over_ranks([tokens, *own.values(), *self._seen(micro_batches)])
        loads, *columns = zip(*table, strict=True)
        figures = dict(zip(own, columns[: len(own)], strict=True))
        world = len(table)
        metrics = {"padding_share": 1.0 - result.tokens / max(1.0, world * max(loads))} | _spread(figures)
        pairs, images = (sum(column) / self.copies for column in columns[len(own) :])
        if self.counter is not None:
            needed = self.counter.count(
                StepShape(
                    tokens=result.tokens, supervised=result.supervised_tokens, images=images, pairs=pairs,
                    micro_batches=world * len(micro_batches) // self.copies,
                )
            )  # fmt: skip
            metrics["mfu"] = needed.total / (max(1e-9, *figures["step_seconds"]) * self.peak)
        return metrics

    def _seen(self, micro_batches: Sequence[Batch]) -> tuple[float, float]:
        """Token pairs of a segment, and pictures; zero where neither is needed."""
        if self.counter is None:
            return 0.0, 0.0
        pairs = sum(length * (length + 1) / 2 for batch in micro_batches for length in batch.segment_lengths)
        return pairs, sum(map(self.counter.picture.count, micro_batches))


def _spread(figures: dict[str, tuple[float, ...]]) -> dict[str, float]:
    """The maximum over ranks; with several ranks also the minimum and the slowest rank."""
    metrics = {name: max(figures[name]) for name in ("step_seconds", "data_seconds", "memory_gib")}
    if any(figures["memory_reserved_gib"]):  # there is an accelerator
        metrics |= {
            "memory_reserved_gib": max(figures["memory_reserved_gib"]),
            "allocator_retries": sum(figures["allocator_retries"]),
        }
    if len(figures["work_seconds"]) > 1:
        metrics |= {f"{name}_min": min(figures[name]) for name in metrics if name != "allocator_retries"}
        work = figures["work_seconds"]
        metrics |= {"work_seconds": max(work), "work_seconds_min": min(work), "slowest_rank": work.index(max(work))}
    return metrics
