"""The passes of lean decoder layers as Triton kernels: each reads its inputs once and writes its results once.

Shapes: ``S`` tokens, ``D`` LLM width, ``F`` MLP width, ``H`` heads, ``E`` head width.

All kernels compute in fp32. They round where the functions of `torch_ops` do, except in the gated activation, which is
rounded once. The import needs triton.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mm_moslora.kernels.fused_ops.torch_ops import FusedOps

_TILE = 4096
"""Entries of a tile of rows; a longer row is a tile of its own."""
_ENTRIES = 1024
"""Entries of a program of the gated activation."""
_SUMMED = 256
"""Rows that one program of `rms_norm_weight_gradient` adds up."""


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """See `torch_ops.rms_norm`."""
    inverse = torch.empty(x.shape[0], 1, dtype=torch.float32, device=x.device)
    return _norm(x, weight, inverse, eps=eps, recompute=False), inverse


def recompute_rms_norm(x: Tensor, weight: Tensor, inverse: Tensor) -> Tensor:
    """See `torch_ops.recompute_rms_norm`."""
    return _norm(x, weight, inverse, eps=0.0, recompute=True)


def _norm(x: Tensor, weight: Tensor, inverse: Tensor, *, eps: float, recompute: bool) -> Tensor:
    x, weight = x.contiguous(), weight.contiguous()
    y = torch.empty_like(x)
    rows, options = _row_tiles(x)
    with torch.cuda.device_of(x):
        _rms_norm[rows](x, weight, inverse, y, *x.shape, eps, RECOMPUTE=recompute, **options)
    return y


def rms_norm_backward(grad: Tensor, x: Tensor, weight: Tensor, inverse: Tensor) -> Tensor:
    """See `torch_ops.rms_norm_backward`; in place."""
    grad, x, weight = grad.contiguous(), x.contiguous(), weight.contiguous()
    rows, options = _row_tiles(x)
    with torch.cuda.device_of(x):
        _rms_norm_backward[rows](grad, x, weight, inverse, *x.shape, **options)
    return grad


def rms_norm_weight_gradient(grad: Tensor, x: Tensor, inverse: Tensor) -> Tensor:
    """See `torch_ops.rms_norm_weight_gradient`."""
    grad, x = grad.contiguous(), x.contiguous()
    parts = torch.empty(triton.cdiv(x.shape[0], _SUMMED), x.shape[1], dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        _weight_gradient[(parts.shape[0], triton.cdiv(x.shape[1], 128))](
            grad, x, inverse, parts, *x.shape, SUMMED=_SUMMED, ROWS=16, COLUMNS=128, num_warps=4
        )
    return parts.sum(0)


def gated_silu(e: Tensor, g: Tensor) -> Tensor:
    """See `torch_ops.gated_silu`."""
    e, g = e.contiguous(), g.contiguous()
    h = torch.empty_like(e)
    with torch.cuda.device_of(e):
        _gated_silu[(triton.cdiv(e.numel(), _ENTRIES),)](e, g, h, e.numel(), BLOCK=_ENTRIES, num_warps=4)
    return h


def recompute_gated(e: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """See `torch_ops.recompute_gated`; the second value is empty, since the gradients need e and g alone."""
    return gated_silu(e, g), e.new_empty(0)


def gated_silu_backward(grad: Tensor, e: Tensor, g: Tensor, activated: Tensor) -> tuple[Tensor, Tensor]:
    """See `torch_ops.gated_silu_backward`."""
    grad, e, g = grad.contiguous(), e.contiguous(), g.contiguous()
    of_g = torch.empty_like(g)
    with torch.cuda.device_of(e):
        _gated_silu_backward[(triton.cdiv(e.numel(), _ENTRIES),)](
            grad, e, g, of_g, e.numel(), BLOCK=_ENTRIES, num_warps=4
        )
    return grad, of_g


def rotary_embedding(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """See `torch_ops.rotary_embedding`."""
    x = x if x.stride(2) == 1 else x.contiguous()
    tokens, heads, width = x.shape
    y = x.new_empty(x.shape)
    blocks = {"HEADS": triton.next_power_of_2(heads), "HALF": triton.next_power_of_2(width // 2)}
    with torch.cuda.device_of(x):
        _rotate[(tokens,)](
            x, x.stride(0), x.stride(1), cos.contiguous(), sin.contiguous(), y, heads, width // 2,
            num_warps=_warps(heads * width), **blocks,
        )  # fmt: skip
    return y


def _row_tiles(x: Tensor) -> tuple[tuple[int], dict[str, int]]:
    """The grid and the options of a kernel whose programs take whole rows: several short ones, or one long one."""
    block = triton.next_power_of_2(x.shape[1])
    rows = max(1, min(_TILE // block, 32))
    return (triton.cdiv(x.shape[0], rows),), {"ROWS": rows, "BLOCK": block, "num_warps": _warps(rows * block)}


def _warps(entries: int) -> int:
    """Warps of a program, for at most 32 entries a thread where a program may have that many."""
    return min(16, max(4, triton.next_power_of_2(entries) // 1024))


@triton.jit  # type: ignore[untyped-decorator]
def _tile(rows, width, ROWS: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Rows ``[ROWS]``, columns and offsets of a tile of whole rows, and which of them exist."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (column < width)[None, :]
    return row, column, row[:, None] * width + column[None, :], inside


@triton.jit  # type: ignore[untyped-decorator]
def _rms_norm(  # type: ignore[no-untyped-def]
    x, weight, inverse, y, rows, width, eps, RECOMPUTE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    row, column, offset, inside = _tile(rows, width, ROWS, BLOCK)
    values = tl.load(x + offset, mask=inside, other=0.0)
    wide = values.to(tl.float32)
    if RECOMPUTE:
        scale = tl.load(inverse + row, mask=row < rows, other=0.0)
    else:
        scale = tl.rsqrt(tl.sum(wide * wide, axis=1) / width + eps)
        tl.store(inverse + row, scale, mask=row < rows)
    # A product of two half-precision numbers is exact in fp32 and rounded once.
    scaled = (wide * scale[:, None]).to(values.dtype).to(tl.float32)
    scaled *= tl.load(weight + column, mask=column < width, other=0.0).to(tl.float32)[None, :]
    tl.store(y + offset, scaled.to(values.dtype), mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _rms_norm_backward(  # type: ignore[no-untyped-def]
    grad, x, weight, inverse, rows, width, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    row, column, offset, inside = _tile(rows, width, ROWS, BLOCK)
    scale = tl.load(inverse + row, mask=row < rows, other=0.0)[:, None]
    direction = tl.load(x + offset, mask=inside, other=0.0).to(tl.float32) * scale
    upstream = tl.load(grad + offset, mask=inside, other=0.0)
    pull = upstream.to(tl.float32) * tl.load(weight + column, mask=column < width, other=0.0).to(tl.float32)[None, :]
    mean = tl.sum(pull * direction, axis=1)[:, None] / width
    tl.store(grad + offset, ((pull - direction * mean) * scale).to(upstream.dtype), mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _weight_gradient(  # type: ignore[no-untyped-def]
    grad, x, inverse, parts, rows, width, SUMMED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """Sums over `SUMMED` rows for some columns; the order of the sums does not depend on the run."""
    first = tl.program_id(0).to(tl.int64) * SUMMED
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((COLUMNS,), dtype=tl.float32)
    for start in range(0, SUMMED, ROWS):
        row = first + start + tl.arange(0, ROWS)
        inside = (row < rows)[:, None] & (column < width)[None, :]
        offset = row[:, None] * width + column[None, :]
        values = tl.load(x + offset, mask=inside, other=0.0)
        scale = tl.load(inverse + row, mask=row < rows, other=0.0)[:, None]
        direction = (values.to(tl.float32) * scale).to(values.dtype).to(tl.float32)
        total += tl.sum(tl.load(grad + offset, mask=inside, other=0.0).to(tl.float32) * direction, axis=0)
    tl.store(parts + tl.program_id(0).to(tl.int64) * width + column, total, mask=column < width)


@triton.jit  # type: ignore[untyped-decorator]
def _gated_silu(e, g, h, count, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    offset = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offset < count
    gate = tl.load(e + offset, mask=inside, other=0.0)
    wide = gate.to(tl.float32)
    value = wide * tl.sigmoid(wide) * tl.load(g + offset, mask=inside, other=0.0).to(tl.float32)
    tl.store(h + offset, value.to(gate.dtype), mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _gated_silu_backward(grad, e, g, of_g, count, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """The gradient of e overwrites `grad`."""
    offset = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offset < count
    upstream = tl.load(grad + offset, mask=inside, other=0.0)
    pull, wide = upstream.to(tl.float32), tl.load(e + offset, mask=inside, other=0.0).to(tl.float32)
    share = tl.sigmoid(wide)
    tl.store(of_g + offset, (pull * wide * share).to(upstream.dtype), mask=inside)
    pull *= tl.load(g + offset, mask=inside, other=0.0).to(tl.float32)
    tl.store(grad + offset, (pull * share * (1 + wide * (1 - share))).to(upstream.dtype), mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _rotate(  # type: ignore[no-untyped-def]
    x, token_stride, head_stride, cos, sin, y, heads, half, HEADS: tl.constexpr, HALF: tl.constexpr
):
    """A token per program, all of its heads."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, HEADS).to(tl.int64)[:, None]
    column = tl.arange(0, HALF)[None, :]
    inside = (head < heads) & (column < half)
    turn = token * 2 * half + column
    c = tl.load(cos + turn, mask=column < half, other=0.0).to(tl.float32)
    s = tl.load(sin + turn + half, mask=column < half, other=0.0).to(tl.float32)
    source = x + token * token_stride + head * head_stride + column
    first = tl.load(source, mask=inside, other=0.0)
    second = tl.load(source + half, mask=inside, other=0.0).to(tl.float32)
    wide = first.to(tl.float32)
    target = y + (token * heads + head) * 2 * half + column
    tl.store(target, (wide * c - second * s).to(first.dtype), mask=inside)
    tl.store(target + half, (second * c + wide * s).to(first.dtype), mask=inside)


TRITON_OPS = FusedOps(
    rms_norm=rms_norm,
    recompute_rms_norm=recompute_rms_norm,
    rms_norm_backward=rms_norm_backward,
    rms_norm_weight_gradient=rms_norm_weight_gradient,
    gated_silu=gated_silu,
    recompute_gated=recompute_gated,
    gated_silu_backward=gated_silu_backward,
    rotary_embedding=rotary_embedding,
)
