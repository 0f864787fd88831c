"""How well a step used the devices: model FLOPs utilisation, and tokens lost to waiting for the rank with the most."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from mm_moslora import distributed
from mm_moslora.batch import Batch
from mm_moslora.gpus import device_peak
from mm_moslora.training.engine import StepResult
from mm_moslora.training.flops import FlopCounter, StepShape


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
        world, own = distributed.world_size(), sum(batch.tokens for batch in micro_batches)
        loads = [0.0] * world
        loads[distributed.rank()] = float(own)
        most = max(distributed.sum_over_ranks(loads))
        metrics = {"padding_share": 1.0 - result.tokens / max(1.0, world * most)}
        if self.counter is not None and self.peak is not None:
            pairs = sum(length * (length + 1) / 2 for batch in micro_batches for length in batch.segment_lengths)
            shape = StepShape(
                tokens=result.tokens, supervised=result.supervised_tokens, images=result.images,
                pairs=pairs * result.tokens / max(1, own), micro_batches=world * len(micro_batches),
            )  # fmt: skip
            metrics["mfu"] = self.counter.count(shape).total / (max(seconds, 1e-9) * world * self.peak)
        return metrics
