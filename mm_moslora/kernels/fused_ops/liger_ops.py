"""The passes of lean decoder layers as Triton kernels: Liger's, and two of this module where Liger has none that fits.

Shapes: ``S`` tokens, ``D`` LLM width, ``F`` MLP width, ``H`` heads, ``E`` head width.

The import needs liger_kernel and triton; `models.memory_efficient.kernel_selection` checks that and chooses. The norm,
its gradient and the gated activation with its gradients are Liger's. This module adds two kernels. One recomputes the
norm from the kept ``1 / rms``, which Liger would compute again. One is the rotary embedding: Liger's works in place on
query and key, which autograd may still need, and a copy before it costs as much as the rotation.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from liger_kernel.ops.rms_norm import rms_norm_backward as liger_rms_norm_backward
from liger_kernel.ops.rms_norm import rms_norm_forward as liger_rms_norm_forward
from liger_kernel.ops.swiglu import swiglu_backward, swiglu_forward
from liger_kernel.ops.utils import calculate_settings
from torch import Tensor

from mm_moslora.kernels.fused_ops.torch_ops import FusedOps

LLAMA = 0
"""Liger's number for transformers' numerics: fp32 up to the product with ``1 / rms``, then the input's dtype."""


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """See `torch_ops.rms_norm`."""
    y, _, inverse, *_ = liger_rms_norm_forward(x.contiguous(), weight, eps, 0.0, LLAMA, True)
    return y, inverse[:, None]


def recompute_rms_norm(x: Tensor, weight: Tensor, inverse: Tensor) -> Tensor:
    """See `torch_ops.recompute_rms_norm`."""
    x = x.contiguous()
    y = torch.empty_like(x)
    block, warps = calculate_settings(x.shape[1])
    with torch.cuda.device_of(x):
        _normalised[(x.shape[0],)](x, weight, inverse, y, x.shape[1], BLOCK=block, num_warps=warps)
    return y


def rms_norm_backward(grad: Tensor, x: Tensor, weight: Tensor, inverse: Tensor) -> Tensor:
    """See `torch_ops.rms_norm_backward`."""
    block, warps = calculate_settings(x.shape[1])
    of_x, _ = liger_rms_norm_backward(
        grad.contiguous(), x.contiguous(), weight, inverse[:, 0], 0.0, LLAMA, block, warps,
        in_place=True, row_mode=True, needs_dw=False,
    )  # fmt: skip
    return of_x


def gated_silu(e: Tensor, g: Tensor) -> Tensor:
    """See `torch_ops.gated_silu`."""
    return swiglu_forward(e.contiguous(), g.contiguous())[2]


def recompute_gated(e: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """See `torch_ops.recompute_gated`; the second value is empty, since Liger's gradients need e and g alone."""
    return gated_silu(e, g), e.new_empty(0)


def gated_silu_backward(grad: Tensor, e: Tensor, g: Tensor, activated: Tensor) -> tuple[Tensor, Tensor]:
    """See `torch_ops.gated_silu_backward`; the gradients overwrite e and g.

    Both are saved tensors. Their version counters increase, so that autograd raises in a second backward pass.
    """
    of_e, of_g = swiglu_backward(e.contiguous(), g.contiguous(), grad.contiguous())
    torch.autograd.graph.increment_version((e, g))
    return of_e, of_g


def rotary_embedding(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """See `torch_ops.rotary_embedding`."""
    x = x if x.stride(2) == 1 else x.contiguous()
    tokens, heads, width = x.shape
    y = x.new_empty(x.shape)
    blocks = {"HEADS": triton.next_power_of_2(heads), "HALF": triton.next_power_of_2(width // 2)}
    _, warps = calculate_settings(heads * width)
    with torch.cuda.device_of(x):
        _rotated[(tokens,)](
            x, x.stride(0), x.stride(1), cos.contiguous(), sin.contiguous(), y, heads, width // 2,
            num_warps=warps, **blocks,
        )  # fmt: skip
    return y


@triton.jit  # type: ignore[untyped-decorator]
def _normalised(x, weight, inverse, y, width, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """A row per program; a product of two half-precision numbers is exact in fp32 and rounded once."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    values = tl.load(x + row * width + column, mask=inside, other=0.0)
    scaled = (values.to(tl.float32) * tl.load(inverse + row)).to(values.dtype).to(tl.float32)
    scaled *= tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + row * width + column, scaled, mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _rotated(  # type: ignore[no-untyped-def]
    x, token_stride, head_stride, cos, sin, y, heads, half, HEADS: tl.constexpr, HALF: tl.constexpr
):
    """A token per program, all of its heads; in fp32, rounded once."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, HEADS).to(tl.int64)[:, None]
    column = tl.arange(0, HALF)[None, :]
    inside = (head < heads) & (column < half)
    turn = token * 2 * half + column
    c = tl.load(cos + turn, mask=column < half, other=0.0).to(tl.float32)
    s = tl.load(sin + turn + half, mask=column < half, other=0.0).to(tl.float32)
    source = x + token * token_stride + head * head_stride + column
    first = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(source + half, mask=inside, other=0.0).to(tl.float32)
    place = y + (token * heads + head) * 2 * half + column
    tl.store(place, first * c - second * s, mask=inside)
    tl.store(place + half, second * c + first * s, mask=inside)


LIGER_OPS = FusedOps(
    rms_norm=rms_norm,
    recompute_rms_norm=recompute_rms_norm,
    rms_norm_backward=rms_norm_backward,
    gated_silu=gated_silu,
    recompute_gated=recompute_gated,
    gated_silu_backward=gated_silu_backward,
    rotary_embedding=rotary_embedding,
)
