"""Shapes, batches and the clock of the GPU benchmark (`gpu.py`)."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from llava_models import Shape, examples, visual_tokens

from mm_moslora.batch import Example

T = TypeVar("T")
WITH_IMAGE = 0.939
"""Share of conversations with an image in LLaVA's 665k mix; the others are texts."""
SUPERVISED = 0.45
"""Share of the text that is supervised; assumed."""
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


@dataclass(frozen=True, kw_only=True)
class GpuShape(Shape):
    """Sizes of a model and of its batches."""

    conversations: int = 50
    """Of the three rotating batches together."""
    longest: int = 2048
    """Tokens of a conversation."""
    text_scale: float = 1.0
    """Factor on the lengths of LLaVA's texts."""
    new_tokens: int = 128
    """Decoded tokens per prompt."""


SHAPES = {
    "llava-1.5-7b": GpuShape(width=4096, inner=11008, layers=32, heads=32, kv_heads=32, vocabulary=32_000),
    "3b": GpuShape(width=3072, inner=8192, layers=28, heads=24, kv_heads=8, vocabulary=128_256),
    "1b": GpuShape(width=2048, inner=8192, layers=16, heads=32, kv_heads=8, vocabulary=128_256),
    "tiny": GpuShape(
        width=64, inner=160, layers=2, heads=4, kv_heads=2, vocabulary=300, vision=(32, 64, 2, 2), pixels=28, rank=8,
        conversations=6, longest=64, text_scale=0.06, new_tokens=4,
    ),
}  # fmt: skip
"""3b and 1b have the language models of Llama 3.2, and `tiny` is for CPUs."""


def lengths_of(shape: GpuShape) -> list[list[int]]:
    """Tokens of the conversations of three batches of about equal sums, each with conversations of similar lengths.

    Texts are log-normal like those of LLaVA's 665k mix (mean 297 tokens). Grouping by length is LLaVA's order, so
    padded rows waste little.
    """
    rng = random.Random(0)
    lengths = []
    for _ in range(shape.conversations):
        text = max(8, round(min(1472, rng.lognormvariate(5.45, 0.7)) * shape.text_scale))
        image = shape.image_tokens if rng.random() < WITH_IMAGE else 0
        lengths.append(min(shape.longest, text + image))
    lengths.sort()
    batches: list[list[int]] = [[], [], []]
    reached, whole = 0, sum(lengths)
    for length in lengths:
        batches[min(2, 3 * reached // whole)].append(length)
        reached += length
    return batches


def conversations_of(shape: GpuShape, lengths: Sequence[int], *, seed: int) -> list[Example]:
    """Conversations of these lengths, of whose text a share is supervised."""
    texts = [length - visual_tokens(shape, length) for length in lengths]
    return examples(shape, lengths, [max(1, round(text * SUPERVISED)) for text in texts], seed=seed)


def batches_of(shape: GpuShape) -> tuple[list[list[Example]], list[Example]]:
    """The three rotating batches, and a full one: eight conversations of the longest length."""
    rotating = [conversations_of(shape, lengths, seed=seed) for seed, lengths in enumerate(lengths_of(shape))]
    return rotating, conversations_of(shape, [shape.longest] * 8, seed=3)


def split(items: Sequence[Example], parts: int) -> list[list[Example]]:
    """The conversations in parts of similar sums of tokens; fewer parts where there are fewer conversations."""
    groups: list[list[Example]] = [[] for _ in range(min(parts, len(items)))]
    for item in sorted(items, key=lambda item: -item.length):
        min(groups, key=lambda group: sum(item.length for item in group)).append(item)
    return groups
