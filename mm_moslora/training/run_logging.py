"""What a run logs: metrics and warnings of its steps, throughput over all ranks, its adapter, and its summary."""

from __future__ import annotations

import logging
import math
import socket
import time
from collections import deque
from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from mm_moslora.batch import Batch
from mm_moslora.models.trainable_parts import component_table
from mm_moslora.tracking import Trackers
from mm_moslora.training.engine import StepResult
from mm_moslora.training.metrics.gpu_memory import RunEstimate
from mm_moslora.training.metrics.mixer_metrics import ADAPTERS, log_adapter
from mm_moslora.training.metrics.model_cost import FlopCounter, StepShape
from mm_moslora.training.run_setup import Run
from mm_moslora.training.supervision.run_faults import name_skipped, note_memory, peak_memory_gib, records_of_rank
from mm_moslora.utils import distributed

logger = logging.getLogger(__name__)
_SPIKE = 6.0
"""Standard deviations above the mean from which a loss counts as a spike."""
_WINDOW, _LEAST = 128, 16


class SpikeScore:
    """Standard deviations by which a loss exceeds the mean of the last 128 finite ones; 0 until there are 16."""

    def __init__(self) -> None:
        self._losses: deque[float] = deque(maxlen=_WINDOW)

    @property
    def count(self) -> int:
        """Number of earlier losses in the window."""
        return len(self._losses)

    def update(self, loss: float) -> float:
        """Score a loss, then add it to the window; a loss that is not finite scores infinity and is not added."""
        if not math.isfinite(loss):
            return math.inf
        score = 0.0
        if len(self._losses) >= _LEAST:
            mean = sum(self._losses) / len(self._losses)
            deviation = math.sqrt(sum((value - mean) ** 2 for value in self._losses) / len(self._losses))
            # Losses on a plateau hardly vary; a change of a thousandth of the mean is not a spike.
            score = (loss - mean) / max(deviation, 1e-3 * abs(mean), 1e-12)
        self._losses.append(loss)
        return score


class RunLog:
    """Logs one training session; all ranks call each method together."""

    def __init__(
        self, run: Run, trackers: Trackers, extra: dict[str, float], *, total_steps: int, steps_per_epoch: int
    ) -> None:
        """`extra` is logged with the next step."""
        self.run, self.trackers, self.total_steps, self.steps_per_epoch = run, trackers, total_steps, steps_per_epoch
        self.clock = Clock(run.counters, run.step)
        self.spikes = SpikeScore()
        self.speedometer = Speedometer(run.assembly.model, run.estimate, copies=run.engine.copies)
        self.extra = extra
        self._measured_at = -1

    def is_due(self, step: int) -> bool:
        """Whether the metrics of a step are logged."""
        return step % self.run.recipe.train.log_every == 0 or step == self.total_steps

    def step(
        self,
        result: StepResult,
        micro_batches: Sequence[Batch],
        *,
        lr_factor: float,
        seconds: float,
        data_seconds: float,
    ) -> None:
        """Warn of a spike and a skipped step, and log metrics where they are due; `seconds` are for data and step."""
        self.clock.count(result)
        note_memory(self.run.counters)
        spike = self.spikes.update(result.loss)
        self._warn(result, spike, [name for batch in micro_batches for name in batch.ids])
        step, recipe = self.run.step, self.run.recipe
        if self.is_due(step):
            pace, work_seconds = self.clock.record(step, self.total_steps)
            own = rank_figures(seconds=seconds, data_seconds=data_seconds, work_seconds=work_seconds)
            metrics = self._of_step(result, lr_factor) | {"loss_spike": spike}
            metrics |= pace | self.speedometer.of(result, micro_batches, own)
            self.trackers.log(metrics | self.extra, step)
            self.extra.clear()
        if recipe.track.mixers_every and step % recipe.track.mixers_every == 0:
            self.mixers(self.run.engine.trainable_state(only=ADAPTERS, keep=distributed.is_main()))

    def _warn(self, result: StepResult, spike: float, ids: Sequence[str]) -> None:
        step = self.run.step
        if result.applied:
            if spike > _SPIKE:
                logger.warning(
                    "Step %d: the loss %.4f is %.1f standard deviations above the last %d. %s",
                    step, result.loss, spike, self.spikes.count, records_of_rank(ids),
                )  # fmt: skip
        elif result.rescaling:
            logger.info("Step %d skipped: fp16's loss scale is now %g.", step, self.run.engine.loss_scale)
        else:
            name_skipped(step, result.loss, own_loss_is_finite=result.own_loss_is_finite, ids=ids)

    def _of_step(self, result: StepResult, lr_factor: float) -> dict[str, float]:
        engine = self.run.engine
        metrics = {
            "loss": result.loss,
            "token_accuracy": result.right_tokens / max(1, result.supervised_tokens),
            "grad_norm": result.grad_norm,
            "tokens": result.tokens,
            "supervised_tokens": result.supervised_tokens,
            "images": result.images,
            "epoch": self.run.step / self.steps_per_epoch,
            "skipped_steps": self.run.counters["skipped"],
        }
        metrics |= result.norms
        metrics |= {f"lr/{group.name}": group.peak_lr * lr_factor for group in engine.groups}
        if (store := engine.module.pictures.store) is not None:
            metrics["feature_cache_hits"] = store.counts.hit_share
        if engine.loss_scale != 1:
            metrics["loss_scale"] = engine.loss_scale
        return metrics

    def mixers(self, state: Mapping[str, Tensor]) -> None:
        """Log the adapter's measures, once for a step; `state`, full fp32 values by name, is needed on rank 0 only."""
        if self._measured_at != self.run.step:
            log_adapter(self.run.assembly.model, state, self.trackers, self.run.step)
        self._measured_at = self.run.step

    def final_mixers(self) -> None:
        """Write and log the adapter's measures at the end."""
        state = self.run.engine.trainable_state(only=ADAPTERS, keep=distributed.is_main())
        log_adapter(
            self.run.assembly.model, state, self.trackers, self.run.step, file=self.run.folder / "mixers.json",
            metrics=self._measured_at != self.run.step,
        )  # fmt: skip

    def metadata(self) -> dict[str, Any]:
        """Metadata of the run for trackers, besides its recipe."""
        hosts = set(distributed.gather_objects(socket.gethostname()))
        rows = component_table(self.run.assembly)
        return {
            "world_size": distributed.world_size(), "nodes": len(hosts), "precision": self.run.precision,
            "total_steps": self.total_steps, "parameters": sum(row.total for row in rows),
            "trainable_parameters": sum(row.trainable for row in rows),
            "components": {row.name: {"parameters": row.total, "trainable": row.trainable} for row in rows},
            "base": self.run.assembly.base,
        }  # fmt: skip

    def of_run(self) -> dict[str, Any]:
        """What the run's `summary.json` has beside the parts of all runs."""
        self.clock.tick()
        run, counters = self.run, self.run.counters
        data: dict[str, Any] = dict(run.training_set.statistics())
        if counters.get("tokens"):
            data["supervised_share"] = counters["supervised_tokens"] / counters["tokens"]
        if run.validation_set is not None:
            data["validation_records"] = len(run.validation_set)
        components = [vars(row) for row in component_table(run.assembly)]
        image = run.assembly.tokens_per_image
        return {"components": components, "tokens_per_image": image, "base": run.assembly.base, "data": data}


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
