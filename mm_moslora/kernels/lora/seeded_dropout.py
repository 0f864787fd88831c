"""Dropout with masks that are drawn again from a seed instead of being kept.

A mask is a tensor of integers as wide as the entries: all bits are set where an entry stays. Applying it is one bitwise
`and`, a fraction of a comparison and a product on a CPU, where masks come in blocks of rows that fit into the cache. On
a GPU the kernels of `triton_dropout` draw masks of their own in registers.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from mm_moslora.kernels.triton_availability import interpreted, why_not_triton

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Integer dtype, by the bytes of an entry."""
_STEPS = 2**15
"""Possible random numbers of an entry: it has 15 bits."""
_BLOCK = 2**19
"""Entries of a block on a CPU."""


_kernels: Literal["auto", "torch"] = "auto"


def set_dropout_kernels(kernels: Literal["auto", "torch"]) -> None:
    """Choose what draws the masks on a GPU, in this process; not between a forward pass and its backward pass."""
    global _kernels
    _kernels = kernels


def triton_kernels(rows: Tensor) -> Any | None:
    """The module `triton_dropout`, where its kernels draw the masks for `rows`; None elsewhere."""
    at_hand = rows.is_cuda or (rows.device.type == "cpu" and interpreted())
    return (
        _triton_module(rows.device, rows.dtype) if _kernels == "auto" and at_hand and rows.element_size() < 8 else None
    )


@cache
def _triton_module(device: torch.device, dtype: torch.dtype) -> Any | None:
    if why_not_triton(device, dtype) is not None:
        return None
    return importlib.import_module("mm_moslora.kernels.lora.triton_dropout")


def exact_rate(dropout: float) -> float:
    """The dropout probability that `kept_bits` can draw: a multiple of 2^-15 below 1."""
    # Layers scale by the exact rate, so that the mean of the output has no bias.
    return min(round(dropout * _STEPS), _STEPS - 1) / _STEPS


def draw_seed() -> int:
    """A seed for `kept_bits`, from torch's CPU generator, so that checkpointing repeats it."""
    return int(torch.randint(2**62, (), device="cpu"))


def seeded_dropout(x: Tensor, dropout: float) -> Tensor:
    """Dropout of x with the mask that the fused kernel draws: a layer drops the same entries on either path."""
    dropout = exact_rate(dropout)
    if not dropout or not x.numel():
        return x
    rows, mask = x.reshape(-1, x.shape[-1]), Mask(rate=dropout, seed=draw_seed())
    kept = torch.cat([ones for _, _, ones in kept_rows(torch.ones_like(rows), {0: mask})])
    return (rows * kept).view_as(x) / (1.0 - dropout)


@dataclass(frozen=True, kw_only=True)
class Mask:
    """The dropout mask of one layer's input, as a rate and a seed."""

    rate: float
    """Probability of dropping an entry, a multiple of 2^-15 (`exact_rate`)."""
    seed: int
    """From `draw_seed`."""


def kernel_masks(masks: Mapping[int, Mask | None]) -> list[tuple[int, int]]:
    """Masks as the kernels of `triton_dropout` take them; one that drops nothing for None."""
    return [(0, 0) if mask is None else (mask.seed, round(mask.rate * _STEPS)) for mask in masks.values()]


def kept_rows(rows: Tensor, masks: Mapping[int, Mask | None]) -> Iterator[tuple[int, slice, Tensor]]:
    """The layer, the rows and their copy with zeros, where the masks of several layers drop entries."""
    if (kernels := triton_kernels(rows)) is not None:
        copies = kernels.kept_copies(rows, kernel_masks(masks))
        yield from ((index, slice(0, rows.shape[0]), copy) for index, copy in zip(masks, copies, strict=True))
        return
    for index, block, kept in kept_blocks(rows, masks):
        yield index, block, kept.keep(rows[block])


@dataclass(frozen=True)
class KeptBits:
    """The entries of some rows that stay."""

    bits: Tensor | None
    """From `kept_bits`, or a part of such a mask; None: all stay."""

    def keep(self, rows: Tensor) -> Tensor:
        """`rows` ``[T, D]`` with zeros where entries are dropped: a new tensor, or `rows` itself if all stay."""
        return rows if self.bits is None else (rows.view(self.bits.dtype) & self.bits).view(rows.dtype)

    def keep_(self, rows: Tensor) -> Tensor:
        """`keep` in place; `rows` are contiguous."""
        if self.bits is not None:
            rows.view(self.bits.dtype).bitwise_and_(self.bits)
        return rows


_EVERYTHING = KeptBits(None)


def kept_blocks(rows: Tensor, masks: Mapping[int, Mask | None]) -> Iterator[tuple[int, slice, KeptBits]]:
    """The layer, the rows and what its mask keeps of them, for several layers: by blocks, and in a block by layers."""
    sources = {index: kept_bits(rows, mask.rate, mask.seed) for index, mask in masks.items() if mask is not None}
    for block in _blocks(rows):
        for index in masks:  # one mask at a time: they are as large as the rows
            yield index, block, KeptBits(next(sources[index])[1]) if index in sources else _EVERYTHING


def kept_bits(rows: Tensor, dropout: float, seed: int) -> Iterator[tuple[slice, Tensor]]:
    """The mask for `rows` ``[T, D]``, block by block: integers, all bits set or none; the same for the same seed."""
    width, integers = rows.shape[1], _INTEGERS[rows.element_size()]
    if rows.device.type == "meta":  # a plan counts costs there
        yield slice(0, rows.shape[0]), torch.empty_like(rows, dtype=integers)
        return
    words = _random_words(rows.device, seed)
    for block in _blocks(rows):
        # No variable holds the mask while others are drawn: masks are as large as the rows.
        yield block, _lanes(words, (block.stop - block.start) * width, dropout).view(-1, width).to(integers)


def _lanes(words: Callable[[int], Tensor], entries: int, dropout: float) -> Tensor:
    """The next mask, int16 ``[entries]``."""
    lanes = words(-(-entries // 4)).view(torch.int16)[:entries]
    # The sign bit is set first. Subtracting the threshold keeps it where the other 15 bits are at least the threshold,
    # and the shift copies it to all bits of the entry.
    return lanes.bitwise_or_(-_STEPS).sub_(round(dropout * _STEPS)).bitwise_right_shift_(15)


def _blocks(rows: Tensor) -> Iterator[slice]:
    """Blocks of rows; on a CPU their height is a multiple of four, which uses whole words of 64 bits."""
    count, width = rows.shape
    height = max(4, _BLOCK // width // 4 * 4) if rows.device.type == "cpu" else max(1, count)
    return (slice(start, min(start + height, count)) for start in range(0, count, height))


def _random_words(device: torch.device, seed: int) -> Callable[[int], Tensor]:
    """A function that draws int64 ``[count]`` at every call, all 64 bits random."""
    if device.type == "cpu":  # numpy's generator takes half of torch's time
        numpy = np.random.Generator(np.random.SFC64(seed))
        return lambda count: torch.from_numpy(numpy.integers(-(2**63), 2**63, count, dtype=np.int64))
    generator = torch.Generator(device).manual_seed(seed)
    return lambda count: torch.empty(count, dtype=torch.int64, device=device).random_(
        -(2**63), None, generator=generator
    )
