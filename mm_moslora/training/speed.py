"""How well a step used the devices: model FLOPs utilisation, and tokens lost to waiting for the rank with the most."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

import torch
from transformers import PreTrainedModel

from mm_moslora import distributed
from mm_moslora.batch import Batch
from mm_moslora.gpus import device_peak
from mm_moslora.training.engine import StepResult
from mm_moslora.training.flops import FlopCounter, Flops, StepShape
from mm_moslora.training.sight import Sight


class Speedometer:
    """Turns a step's counts into shares.

    MFU counts the FLOPs that the step needs (about 4 N per token with a frozen base; no padding, no recomputation) and
    divides by the dense half-precision peak. On a device whose peak is not known, a CPU among them, there is none.

    Args:
        model: with whatever trains set.
        device_name: as the driver gives it; None asks torch.
    """

    def __init__(self, model: PreTrainedModel, *, device_name: str | None = None) -> None:
        if device_name is None:
            device_name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
        self.peak = device_peak(device_name)
        known = self.peak is not None and hasattr(model.get_decoder(), "layers")
        self.counter = FlopCounter(model) if known else None

    def of(self, result: StepResult, micro_batches: Sequence[Batch], seconds: float) -> dict[str, float]:
        """Metrics of one step; every rank calls it.

        Args:
            result: of the step, over all ranks.
            micro_batches: this rank's; its segment lengths stand for those of all.
            seconds: of the step.
        """
        world = distributed.world_size()
        loads = [0.0] * world
        loads[distributed.rank()] = float(sum(batch.tokens for batch in micro_batches))
        most = max(distributed.sum_over_ranks(loads))
        metrics = {"padding_share": 1.0 - result.tokens / max(1.0, world * most)}
        needed = self.needs(result, micro_batches)
        if needed is not None and self.peak is not None:
            metrics["mfu"] = needed.total / (max(seconds, 1e-9) * world * self.peak)
        return metrics

    def needs(self, result: StepResult, micro_batches: Sequence[Batch]) -> Flops | None:
        """FLOPs that a step needs over all ranks, each with its own pictures; every rank calls it.

        Returns:
            None on a device whose peak is not known.
        """
        if self.counter is None:
            return None
        pairs = sum(length * (length + 1) / 2 for batch in micro_batches for length in batch.segment_lengths)
        shape = self.counter.shape
        seen = Sight() if shape is None else sum((shape.of_batch(batch) for batch in micro_batches), Sight())
        names, own = zip(*asdict(seen).items(), strict=True)
        pairs, *over_all = distributed.sum_over_ranks([pairs, *own])
        return self.counter.count(
            StepShape(
                tokens=result.tokens, supervised=result.supervised_tokens, images=result.images, pairs=pairs,
                sight=Sight(**dict(zip(names, over_all, strict=True))),
                micro_batches=distributed.world_size() * len(micro_batches),
            )
        )  # fmt: skip
