"""Attention within the segments of a row on a CPU, by matrix products or by PyTorch's kernel."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from mm_moslora.kernels.attention import matmul_attention
from mm_moslora.kernels.attention.matmul_attention import (
    SHORT,
    attend,
    attend_backward,
    attend_by_kernel,
    attend_by_kernel_backward,
    keeps_probabilities,
)


def attend_on_cpu(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float | None,
    lengths: tuple[int, ...],
    *,
    causal: bool,
) -> Tensor:
    """Attention within each segment; ``[1, S, H, E]`` from ``[1, H, S, E]``."""
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    learns = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (query, key, value))
    return _CpuSegments.apply(query, key, value, scale, lengths, causal, learns)  # type: ignore[no-any-return]


class _CpuSegments(torch.autograd.Function):
    """Attention of every segment, by matrix products or by PyTorch's kernel (`products_are_faster`)."""

    # Kept for the backward pass: q, k, v; by products P where `keeps_probabilities` holds, by the kernel its output and
    # the statistics of its softmax. On the meta device products run and keep what the kernel keeps, as a GPU would.

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
        lengths: tuple[int, ...],
        causal: bool,
        learns: bool,
    ) -> Tensor:
        _, heads, tokens, width = query.shape
        output = query.new_empty(1, tokens, heads, width)
        saved: list[Tensor] = []
        keeps_output = query.is_meta
        with torch.autocast("cpu", enabled=False):  # autocast would round the scores
            for (q, k, v), (o,) in _segments(lengths, (query, key, value), (output.transpose(1, 2),), causal=causal):
                if not matmul_attention.products_are_faster(q):
                    keeps_output = True
                    saved.append(attend_by_kernel(q, k, v, scale, out=o, causal=causal))
                else:
                    keep = saved if learns and keeps_probabilities(q) else None
                    attend(q, k, v, scale, out=o, causal=causal, keep=keep)
        ctx.scale, ctx.lengths, ctx.causal = scale, lengths, causal
        if query.is_meta:
            saved = [query.new_empty(heads, tokens, dtype=torch.float32)]
        ctx.save_for_backward(query, key, value, output if keeps_output else None, *saved)
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, output, *saved = ctx.saved_tensors
        tensors, remaining = (query, key, value), iter(saved)
        gradients = [
            torch.empty_like(tensor.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)
            for tensor in tensors
        ]
        outputs = grad if output is None else output
        rows = (grad.transpose(1, 2), outputs.transpose(1, 2), *tensors)
        with torch.autocast("cpu", enabled=False):
            for (pull, o, q, k, v), grads in _segments(ctx.lengths, rows, gradients, causal=ctx.causal):
                out = (grads[0], grads[1], grads[2])
                if not matmul_attention.products_are_faster(q):
                    attend_by_kernel_backward(pull, q, k, v, o, next(remaining), ctx.scale, out=out, causal=ctx.causal)
                else:
                    probabilities = remaining if keeps_probabilities(q) and not q.is_meta else None
                    attend_backward(pull, q, k, v, ctx.scale, out=out, causal=ctx.causal, probabilities=probabilities)
        return (*gradients, None, None, None, None)


@dataclass(frozen=True, kw_only=True)
class _PaddedSegments:
    """Segments of about the same length, padded at their ends to the longest one's, ``L``."""

    # Causal attention needs no mask then: no token sees the padding, and the gradients of the padding are zero.

    longest: int
    positions: Tensor
    """Positions of their tokens in the row, and any position for padding, ``[G * L]``."""
    tokens: Tensor
    """Indices of `positions` with a token."""
    padding: Tensor
    """The other indices."""

    @classmethod
    def of(cls, segments: Sequence[range]) -> _PaddedSegments:
        """Segments, as ranges of the row."""
        longest = max(map(len, segments))
        positions = [position for segment in segments for position in (*segment, *[-1] * (longest - len(segment)))]
        padded = torch.tensor(positions, device="cpu")
        return cls(
            longest=longest, positions=padded.clamp(0), tokens=(padded >= 0).nonzero()[:, 0],
            padding=(padded < 0).nonzero()[:, 0],
        )  # fmt: skip

    def gather(self, row: Tensor) -> Tensor:
        """The segments' heads one below the other, ``[G * H, L, E]`` of ``[1, H, S, E]``."""
        rows = row[0].transpose(0, 1).index_select(0, self.positions).index_fill_(0, self.padding, 0.0)
        return rows.unflatten(0, (-1, self.longest)).transpose(1, 2).flatten(0, 1)

    def scatter(self, heads: Tensor, row: Tensor) -> None:
        """Write what `gather` would give into the row."""
        rows = heads.unflatten(0, (-1, row.shape[1])).transpose(1, 2).flatten(0, 1).index_select(0, self.tokens)
        row[0].transpose(0, 1).index_copy_(0, self.positions[self.tokens], rows)


ALIKE = 1.25
"""Causal segments go together if the longest has at most this many times the tokens of the shortest.

The padding makes a segment compute at most 1.25^2 = 1.6 times its scores."""
MOST_TOKENS = 4096
"""Most tokens of segments that go together, padding included: their copies take memory, and more are no faster."""


def _ends(lengths: tuple[int, ...]) -> Iterable[tuple[int, int]]:
    """Start and end of every segment."""
    return itertools.pairwise([0, *accumulate(lengths)])


@functools.lru_cache(maxsize=16)
def _parts(lengths: tuple[int, ...], *, causal: bool) -> tuple[slice | _PaddedSegments, ...]:
    """The row in parts that are computed at once: a long segment alone, short ones of about one length together."""
    segments = sorted((range(*pair) for pair in _ends(lengths)), key=len)
    groups: list[list[range]] = []
    for segment in segments:
        alike = groups and len(segment) <= SHORT and len(segment) <= len(groups[-1][0]) * (ALIKE if causal else 1)
        if alike and (1 + len(groups[-1])) * len(segment) <= MOST_TOKENS:
            groups[-1].append(segment)
        else:
            groups.append([segment])
    return tuple(
        _PaddedSegments.of(group) if len(group) > 1 else slice(group[0].start, group[0].stop) for group in groups
    )


def _segments(
    lengths: tuple[int, ...], read: Sequence[Tensor], written: Sequence[Tensor], *, causal: bool
) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """The parts ``[heads, T, E]`` of rows ``[1, H, S, E]``; what is put into those of `written` goes into the rows."""
    alone = read[0].is_meta
    for part in (slice(*pair) for pair in _ends(lengths)) if alone else _parts(lengths, causal=causal):
        if isinstance(part, slice):
            yield [row[0][:, part] for row in read], [row[0][:, part] for row in written]
            continue
        heads = [
            row.new_empty(len(part.positions) // part.longest * row.shape[1], part.longest, row.shape[3])
            for row in written
        ]
        yield [part.gather(row) for row in read], heads
        for one, row in zip(heads, written, strict=True):
            part.scatter(one, row)
