"""The passes of lean decoder layers as the kernels of `mm_moslora.native` compute them.

Shapes: ``S`` tokens, ``D`` LLM width, ``F`` MLP width, ``H`` heads, ``E`` head width.

Each reads and writes everything once, where a chain of PyTorch's operators does so several times. Sums are in float32;
the norm's output is rounded as transformers rounds it, all others once. Other dtypes go to PyTorch's operators, and so
does everything under a mode that looks at every operator, such as a counter of FLOPs: it would not see the kernels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mm_moslora.models.elementwise import EAGER, Elementwise
from mm_moslora.native.tensors import call as _call
from mm_moslora.native.tensors import fits


def normalise(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """See `elementwise.normalise`."""
    if not fits(x, weight):
        return EAGER.normalise(x, weight, eps)
    x, weight = _rows(x), weight.contiguous()
    y, inverse = x.new_empty(x.shape), x.new_empty(x.shape[0], 1, dtype=torch.float32)
    _call("normalise", x, x.data_ptr(), x.stride(0), weight.data_ptr(), eps, y.data_ptr(), inverse.data_ptr(), *x.shape)
    return y, inverse


def normalised(x: Tensor, weight: Tensor, inverse: Tensor) -> Tensor:
    """See `elementwise.normalised`."""
    if not fits(x, weight):
        return EAGER.normalised(x, weight, inverse)
    x, weight, inverse = _rows(x), weight.contiguous(), inverse.contiguous()
    y = x.new_empty(x.shape)
    _call("normalised", x, x.data_ptr(), x.stride(0), weight.data_ptr(), inverse.data_ptr(), y.data_ptr(), *x.shape)
    return y


def normalise_backward(grad: Tensor, x: Tensor, weight: Tensor, inverse: Tensor) -> Tensor:
    """See `elementwise.normalise_backward`."""
    if not fits(x, grad, weight):
        return EAGER.normalise_backward(grad, x, weight, inverse)
    grad, x, weight, inverse = _rows(grad), _rows(x), weight.contiguous(), inverse.contiguous()
    dx = x.new_empty(x.shape)
    _call(
        "normalise_backward", x, grad.data_ptr(), grad.stride(0), x.data_ptr(), x.stride(0), weight.data_ptr(),
        inverse.data_ptr(), dx.data_ptr(), *x.shape,
    )  # fmt: skip
    return dx


def gated(e: Tensor, g: Tensor) -> Tensor:
    """See `elementwise.gated`."""
    if not fits(e, g):
        return EAGER.gated(e, g)
    e, g = e.contiguous(), g.contiguous()
    h = torch.empty_like(e)
    _call("gated", e, e.data_ptr(), g.data_ptr(), h.data_ptr(), e.numel())
    return h


def regated(e: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """See `elementwise.regated`; nothing is handed over."""
    return (gated(e, g), e.new_empty(0)) if fits(e, g) else EAGER.regated(e, g)


def gated_backward(grad: Tensor, e: Tensor, g: Tensor, activated: Tensor) -> tuple[Tensor, Tensor]:
    """See `elementwise.gated_backward`; the gradient of e takes the place of `grad`."""
    if not fits(e, g, grad):
        return EAGER.gated_backward(grad, e, g, activated)
    grad, e, g = grad.contiguous(), e.contiguous(), g.contiguous()
    of_g = torch.empty_like(g)
    _call("gated_backward", e, grad.data_ptr(), e.data_ptr(), g.data_ptr(), of_g.data_ptr(), e.numel())
    return grad, of_g


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """See `elementwise.rotated`."""
    if not fits(x, cos, sin):
        return EAGER.rotated(x, cos, sin)
    x, cos, sin = (tensor if tensor.stride(2) == 1 else tensor.contiguous() for tensor in (x, cos, sin))
    y = x.new_empty(x.shape)
    _call(
        "rotated", x, x.data_ptr(), x.stride(0), x.stride(1), cos.data_ptr(), cos.stride(0), sin.data_ptr(),
        sin.stride(0), y.data_ptr(), *x.shape,
    )  # fmt: skip
    return y


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 else x.contiguous()


NATIVE = Elementwise(
    normalise=normalise,
    normalised=normalised,
    normalise_backward=normalise_backward,
    gated=gated,
    regated=regated,
    gated_backward=gated_backward,
    rotated=rotated,
)
