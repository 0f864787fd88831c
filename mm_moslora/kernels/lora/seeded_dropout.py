"""Dropout with masks that are drawn again from a seed instead of being kept.

A mask is a tensor of integers as wide as the entries that it is for: all bits set where an entry stays, none where
it is dropped. Applying it is one bitwise `and`, a fraction of what comparing and multiplying cost on a CPU. There,
masks come in blocks of rows that stay near the core.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
"""By the bytes of an entry."""
_STEPS = 2**15
"""Random numbers that decide an entry: 15 bits of its own."""
_BLOCK = 2**19
"""Entries of a block on a CPU."""


def exact_rate(dropout: float) -> float:
    """The dropout probability that `kept_bits` can draw: a multiple of 2^-15 below 1."""
    return min(round(dropout * _STEPS), _STEPS - 1) / _STEPS


def draw_seed() -> int:
    """A seed for `kept_bits`, from torch's CPU generator, so that checkpointing repeats it."""
    return int(torch.randint(2**62, (), device="cpu"))


def seeded_dropout(x: Tensor, dropout: float) -> Tensor:
    """Dropout of x with the mask that the fused kernel would draw: a layer drops the same entries on either path.

    Args:
        x: ``[..., D]``.
        dropout: probability of dropping an entry.
    """
    dropout = exact_rate(dropout)
    if not dropout or not x.numel():
        return x
    rows = x.reshape(-1, x.shape[-1])
    kept = torch.cat([bits.bitwise_and_(1).to(x.dtype) for _, bits in kept_bits(rows, dropout, draw_seed())])
    return (rows * kept).view_as(x) / (1.0 - dropout)


@dataclass(frozen=True, kw_only=True)
class Mask:
    """What draws the mask of one layer's input."""

    rate: float
    """Probability of dropping an entry, a multiple of 2^-15 (`exact_rate`)."""
    seed: int
    """From `draw_seed`."""


@dataclass(frozen=True)
class KeptBits:
    """Which entries of some rows stay."""

    bits: Tensor | None
    """From `kept_bits`, or a part of such a mask; None: all stays."""

    def keep(self, rows: Tensor) -> Tensor:
        """`rows` ``[T, D]`` with zeros where entries are dropped: a new tensor, or `rows` itself if all stays."""
        return rows if self.bits is None else (rows.view(self.bits.dtype) & self.bits).view(rows.dtype)

    def keep_(self, rows: Tensor) -> Tensor:
        """`keep` in place; `rows` are contiguous."""
        if self.bits is not None:
            rows.view(self.bits.dtype).bitwise_and_(self.bits)
        return rows

    def add(self, total: Tensor, rows: Tensor) -> None:
        """Add to `total` what stays of `rows`, which may change; both ``[T, D]`` and contiguous."""
        total.add_(self.keep_(rows))


_EVERYTHING = KeptBits(None)


def kept_blocks(rows: Tensor, masks: Mapping[int, Mask | None]) -> Iterator[tuple[int, slice, KeptBits]]:
    """The masks of several layers for the same rows: block by block, and within a block layer by layer.

    Args:
        rows: ``[T, D]``.
        masks: by the layer's place; None: everything stays.

    Yields:
        Which layer, which rows, and which of their entries stay.
    """
    sources = {place: kept_bits(rows, mask.rate, mask.seed) for place, mask in masks.items() if mask is not None}
    for block in _blocks(rows):
        for place in masks:  # one mask at a time: they are as large as the rows
            yield place, block, KeptBits(next(sources[place])[1]) if place in sources else _EVERYTHING


def kept_bits(rows: Tensor, dropout: float, seed: int) -> Iterator[tuple[slice, Tensor]]:
    """The mask for `rows`, block by block; the same for the same seed (on the same kind of device).

    Args:
        rows: ``[T, D]``; gives shape, width of an entry and device.
        dropout: probability of dropping an entry, a multiple of 2^-15 (`exact_rate`).
        seed: from `draw_seed`.

    Yields:
        Which rows, and for them integers ``[rows, D]``: -1 (all bits set) or 0.
    """
    width, integers = rows.shape[1], _INTEGERS[rows.element_size()]
    if rows.device.type == "meta":  # costs are counted there; nothing is drawn
        yield slice(0, rows.shape[0]), torch.empty_like(rows, dtype=integers)
        return
    words = _random_words(rows.device, seed)
    for block in _blocks(rows):
        # Nothing of that size stays here while other masks are drawn.
        yield block, _lanes(words, (block.stop - block.start) * width, dropout).view(-1, width).to(integers)


def _lanes(words: Callable[[int], Tensor], entries: int, dropout: float) -> Tensor:
    """The next mask, int16 ``[entries]``."""
    lanes = words(-(-entries // 4)).view(torch.int16)[:entries]
    # With the sign bit set, subtracting the threshold leaves the sign where the other 15 bits reach it; shifting then
    # spreads the sign over the entry.
    return lanes.bitwise_or_(-_STEPS).sub_(_threshold(dropout)).bitwise_right_shift_(15)


def _threshold(dropout: float) -> int:
    """How many of the random numbers drop an entry."""
    return round(dropout * _STEPS)


def _blocks(rows: Tensor) -> Iterator[slice]:
    """Rows that are masked together; those of a CPU are a multiple of four, which uses whole words of 64 bits."""
    count, width = rows.shape
    height = max(4, _BLOCK // width // 4 * 4) if rows.device.type == "cpu" else max(1, count)
    return (slice(start, min(start + height, count)) for start in range(0, count, height))


def _random_words(device: torch.device, seed: int) -> Callable[[int], Tensor]:
    """Draws int64 ``[count]`` at every call, all 64 bits random."""
    if device.type == "cpu":  # numpy's generator takes half the time of torch's
        numpy = np.random.Generator(np.random.SFC64(seed))
        return lambda count: torch.from_numpy(numpy.integers(-(2**63), 2**63, count, dtype=np.int64))
    generator = torch.Generator(device).manual_seed(seed)
    return lambda count: torch.empty(count, dtype=torch.int64, device=device).random_(
        -(2**63), None, generator=generator
    )
