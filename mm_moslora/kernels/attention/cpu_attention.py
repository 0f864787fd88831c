"""Attention within the segments of a row on a CPU: as matrix products over blocks of queries, or by PyTorch's kernel.

Shapes: ``H`` heads, ``K`` heads of keys and values, ``G = H / K``, ``T`` tokens, ``E`` head width; a block has ``b``
queries that see ``j`` keys.

Forward ``S = s q k^T``, ``P = softmax(S)``, ``O = P v``. Backward, with P recomputed::

    dv = P^T dO     dP = dO v^T     dS = P (dP - rowsum(P dP))     dq = s dS k     dk = s dS^T q

On an AMD EPYC PyTorch's kernel for CPUs (2.13) runs at 40 to 60 GFLOP/s; the same core multiplies matrices at 108 in
fp32 and at 485 in bf16. On an Intel Xeon with matrix units the kernel uses them and is the faster of the two for
segments of 1,024 tokens and more. Scores and their softmax are in fp32, as in the kernel.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from mm_moslora.utils.hardware import made_by_amd

BLOCK, HALF_BLOCK = 64, 128
"""Queries of a block in fp32 and in half precision: faster products may compute more above the diagonal."""
SCORES = 2**21
"""Bytes of one block's scores, so that they stay in the cache: long segments take fewer heads at a time."""
SHORT = 128
"""Tokens up to which PyTorch's kernel is taken in fp32, and products in half precision."""


def products_are_faster(q: Tensor) -> bool:
    """Whether `attend` is taken: faster than PyTorch's kernel by measurements, or on the meta device."""
    # Short segments in half precision are products on every CPU, long ones on AMD's.
    return q.is_meta or (q.dtype.itemsize == 2 if q.shape[1] <= SHORT else made_by_amd())


def keeps_probabilities(q: Tensor) -> bool:
    """Whether P is kept for the backward pass: in half precision, for segments of at most eight head widths."""
    # P is then about as large as q, k, v and O together, and most of its cost is the scores in fp32.
    return q.dtype.itemsize == 2 and q.shape[1] <= 8 * q.shape[2]


def attend(
    q: Tensor, k: Tensor, v: Tensor, scale: float, *, out: Tensor, causal: bool = True, keep: list[Tensor] | None = None
) -> None:
    """Attention to all keys, or to those up to the query's position, put into `out`; P of every block into `keep`."""
    output, values = _grouped(out, k), v.contiguous()
    for heads, queries, P in _probabilities(_grouped(q, k), k, scale, causal=causal):
        P = P.to(q.dtype)
        if keep is not None:
            keep.append(P)
        block = output[heads, :, queries]
        block.copy_(torch.bmm(P, values[heads, : P.shape[-1]]).view(block.shape))


def attend_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    *,
    out: tuple[Tensor, Tensor, Tensor],
    causal: bool = True,
    probabilities: Iterator[Tensor] | None = None,
) -> None:
    """The gradients of q, k and v, put into `out`, from that of `attend`'s result; P is what it kept, or recomputed."""
    rows, pulls = (_grouped(tensor.contiguous(), k) for tensor in (q, grad))
    keys, values = k.contiguous(), v.contiguous()
    dq = _grouped(out[0], k)
    dk, dv = (torch.zeros_like(keys, dtype=_wide(q.dtype)) for _ in range(2))
    blocks = _probabilities(rows, keys, scale, causal=causal)
    if probabilities is not None:
        blocks = (
            (*slices, P) for slices, P in zip(_blocks(rows), probabilities, strict=False)
        )  # those of later segments stay
    for heads, queries, P in blocks:
        seen = P.shape[-1]
        own, pull = (tensor[heads, :, queries].flatten(1, 2) for tensor in (rows, pulls))
        _add_product(dv[heads, :seen], P.to(q.dtype).mT, pull)
        dP = torch.bmm(pull, values[heads, :seen].mT).to(P.dtype)
        dS = torch.ops.aten._softmax_backward_data(dP, P, -1, P.dtype).to(q.dtype)
        _add_product(dk[heads, :seen], dS.mT, own)
        block = dq[heads, :, queries]
        block.copy_(torch.bmm(dS, keys[heads, :seen]).mul_(scale).view(block.shape))
    out[1].copy_(dk.mul_(scale))
    out[2].copy_(dv)


