"""Causal attention of one segment on a CPU, as matrix products over blocks of queries.

Shapes: ``H`` heads, ``K`` heads of keys and values, ``G = H / K``, ``T`` tokens, ``E`` head width; a block has ``b``
queries that see ``j`` keys.

Forward ``S = s q k^T``, ``P = softmax(S)``, ``O = P v``. Backward, with P computed once more::

    dv = P^T dO     dP = dO v^T     dS = P (dP - rowsum(P dP))     dq = s dS k     dk = s dS^T q

PyTorch's kernel for CPUs (2.13) runs at 40 to 60 GFLOP/s where the same core multiplies matrices at 108 in fp32 and at
485 in bf16 (AMD EPYC); `scripts/bench/attention.py` compares the two. Scores and their softmax are in fp32, as in that
kernel. Nothing but q, k and v is needed for the backward pass.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

BLOCK, HALF_BLOCK = 64, 128
"""Queries of a block in fp32, and in half precision, whose faster products may waste more above the diagonal."""
SCORES = 2**21
"""Bytes of one block's scores, so that they stay in the cache: long segments take fewer heads at a time."""


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Causal attention.

    Args:
        q: ``[H, T, E]``.
        k: ``[K, T, E]``.
        v: ``[K, T, E]``.
        scale: factor on the scores.

    Returns:
        ``[H, T, E]``.
    """
    rows, keys, values = _grouped(q, k), k.contiguous(), v.contiguous()
    output = torch.empty_like(rows)
    for heads, queries, seen, P in _probabilities(rows, keys, scale):
        block = output[heads, :, queries]
        block.copy_(torch.bmm(P.to(q.dtype), values[heads, :seen]).view_as(block))
    return output.view_as(q)


def attend_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v from that of `attend`.

    Args:
        grad: ``[H, T, E]``.
        q: ``[H, T, E]``.
        k: ``[K, T, E]``.
        v: ``[K, T, E]``.
        scale: factor on the scores.
    """
    rows, keys, values, pulls = _grouped(q, k), k.contiguous(), v.contiguous(), _grouped(grad, k)
    dq = torch.empty_like(rows)
    dk, dv = (torch.zeros_like(keys, dtype=_wide(q.dtype)) for _ in range(2))
    for heads, queries, seen, P in _probabilities(rows, keys, scale):
        own, pull = (tensor[heads, :, queries].flatten(1, 2) for tensor in (rows, pulls))
        _add_product(dv[heads, :seen], P.to(q.dtype).mT, pull)
        dP = torch.bmm(pull, values[heads, :seen].mT).to(P.dtype)
        dS = torch.ops.aten._softmax_backward_data(dP, P, -1, P.dtype).to(q.dtype)
        _add_product(dk[heads, :seen], dS.mT, own)
        block = dq[heads, :, queries]
        block.copy_(torch.bmm(dS, keys[heads, :seen]).view_as(block))
    return dq.mul_(scale).view_as(q), dk.mul_(scale).to(q.dtype), dv.to(q.dtype)


def _probabilities(rows: Tensor, keys: Tensor, scale: float) -> Iterator[tuple[slice, slice, int, Tensor]]:
    """Every block: its heads of keys, its queries, how many keys it sees, and P ``[heads, G * b, j]``.

    Args:
        rows: ``[K, G, T, E]``.
        keys: ``[K, T, E]``.
        scale: factor on the scores.
    """
    total, groups, tokens, _ = rows.shape
    dtype, size = _wide(rows.dtype), BLOCK if rows.dtype.itemsize >= 4 else HALF_BLOCK
    at_once = max(1, SCORES // (groups * min(size, tokens) * tokens * dtype.itemsize))
    future = torch.full((size, size), float("-inf"), dtype=dtype, device=rows.device).triu_(1)
    wide_rows, wide_keys = rows.to(dtype) * scale, keys.to(dtype)
    for first in range(0, total, at_once):
        heads = slice(first, min(first + at_once, total))
        for start in range(0, tokens, size):
            end = min(start + size, tokens)
            scores = torch.bmm(wide_rows[heads, :, start:end].flatten(1, 2), wide_keys[heads, :end].mT)
            width = end - start
            scores.unflatten(1, (groups, width))[..., start:].add_(future[:width, :width])
            yield heads, slice(start, end), end, torch.softmax(scores, -1)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add ``a b`` to a total that may be wider than its terms."""
    if total.dtype == a.dtype:
        total.baddbmm_(a, b)
    else:
        total.add_(torch.bmm(a, b))


def _grouped(queries: Tensor, keys: Tensor) -> Tensor:
    """``[K, G, T, E]``, the heads that share keys together."""
    return queries.contiguous().unflatten(0, (keys.shape[0], -1))


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
