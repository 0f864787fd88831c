"""Sampling the next tokens of a batch of answers.

Shapes: ``B`` answers, ``R`` those with a temperature, ``C`` vocabulary.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, TopKLogitsWarper, TopPLogitsWarper

from mm_moslora.models.decoding.prefix_cache import logits_error
from mm_moslora.utils.errors import ModelError

_NO_IDS: Any = None
"""Tokens so far, which the warpers do not read."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Sampling settings; the defaults are greedy."""

    max_tokens: int = 256
    temperature: float = 0.0
    """0 takes the most likely token."""
    top_p: float = 1.0
    """Nucleus sampling: the smallest set of tokens with this total probability."""
    top_k: int = 0
    """Only so many of the likeliest tokens; 0: all."""
    presence_penalty: float = 0.0
    """Subtracted from the logit of a token that has occurred."""
    frequency_penalty: float = 0.0
    """Subtracted from the logit of a token once per occurrence."""
    seed: int | None = None
    """The same seed gives the same answer, whatever else is in the batch."""


@dataclass(kw_only=True, eq=False)
class Draw:
    """What the next token of one answer depends on, besides its logits."""

    sampling: Sampling
    choice: int = 0
    """Index of the answer in its request; answers to one request have different seeds."""
    occurrences: Counter[int] = field(default_factory=Counter)
    """Occurrences of each token so far."""

    def __post_init__(self) -> None:
        self.generator = torch.Generator()
        if self.sampling.seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed((self.sampling.seed + self.choice) % 2**63)


def choose(logits: Tensor, draws: Sequence[Draw]) -> list[int | ModelError]:
    """Sample the next token of every answer, or give the error of its logits; the host waits for the device once.

    A row's token depends on no other row: it is what `torch.multinomial` draws with the row's generator on the CPU.
    """
    logits = _penalised(logits, draws)
    tokens = logits.argmax(dim=-1)  # of NaN, where there is one
    highest = logits.gather(-1, tokens[:, None])
    rows = [number for number, draw in enumerate(draws) if draw.sampling.temperature]
    if rows:
        chosen = _on(logits, rows)
        # Subtracting the maximum first keeps the smallest temperature from overflowing.
        drawn = _drawn(logits[chosen] - highest[chosen], [draws[number] for number in rows])
        tokens = tokens.index_copy(0, chosen, drawn)
    numbers, values = torch.stack((tokens.double(), highest.flatten().double())).tolist()
    return [
        int(number) if math.isfinite(value) else logits_error(value)
        for number, value in zip(numbers, values, strict=True)
    ]


def _on(like: Tensor, values: Sequence[float], dtype: torch.dtype = torch.int64) -> Tensor:
    """Numbers on the device of another tensor, without waiting for it."""
    return torch.tensor(values, dtype=dtype).to(like.device, non_blocking=True)


def _penalised(logits: Tensor, draws: Sequence[Draw]) -> Tensor:
    """Logits ``[B, C]`` without the penalties for tokens that have occurred."""
    rows: list[int] = []
    tokens: list[int] = []
    amounts: list[Tensor] = []
    for number, draw in enumerate(draws):
        sampling = draw.sampling
        if draw.occurrences and (sampling.presence_penalty or sampling.frequency_penalty):
            counts = torch.tensor(list(draw.occurrences.values()), dtype=logits.dtype)
            rows += [number] * len(counts)
            tokens += draw.occurrences
            amounts.append(-(sampling.presence_penalty + sampling.frequency_penalty * counts))
    if not rows:
        return logits
    changes = torch.cat(amounts).to(logits.device, non_blocking=True)
    return logits.index_put((_on(logits, rows), _on(logits, tokens)), changes, accumulate=True)


def _drawn(distances: Tensor, draws: Sequence[Draw]) -> Tensor:
    """Tokens ``[R]`` drawn by logits ``[R, C]`` whose maximum is zero."""
    temperatures = _on(distances, [draw.sampling.temperature for draw in draws], torch.float64)
    scores = distances.double() / temperatures[:, None]
    for number, draw in enumerate(draws):
        warpers: list[LogitsProcessor] = []
        if draw.sampling.top_k:
            warpers.append(TopKLogitsWarper(draw.sampling.top_k))
        if draw.sampling.top_p < 1:
            warpers.append(TopPLogitsWarper(draw.sampling.top_p))
        if warpers:
            row = LogitsProcessorList(warpers)(_NO_IDS, scores[number : number + 1])
            scores = scores.index_copy(0, _on(distances, [number]), row)
    probabilities = scores.softmax(dim=-1)
    # What torch.multinomial does, with a generator for each row: the largest of probabilities over exponential noise.
    noise = torch.empty(distances.shape, dtype=torch.float64, pin_memory=distances.is_cuda)
    for row, draw in zip(noise, draws, strict=True):
        row.exponential_(generator=draw.generator)
    return (probabilities / noise.to(distances.device, non_blocking=True)).argmax(dim=-1)
