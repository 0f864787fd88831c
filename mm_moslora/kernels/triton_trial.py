"""A trial of all Triton kernels: their values beside those of PyTorch's operators, on little data of odd sizes.

A kernel that is compiled wrongly, or for a device that rounds otherwise, would train on wrong numbers without a word.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mm_moslora.kernels.fused_ops.torch_ops import TORCH_OPS, FusedOps
from mm_moslora.kernels.fused_ops.triton_ops import TRITON_OPS
from mm_moslora.kernels.lora.triton_dropout import add_kept_products, kept_copies

_ROWS, _WIDTH, _RANK = 70, 203, 24
_MASKS = ((3, 1638), (2**40 + 1, 8192), (2**62 - 1, 16384))
"""Seeds, and of 2^15 random numbers those that drop an entry."""


def wrong_kernels(device: torch.device, dtype: torch.dtype) -> list[str]:
    """The operations with values that differ from PyTorch's by more than their rounding; empty: all are right."""
    generator = torch.Generator().manual_seed(0)  # the run's generators stay as they are

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    tolerance = max(8 * torch.finfo(dtype).eps, 1e-5)
    errors = {name: _error(run(TRITON_OPS), run(TORCH_OPS)) for name, run in _passes(draw).items()}
    errors |= _dropout(draw)
    return [name for name, error in errors.items() if not error <= tolerance]  # an error may be NaN


def _passes(draw: Callable[..., Tensor]) -> dict[str, Callable[[FusedOps], Any]]:
    """Each pass between products, on inputs that no other one overwrites."""
    x, grad, e, g = (draw(_ROWS, _WIDTH) for _ in range(4))
    weight, heads, cos = draw(_WIDTH), draw(_ROWS, 3, 24), draw(_ROWS, 1, 12).repeat(1, 1, 2)
    sine = draw(_ROWS, 1, 12)
    sin = torch.cat((-sine, sine), -1)
    _, inverse = TORCH_OPS.rms_norm(x, weight, 1e-6)
    return {
        "rms_norm": lambda ops: ops.rms_norm(x, weight, 1e-6),
        "recompute_rms_norm": lambda ops: ops.recompute_rms_norm(x, weight, inverse),
        "rms_norm_weight_gradient": lambda ops: ops.rms_norm_weight_gradient(grad.clone(), x, inverse),
        "rms_norm_backward": lambda ops: ops.rms_norm_backward(grad.clone(), x, weight, inverse),
        "gated_silu": lambda ops: ops.gated_silu(e, g),
        "recompute_gated": lambda ops: ops.recompute_gated(e, g)[0],
        "gated_silu_backward": lambda ops: ops.gated_silu_backward(grad.clone(), e, g, ops.recompute_gated(e, g)[1]),
        "rotary_embedding": lambda ops: ops.rotary_embedding(heads, cos, sin),
    }


def _dropout(draw: Callable[..., Tensor]) -> dict[str, float]:
    """Shares of the masks, the masks of both kernels, and the masked products."""
    ones = torch.ones_like(draw(_ROWS, _WIDTH))
    kept = kept_copies(ones, _MASKS)
    dropped = [1 - float(mask.double().mean()) for mask in kept]
    off = max(abs(share - threshold / 2**15) for share, (_, threshold) in zip(dropped, _MASKS, strict=True))
    # Products of 1, 2 and 4: their sum tells which masks kept an entry, exactly in every dtype.
    units, sums = [torch.zeros_like(ones[:, :_RANK]) for _ in _MASKS], torch.zeros_like(ones)
    lines = [torch.zeros_like(ones[:_RANK]) for _ in _MASKS]
    for power, (unit, line) in enumerate(zip(units, lines, strict=True)):
        unit[:, 0], line[0] = 2.0**power, 1.0
    add_kept_products(sums, units, lines, _MASKS)
    us, As, total = [draw(_ROWS, _RANK) for _ in _MASKS], [draw(_RANK, _WIDTH) for _ in _MASKS], draw(_ROWS, _WIDTH)
    expected = total.double()  # a copy, as the dtype is another one
    for mask, u, A in zip(kept, us, As, strict=True):
        expected += mask.double() * (u.double() @ A.double())
    add_kept_products(total, us, As, _MASKS)
    return {
        "kept_copies": 0.0 if off < 0.03 else off,  # seven standard errors of a share of 14,210 entries
        "masks of add_kept_products": float((sums - kept[0] - 2 * kept[1] - 4 * kept[2]).abs().max()),
        "add_kept_products": _error(total, expected),
    }


def _error(result: Any, expected: Any) -> float:
    """The largest of all entries, relative to the entry and the root mean square: a wrong edge of a tile counts."""
    if isinstance(result, tuple):
        return max(_error(one, right) for one, right in zip(result, expected, strict=True))
    right = expected.double()
    return float(((result.double() - right).abs() / (right.abs() + right.square().mean().sqrt())).max())
