"""The elementwise passes of lean decoder layers (RMS norm, gated activation, rotary embedding), also compiled.

Shapes: ``S`` tokens, ``D`` LLM width, ``F`` MLP width, ``H`` heads, ``E`` head width.

Each is a chain of operators that reads and writes its tensors several times; compiled, or as a kernel of `triton_ops`,
it is one pass.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """RMS norm of x ``[S, D]``, as transformers computes it, and ``1 / rms`` (fp32 ``[S, 1]``)."""
    wide = x.float()
    inverse = torch.rsqrt(torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps))
    return _product(x, wide, inverse).to(x.dtype).mul_(weight), inverse


def recompute_rms_norm(x: Tensor, weight: Tensor, inverse: Tensor) -> Tensor:
    """The output of `rms_norm` again, from its ``1 / rms``."""
    return _product(x, x.float(), inverse).to(x.dtype).mul_(weight)


def rms_norm_backward(grad: Tensor, x: Tensor, weight: Tensor, inverse: Tensor) -> Tensor:
    """The gradient of x, from that of the norm's output, which may be overwritten."""
    direction = _product(x, x.float(), inverse)
    pull = grad * weight if grad.dtype == torch.float32 else grad.float().mul_(weight.float())
    mean = torch.linalg.vecdot(pull, direction).div_(x.shape[-1])[:, None]
    return pull.addcmul_(direction, mean, value=-1).mul_(inverse).to(x.dtype)


def rms_norm_weight_gradient(grad: Tensor, x: Tensor, inverse: Tensor) -> Tensor:
    """The gradient of the norm's weight ``[D]``, fp32, from that of its output; call it before `rms_norm_backward`."""
    direction = _product(x, x.float(), inverse).to(x.dtype)
    return direction.float().mul_(grad).sum(0) if x.dtype != torch.float32 else (direction * grad).sum(0)


def _product(x: Tensor, wide: Tensor, inverse: Tensor) -> Tensor:
    """``wide * inverse``, in place unless `wide` is x."""
    return wide * inverse if x.dtype == torch.float32 else wide.mul_(inverse)


def gated_silu(e: Tensor, g: Tensor) -> Tensor:
    """``silu(e) * g``, each ``[S, F]``."""
    return F.silu(e).mul_(g)


def recompute_gated(e: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """`gated_silu` again, and an intermediate result for `gated_silu_backward`, here ``silu(e)``."""
    activated = F.silu(e)
    return activated * g, activated


def gated_silu_backward(grad: Tensor, e: Tensor, g: Tensor, activated: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of e and g; `grad` and the intermediate result of `recompute_gated` are overwritten."""
    of_g = activated.mul_(grad)
    return torch.ops.aten.silu_backward(grad.mul_(g), e), of_g


def rotary_embedding(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x ``[S, H, E]`` in halves; of sin, ``[S, 1, E]`` like cos, the first half is negative."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((second, first), dim=-1).mul_(sin).addcmul_(x, cos)


@dataclass(frozen=True, kw_only=True)
class FusedOps:
    """One implementation of every operation: the functions of this module, or their compiled or kernel versions."""

    rms_norm: Callable[[Tensor, Tensor, float], tuple[Tensor, Tensor]] = rms_norm
    recompute_rms_norm: Callable[[Tensor, Tensor, Tensor], Tensor] = recompute_rms_norm
    rms_norm_backward: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor] = rms_norm_backward
    rms_norm_weight_gradient: Callable[[Tensor, Tensor, Tensor], Tensor] = rms_norm_weight_gradient
    gated_silu: Callable[[Tensor, Tensor], Tensor] = gated_silu
    recompute_gated: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] = recompute_gated
    gated_silu_backward: Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]] = gated_silu_backward
    rotary_embedding: Callable[[Tensor, Tensor, Tensor], Tensor] = rotary_embedding


TORCH_OPS = FusedOps()


@cache
def compiled(backend: str) -> FusedOps:
    """The passes compiled for rows of any length; each compiles at its first call."""
    passes = {field.name: getattr(TORCH_OPS, field.name) for field in fields(FusedOps)}
    return FusedOps(
        **{name: torch.compile(function, backend=backend, dynamic=True) for name, function in passes.items()}
    )
