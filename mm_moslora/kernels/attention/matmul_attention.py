"""Attention of one segment on a CPU: as matrix products over blocks of queries, or by PyTorch's kernel.

Shapes: ``H`` heads, ``K`` heads of keys and values, ``G = H / K``, ``T`` tokens, ``E`` head width; a block has ``b``
queries that see ``j`` keys.

Forward ``S = s q k^T``, ``P = softmax(S)``, ``O = P v``. Backward, with P recomputed::

    dv = P^T dO     dP = dO v^T     dS = P (dP - rowsum(P dP))     dq = s dS k     dk = s dS^T q

On an AMD EPYC PyTorch's kernel for CPUs (2.13) runs at 40 to 60 GFLOP/s; the same core multiplies matrices at 108 in
fp32 and at 485 in bf16. On an Intel Xeon with matrix units the kernel uses them and is the faster of the two for
segments of 1,024 tokens and more. Scores and their softmax are in fp32, as in the kernel.
"""

from __future__ import annotations

from collections.abc import Iterator

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
