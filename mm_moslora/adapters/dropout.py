"""Dropout with masks that are drawn again from a seed instead of being kept.

A mask is a tensor of integers as wide as the entries that it is for: all bits set where an entry stays, none where
it is dropped. Applying it is one bitwise `and`, a fraction of what comparing and multiplying cost on a CPU. There,
masks come in blocks of rows that stay near the core.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

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


def kept_bits(rows: Tensor, dropout: float, seed: int) -> Iterator[tuple[slice, Tensor]]:
    """The mask for `rows`, block by block; the same for the same seed (on the same kind of device).

    Args:
        rows: ``[T, D]``; gives shape, width of an entry and device.
        dropout: probability of dropping an entry, a multiple of 2^-15 (`exact_rate`).
        seed: from `draw_seed`.

    Yields:
        Which rows, and for them integers ``[rows, D]``: -1 (all bits set) or 0.
    """
    count, width = rows.shape
    integers = _INTEGERS[rows.element_size()]
    if rows.device.type == "meta":  # costs are counted there; nothing is drawn
        yield slice(0, count), torch.empty_like(rows, dtype=integers)
        return
    words = _random_words(rows.device, seed)
    # A multiple of four rows uses whole words of 64 bits.
    height = max(4, _BLOCK // width // 4 * 4) if rows.device.type == "cpu" else max(1, count)
    for start in range(0, count, height):
        block = slice(start, min(start + height, count))
        entries = (block.stop - start) * width
        lanes = words(-(-entries // 4)).view(torch.int16)[:entries]
        # With the sign bit set, subtracting the threshold leaves the sign where the other 15 bits reach it; shifting
        # then spreads the sign over the entry.
        lanes.bitwise_or_(-_STEPS).sub_(round(dropout * _STEPS)).bitwise_right_shift_(15)
        yield block, lanes.view(-1, width).to(integers)


def keep(rows: Tensor, bits: Tensor | None) -> Tensor:
    """`rows` with zeros where the mask drops an entry, as a new tensor; `rows` itself without a mask.

    Args:
        rows: ``[T, D]``.
        bits: from `kept_bits`.
    """
    return rows if bits is None else (rows.view(bits.dtype) & bits).view(rows.dtype)


def keep_(rows: Tensor, bits: Tensor | None) -> Tensor:
    """`keep` in place."""
    if bits is not None:
        rows.view(bits.dtype).bitwise_and_(bits)
    return rows


def _random_words(device: torch.device, seed: int) -> Callable[[int], Tensor]:
    """Draws int64 ``[count]`` at every call, all 64 bits random."""
    if device.type == "cpu":  # numpy's generator takes half the time of torch's
        numpy = np.random.Generator(np.random.SFC64(seed))
        return lambda count: torch.from_numpy(numpy.integers(-(2**63), 2**63, count, dtype=np.int64))
    generator = torch.Generator(device).manual_seed(seed)
    return lambda count: torch.empty(count, dtype=torch.int64, device=device).random_(
        -(2**63), None, generator=generator
    )
