"""Dropout of adapters as Triton kernels: masks are drawn in registers where they are applied, and are never stored.

Shapes: ``T`` tokens, ``D`` width of x, ``R`` rank; x ``[T, D]``, u ``[T, R]``, A ``[R, D]``.

An entry's random number is a function of the seed, its row and its column (Philox), so every kernel draws the same mask
from a seed, whatever its tiles are. One call of Philox gives eight numbers of 15 bits, for eight columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

MASKS_PER_KERNEL = 3
"""Masks that one kernel draws: query, key and value."""


def kept_copies(rows: Tensor, masks: Sequence[tuple[int, int]]) -> list[Tensor]:
    """A copy of `rows` per mask (its seed, and how many of 2^15 random numbers drop an entry), zeros where it drops."""
    rows = rows.contiguous()
    all_copies: list[Tensor] = []
    for some in _chunks(masks):
        copies = rows.new_empty(len(some), *rows.shape)
        grid = (triton.cdiv(rows.shape[0], 4), triton.cdiv(rows.shape[1], 512))
        with torch.cuda.device_of(rows):
            _keep[grid](
                rows, copies, rows.numel(), *rows.shape, *_filled(some), MASKS=len(some), ROWS=4, COLUMNS=512,
                num_warps=4,
            )  # fmt: skip
        all_copies += copies.unbind()
    return all_copies


def add_kept_products(
    total: Tensor, us: Sequence[Tensor], As: Sequence[Tensor], masks: Sequence[tuple[int, int]]
) -> None:
    """Add ``u A`` of every layer, with zeros where its mask drops entries, to `total`; rounded once."""
    assert total.is_contiguous()
    # Products in fp32 run on the cores that draw the masks, and need their registers.
    tokens, inner = (32, 32) if total.dtype == torch.float32 else (64, 64)
    for some in _chunks(list(zip(us, As, masks, strict=True))):
        u, A = _joined([one for one, _, _ in some], 1), _joined([one for _, one, _ in some], 0)
        ranks = [one.shape[1] for one, _, _ in some] + [0] * (MASKS_PER_KERNEL - len(some))
        grid = (triton.cdiv(total.shape[0], tokens), triton.cdiv(total.shape[1], 64))
        with torch.cuda.device_of(total):
            _add_kept[grid](
                total, u, A, u.shape[1], *total.shape, *_filled([mask for _, _, mask in some]), *ranks, MASKS=len(some),
                TOKENS=tokens, COLUMNS=64, RANKS=inner, num_warps=4, num_stages=2,
            )  # fmt: skip


def _chunks(items: Sequence[Any]) -> list[tuple[Any, ...]]:
    return [tuple(items[start : start + MASKS_PER_KERNEL]) for start in range(0, len(items), MASKS_PER_KERNEL)]


def _joined(parts: list[Tensor], dim: int) -> Tensor:
    return parts[0].contiguous() if len(parts) == 1 else torch.cat(parts, dim)


def _filled(masks: Sequence[tuple[int, int]]) -> list[int]:
    """The seeds, then the thresholds, of `MASKS_PER_KERNEL` masks."""
    filled = [*masks, *[(0, 0)] * (MASKS_PER_KERNEL - len(masks))]
    return [seed for seed, _ in filled] + [dropped for _, dropped in filled]


@triton.jit  # type: ignore[untyped-decorator]
def _kept(seed, dropped, row, group):  # type: ignore[no-untyped-def]
    """Which entries stay: ``[ROWS, 8 GROUPS]``, for rows ``[ROWS]`` and groups of eight columns ``[GROUPS]``."""
    # Philox passes the tests of BigCrush from 7 rounds on (Salmon et al., Parallel random numbers, table 2).
    zero = (row[:, None] + group[None, :]) * 0
    a, b, c, d = tl.philox(seed, zero + group[None, :], zero + row[:, None], zero, zero, 7)
    words = tl.join(tl.join(a, b), tl.join(c, d))
    numbers = tl.join(words & 0x7FFF, (words >> 16) & 0x7FFF).to(tl.int32)
    return tl.reshape(numbers, (row.shape[0], 8 * group.shape[0])) >= dropped


@triton.jit(do_not_specialize=["seed0", "seed1", "seed2"])  # type: ignore[untyped-decorator]
def _keep(  # type: ignore[no-untyped-def]
    x, copies, size, tokens, width, seed0, seed1, seed2, dropped0, dropped1, dropped2, MASKS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    group = tl.program_id(1) * (COLUMNS // 8) + tl.arange(0, COLUMNS // 8)
    inside = (row < tokens)[:, None] & (column < width)[None, :]
    offset = row.to(tl.int64)[:, None] * width + column[None, :]
    values = tl.load(x + offset, mask=inside, other=0.0)
    tl.store(copies + offset, tl.where(_kept(seed0, dropped0, row, group), values, 0.0), mask=inside)
    if MASKS > 1:
        copies += size
        tl.store(copies + offset, tl.where(_kept(seed1, dropped1, row, group), values, 0.0), mask=inside)
    if MASKS > 2:
        copies += size
        tl.store(copies + offset, tl.where(_kept(seed2, dropped2, row, group), values, 0.0), mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _kept_product(  # type: ignore[no-untyped-def]
    u, A, stride, tokens, width, seed, dropped, row, column, group, START: tl.constexpr, RANK: tl.constexpr,
    RANKS: tl.constexpr,
):  # fmt: skip
    """``u A`` of one layer, from its columns of u and rows of A on, with zeros where entries are dropped."""
    product = tl.zeros((row.shape[0], column.shape[0]), dtype=tl.float32)
    for first in range(0, RANK, RANKS):
        r = first + tl.arange(0, RANKS)
        inner = r < RANK
        left = tl.load(
            u + row.to(tl.int64)[:, None] * stride + (START + r)[None, :],
            mask=(row < tokens)[:, None] & inner[None, :], other=0.0,
        )  # fmt: skip
        right = tl.load(
            A + (START + r).to(tl.int64)[:, None] * width + column[None, :],
            mask=inner[:, None] & (column < width)[None, :], other=0.0,
        )  # fmt: skip
        product = tl.dot(left, right, product, input_precision="ieee")
    return tl.where(_kept(seed, dropped, row, group), product, 0.0)


@triton.jit(do_not_specialize=["seed0", "seed1", "seed2"])  # type: ignore[untyped-decorator]
def _add_kept(  # type: ignore[no-untyped-def]
    total, u, A, stride, tokens, width, seed0, seed1, seed2, dropped0, dropped1, dropped2, RANK0: tl.constexpr,
    RANK1: tl.constexpr, RANK2: tl.constexpr, MASKS: tl.constexpr, TOKENS: tl.constexpr, COLUMNS: tl.constexpr,
    RANKS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    group = tl.program_id(1) * (COLUMNS // 8) + tl.arange(0, COLUMNS // 8)
    product = _kept_product(u, A, stride, tokens, width, seed0, dropped0, row, column, group, 0, RANK0, RANKS)
    if MASKS > 1:
        product += _kept_product(u, A, stride, tokens, width, seed1, dropped1, row, column, group, RANK0, RANK1, RANKS)
    if MASKS > 2:
        product += _kept_product(
            u, A, stride, tokens, width, seed2, dropped2, row, column, group, RANK0 + RANK1, RANK2, RANKS
        )
    target = total + row.to(tl.int64)[:, None] * width + column[None, :]
    inside = (row < tokens)[:, None] & (column < width)[None, :]
    before = tl.load(target, mask=inside, other=0.0)
    tl.store(target, (before.to(tl.float32) + product).to(before.dtype), mask=inside)
