"""Attention of the segments of a row by the C++ kernel of `mm_moslora.kernels.native`, forward and backward.

Shapes: ``H`` heads of queries, ``K`` of keys and values, ``S`` tokens of the row, ``E`` head width.

Scores and sums are in float32. In bfloat16, probabilities and the gradients of scores are rounded before their
products, as in PyTorch's kernel. The backward pass keeps q, k, v, the output and a number per query.
"""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from mm_moslora.kernels.native import library
from mm_moslora.utils.hardware import multiplies_tiles

SUFFIXES = {torch.float32: "full", torch.bfloat16: "half"}
"""Suffix of the functions, by dtype."""
WIDEST = 256
"""Largest head width; as in the C++ source."""


def takes(dtype: torch.dtype, width: int) -> bool:
    """Whether the C++ kernel computes heads of this dtype and width on this CPU.

    It leaves bfloat16 to PyTorch's kernel on a CPU with matrix units.

    Args:
        dtype: of queries, keys and values.
        width: of a head.
    """
    tiles = dtype == torch.bfloat16 and multiplies_tiles()
    return dtype in SUFFIXES and width <= WIDEST and not tiles


def runs_native(query: Tensor, key: Tensor, value: Tensor, *, segments: int) -> bool:
    """Whether the C++ kernel computes this attention.

    It does not where `takes` says no; nor where most threads would be idle; nor under a dispatch mode (a counter of
    FLOPs, for example), which would not see the kernel.

    Args:
        query: ``[1, H, S, E]``.
        key: ``[1, K, S, E]``.
        value: ``[1, K, S, E]``.
        segments: their number.
    """
    kinds = {(tensor.dtype, tensor.device.type) for tensor in (query, key, value)}
    if len(kinds) != 1 or query.device.type != "cpu" or torch._C._len_torch_dispatch_stack():
        return False
    busy = segments * key.shape[1]
    return takes(query.dtype, query.shape[-1]) and 2 * busy >= torch.get_num_threads()


def attend(
    query: Tensor, key: Tensor, value: Tensor, scale: float, lengths: tuple[int, ...], *, causal: bool
) -> Tensor:
    """Attention within each segment.

    Args:
        query: ``[1, H, S, E]``; float32 or bfloat16, in any layout.
        key: ``[1, K, S, E]``.
        value: ``[1, K, S, E]``.
        scale: factor on the scores.
        lengths: of the segments.
        causal: no query sees a later key.

    Returns:
        ``[1, S, H, E]``.
    """
    return _Attention.apply(query, key, value, scale, lengths, causal)  # type: ignore[no-any-return]


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float, lengths: tuple[int, ...], causal: bool
    ) -> Tensor:
        query, key, value = (_whole(tensor) for tensor in (query, key, value))
        _, heads, tokens, width = query.shape
        output = query.new_empty(1, tokens, heads, width)
        logarithms = query.new_empty(heads, tokens, dtype=torch.float32)
        _call("attend", (query, key, value, output.transpose(1, 2)), logarithms, (), lengths, scale, causal)
        ctx.scale, ctx.lengths, ctx.causal = scale, lengths, causal
        ctx.save_for_backward(query, key, value, output, logarithms)
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, output, logarithms = ctx.saved_tensors
        gradients = [
            torch.empty_like(tensor.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)
            for tensor in (query, key, value)
        ]
        inputs = (_whole(grad.transpose(1, 2)), query, key, value, output.transpose(1, 2))
        _call("attend_backward", inputs, logarithms, gradients, ctx.lengths, ctx.scale, ctx.causal)
        return (*gradients, None, None, None)


def _whole(tensor: Tensor) -> Tensor:
    """The tensor with contiguous heads."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _call(
    name: str,
    inputs: tuple[Tensor, ...],
    logarithms: Tensor,
    outputs: tuple[()] | list[Tensor],
    lengths: tuple[int, ...],
    scale: float,
    causal: bool,
) -> None:
    _, heads, _, width = inputs[-1].shape
    key = inputs[-3]
    ends = torch.tensor([0, *accumulate(lengths)])
    library()[f"{name}_{SUFFIXES[key.dtype]}"](
        *_addresses(inputs), logarithms.data_ptr(), *_addresses(outputs), ends.data_ptr(), len(lengths), heads,
        key.shape[1], width, scale, int(causal), torch.get_num_threads(),
    )  # fmt: skip


def _addresses(tensors: tuple[Tensor, ...] | list[Tensor]) -> list[int]:
    """The address, the token stride and the head stride of every ``[1, H, S, E]``."""
    return [number for tensor in tensors for number in (tensor.data_ptr(), tensor.stride(2), tensor.stride(1))]
