"""Attention for padding-free batches: every segment attends to itself alone, without a mask.

Shapes: ``H`` heads, ``S`` tokens of the whole row, ``E`` head width.

A dense block-diagonal mask costs the square of the whole row; a loop over segments costs the sum of the squares and
was measured 2.4 times faster on a CPU. On CUDA, flash-attention's variable-length kernel is used when it is installed
(transformers passes it `cu_seq_lens_*`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import repeat_kv
from transformers.utils.import_utils import is_flash_attn_2_available

SEGMENTS = "mm_moslora_segments"
"""Name under which the attention is registered with transformers."""
SHORT = 256
"""Up to this length the CPU kernel's backward pass is faster in fp32 than in bf16 (twice as fast at 110 tokens)."""


def segment_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    segment_lengths: tuple[int, ...] = (),
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each segment of one row.

    Args:
        module: the attention layer.
        query: ``[1, H, S, E]``; key and value may have fewer heads.
        key: ``[1, H_kv, S, E]``.
        value: ``[1, H_kv, S, E]``.
        attention_mask: always None here.
        dropout: attention dropout.
        scaling: factor on the scores; None: ``E ** -0.5``.
        segment_lengths: lengths that sum to ``S``.
        sliding_window: how many tokens back a token sees; None: all.

    Returns:
        ``[1, S, H, E]`` and None.
    """
    assert attention_mask is None
    assert sum(segment_lengths) == query.shape[2], "segment lengths must sum to the row"
    windowed = sliding_window is not None and max(segment_lengths) > sliding_window
    if query.device.type in ("cpu", "meta") and not (windowed or dropout) and query.requires_grad:
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        return _CpuSegments.apply(query, key, value, scale, segment_lengths), None
    groups = query.shape[1] // key.shape[1]
    key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    dtype = query.dtype
    if query.device.type == "cpu" and max(segment_lengths) <= SHORT:
        query, key, value = query.float(), key.float(), value.float()
    outputs = []
    for q, k, v in zip(*(tensor.split(segment_lengths, dim=2) for tensor in (query, key, value)), strict=True):
        length = q.shape[2]
        windowed = sliding_window is not None and length > sliding_window
        mask = _window_mask(length, sliding_window, q.device) if windowed and sliding_window else None
        outputs.append(
            nn.functional.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, dropout_p=dropout, scale=scaling, is_causal=mask is None
            )
        )
    return torch.cat(outputs, dim=2).transpose(1, 2).to(dtype).contiguous(), None


class _CpuSegments(torch.autograd.Function):
    """Causal attention of every segment, keeping q, k, v and one output for all of them.

    The same kernel as `scaled_dot_product_attention` on a CPU. Called there, every segment's output is kept beside the
    concatenated one, and the repeated heads of grouped queries as well.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float, lengths: tuple[int, ...]) -> Tensor:
        _, heads, tokens, width = query.shape
        output = query.new_empty(1, tokens, heads, width)
        statistics = []
        for q, k, v, o in _segments(lengths, query, key, value, output.transpose(1, 2)):
            attended, logsumexp = _kernel(*_alike(q, k, v), 0.0, True, scale=scale)
            o.copy_(attended)
            statistics.append(logsumexp.transpose(1, 2).flatten())
        ctx.scale, ctx.lengths = scale, lengths
        ctx.save_for_backward(query, key, value, output, torch.cat(statistics))
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, output, statistics = ctx.saved_tensors
        gradients = [
            torch.empty_like(tensor.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)
            for tensor in (query, key, value)
        ]
        heads = query.shape[1]
        rows = (output.transpose(1, 2), grad.transpose(1, 2))
        parts = zip(
            _segments(ctx.lengths, query, key, value, *rows, *gradients),
            statistics.split([heads * length for length in ctx.lengths]),
            strict=True,
        )
        for (q, k, v, o, pull, *found), logsumexp in parts:
            wide = _alike(q, k, v, o, pull)
            # The kernel's statistics are [1, H, T], stored as [1, T, H].
            flat = logsumexp.view(1, q.shape[2], heads).transpose(1, 2)
            exact = _kernel_backward(wide[4], *wide[:4], flat, 0.0, True, scale=ctx.scale)
            for place, gradient in zip(found, exact, strict=True):
                place.copy_(_summed(gradient, place.shape[1]))
        return (*gradients, None, None)


_kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_kernel_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def _segments(lengths: tuple[int, ...], *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    return zip(*(tensor.split(lengths, dim=2) for tensor in tensors), strict=True)


def _alike(query: Tensor, key: Tensor, value: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    """Heads repeated for grouped queries, and short segments in fp32 (see `SHORT`)."""
    groups = query.shape[1] // key.shape[1]
    tensors = (query, repeat_kv(key, groups), repeat_kv(value, groups), *others)
    return tuple(tensor.float() for tensor in tensors) if query.shape[2] <= SHORT else tensors


def _summed(gradient: Tensor, heads: int) -> Tensor:
    """Gradients of repeated heads, added up."""
    if gradient.shape[1] == heads:
        return gradient
    return gradient.unflatten(1, (heads, -1)).sum(2)


def _window_mask(length: int, window: int, device: torch.device) -> Tensor:
    distance = torch.arange(length, device=device)[:, None] - torch.arange(length, device=device)[None, :]
    return (distance >= 0) & (distance < window)


def _no_mask(*_: Any, **__: Any) -> None:
    """Segments need no mask."""


AttentionInterface.register(SEGMENTS, segment_attention)
AttentionMaskInterface.register(SEGMENTS, _no_mask)


def training_attention(model: PreTrainedModel, requested: str = "auto") -> str:
    """Name of the attention to train with on padding-free batches.

    Args:
        model: the causal language model or VLM.
        requested: `auto`, or a transformers attention name that is then used as it is (sdpa builds a dense mask).
    """
    if requested != "auto":
        return requested
    device = next(model.parameters()).device
    if device.type == "cuda" and is_flash_attn_2_available():
        return "flash_attention_2"
    decoder = model.get_decoder()
    return SEGMENTS if getattr(decoder, "_supports_attention_backend", False) else "sdpa"


def set_attention(model: PreTrainedModel, name: str) -> None:
    """Switch the language model's attention; the vision tower keeps its own."""
    model.get_decoder().set_attn_implementation(name)


def segment_arguments(segment_lengths: tuple[int, ...], device: torch.device) -> dict[str, Any]:
    """Keyword arguments that tell an attention function where segments begin: ours and flash-attention's."""
    ends = torch.tensor((0, *segment_lengths), dtype=torch.int32, device=device).cumsum(0, dtype=torch.int32)
    longest = max(segment_lengths)
    return {
        "segment_lengths": segment_lengths,
        "cu_seq_lens_q": ends,
        "cu_seq_lens_k": ends,
        "max_length_q": longest,
        "max_length_k": longest,
    }
