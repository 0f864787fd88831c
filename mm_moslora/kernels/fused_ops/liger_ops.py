"""The passes of lean decoder layers with Liger's Triton kernels, to compare them with those of `triton_ops`.

Shapes: ``S`` tokens, ``D`` LLM width, ``F`` MLP width.

The norm, its gradient and the gated activation with its gradients are Liger's. The others stay those of `triton_ops`:
Liger would compute a kept ``1 / rms`` again, and rotates query and key in place, which autograd may still need.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from liger_kernel.ops.rms_norm import rms_norm_backward as liger_rms_norm_backward
from liger_kernel.ops.rms_norm import rms_norm_forward as liger_rms_norm_forward
from liger_kernel.ops.swiglu import swiglu_backward, swiglu_forward
from liger_kernel.ops.utils import calculate_settings
from torch import Tensor

from mm_moslora.kernels.fused_ops.triton_ops import TRITON_OPS

LLAMA = 0
"""Liger's number for transformers' numerics: fp32 up to the product with ``1 / rms``, then the input's dtype."""


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """See `torch_ops.rms_norm`."""
    y, _, inverse, *_ = liger_rms_norm_forward(x.contiguous(), weight, eps, 0.0, LLAMA, True)
    return y, inverse[:, None]


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
    """See `torch_ops.gated_silu_backward`; the gradients overwrite e and g."""
    # Both are saved tensors. Their version counters increase, so that autograd raises in a second backward pass.
    of_e, of_g = swiglu_backward(e.contiguous(), g.contiguous(), grad.contiguous())
    torch.autograd.graph.increment_version((e, g))
    return of_e, of_g


LIGER_OPS = replace(
    TRITON_OPS,
    rms_norm=rms_norm,
    rms_norm_backward=rms_norm_backward,
    gated_silu=gated_silu,
    recompute_gated=recompute_gated,
    gated_silu_backward=gated_silu_backward,
)