def attend_by_kernel(q: Tensor, k: Tensor, v: Tensor, scale: float, *, out: Tensor, causal: bool) -> Tensor:
    """`attend` by PyTorch's kernel; gives the logarithms of the softmax's sums, for the backward pass."""
    rows = _batched(q, k, v)
    output, sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*rows, 0.0, causal, scale=scale)
    out.copy_(output[0])
    return sums  # type: ignore[no-any-return]


def attend_by_kernel_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    output: Tensor,
    sums: Tensor,
    scale: float,
    *,
    out: tuple[Tensor, Tensor, Tensor],
    causal: bool,
) -> None:
    """`attend_backward` for `attend_by_kernel`, from its output ``[H, T, E]`` and its logarithms."""
    rows = _batched(q, k, v)
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    gradients = backward(grad.contiguous()[None], *rows, output[None], sums, 0.0, causal, scale=scale)
    out[0].copy_(gradients[0][0])
    for target, shared in zip(out[1:], gradients[1:], strict=True):
        target.copy_(shared[0] if len(q) == len(k) else _grouped(shared[0], k).sum(1))


def _batched(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v with a batch of one, and as many heads of k and v as of q."""
    groups = q.shape[0] // k.shape[0]
    if groups > 1:
        k, v = (tensor.repeat_interleave(groups, 0) for tensor in (k, v))
    return q[None], k[None], v[None]


def _blocks(rows: Tensor) -> Iterator[tuple[slice, slice]]:
    """The heads of keys and the queries of every block."""
    total, groups, tokens, _ = rows.shape
    size = BLOCK if rows.dtype.itemsize >= 4 else HALF_BLOCK
    at_once = max(1, SCORES // (groups * min(size, tokens) * tokens * _wide(rows.dtype).itemsize))
    for first in range(0, total, at_once):
        for start in range(0, tokens, size):
            yield slice(first, min(first + at_once, total)), slice(start, min(start + size, tokens))


def _probabilities(rows: Tensor, keys: Tensor, scale: float, *, causal: bool) -> Iterator[tuple[slice, slice, Tensor]]:
    """Every block and its P ``[heads, G * b, j]``, at least in fp32."""
    dtype = _wide(rows.dtype)
    future = torch.full((HALF_BLOCK, HALF_BLOCK), float("-inf"), dtype=dtype, device=rows.device).triu_(1)
    wide_rows, wide_keys = (torch.empty(x.shape, dtype=dtype, device=x.device).copy_(x) for x in (rows, keys))
    wide_rows.mul_(scale)
    for heads, queries in _blocks(rows):
        seen = wide_keys[heads, : queries.stop if causal else None]
        scores = torch.bmm(wide_rows[heads, :, queries].flatten(1, 2), seen.mT)
        if causal:
            width = queries.stop - queries.start
            scores.unflatten(1, (-1, width))[..., queries].add_(future[:width, :width])
        yield heads, queries, torch.softmax(scores, -1)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add ``a b`` to a total that may have a wider dtype."""
    if total.dtype == a.dtype:
        total.baddbmm_(a, b)
    else:
        total.add_(torch.bmm(a, b))


def _grouped(queries: Tensor, keys: Tensor) -> Tensor:
    """``[K, G, T, E]``: heads of queries grouped by the keys that they share."""
    return queries.unflatten(0, (keys.shape[0], -1))


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


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
                if not products_are_faster(q):
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
                if not products_are_faster(q):
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
