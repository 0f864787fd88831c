"""Attention for padding-free batches: every segment attends to itself alone, without a mask.

Shapes: ``H`` heads, ``S`` tokens of the whole row, ``G`` segments, ``K`` supervised positions, ``E`` head width.

A dense block-diagonal mask costs the square of the row's length, segments the sum of their squares (2.4 times faster on
a CPU). `cpu_attention` computes them on a CPU, PyTorch's `varlen_attn` (`gpu_attention`) or a loop on a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward

from mm_moslora.kernels.attention import cpu_attention
from mm_moslora.kernels.attention.cpu_attention import attend_on_cpu
from mm_moslora.kernels.attention.gpu_attention import HeadShape, VarlenKernel, pytorch_kernel
from mm_moslora.utils.errors import ConfigError

SEGMENTS = "mm_moslora_segments"
"""Name under which the attention is registered with transformers."""
PICTURES = "mm_moslora_pictures"
"""Name of the vision towers' attention."""
_BEYOND_SOFTMAX = ("softcap", "s_aux", "sinks", "position_bias")
"""Arguments of transformers' layers that change the scores."""


@dataclass(frozen=True, kw_only=True)
class StepContext:
    """The segments of a packed row, as the keyword `step_context` of decoder layers and of their attention."""

    segment_lengths: tuple[int, ...]
    """Tokens of each segment; the sum is ``S``, or ``E`` with `spread`."""
    ends: Tensor
    """Starts of the segments and the end of the last one, int32 ``[G + 1]``."""
    spread: Tensor | None = None
    """Places in the row of the tokens of all segments, int64 ``[E]``, where segments share beginnings that stand in the
    row once; None: they share none."""
    kept: Tensor | None = None
    """The inverse, int64 ``[S]``: a place among the tokens of all segments for each token of the row."""
    target_positions: Tensor | None = None
    """Positions of the last layer that the head reads, int64 ``[K]``; None: all."""
    rotary: dict[Any, Any] = field(default_factory=dict, compare=False)
    """What layers compute from the position embeddings that they share, kept by the first."""


def segment_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    *,
    step_context: StepContext,
    **rest: Any,
) -> tuple[Tensor, None]:
    """Causal attention ``[1, S, H, E]`` within each segment of a row; a window includes the token itself."""
    if step_context.spread is not None and step_context.kept is not None:
        # Products of weights are computed once for a shared beginning, and its scores in every segment that has it.
        q, k, v = (tensor.index_select(2, step_context.spread) for tensor in (query, key, value))
        alone = replace(step_context, spread=None, kept=None)
        output, _ = segment_attention(
            module, q, k, v, attention_mask, dropout, scaling, sliding_window, step_context=alone, **rest
        )
        return output.index_select(1, step_context.kept), None
    segment_lengths, ends = step_context.segment_lengths, step_context.ends
    assert attention_mask is None
    assert sum(segment_lengths) == query.shape[2], "segment lengths must sum to the row"
    if more := sorted(name for name in _BEYOND_SOFTMAX if rest.get(name) is not None):
        raise ConfigError(
            f"The attention of {type(module).__name__} has {', '.join(more)}, which this attention leaves out. Set "
            "model.attention to eager."
        )
    longest = max(segment_lengths)
    windowed = sliding_window is not None and longest > sliding_window
    if not dropout and (kernel := varlen_kernel(query, key)) is not None:
        q, k, v = (tensor.squeeze(0).transpose(0, 1) for tensor in (query, key, value))
        window = sliding_window - 1 if windowed and sliding_window else -1
        return kernel(q, k, v, ends, longest, scaling, window).unsqueeze(0), None
    if query.device.type in ("cpu", "meta") and not (windowed or dropout):
        return attend_on_cpu(query, key, value, scaling, segment_lengths, causal=True), None
    groups = query.shape[1] // key.shape[1]
    key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    outputs = []
    for q, k, v in zip(*(tensor.split(segment_lengths, dim=2) for tensor in (query, key, value)), strict=True):
        length = q.shape[2]
        mask = None
        if sliding_window and length > sliding_window:
            distance = torch.arange(length, device=q.device)[:, None] - torch.arange(length, device=q.device)[None, :]
            mask = (distance >= 0) & (distance < sliding_window)
        outputs.append(
            nn.functional.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, dropout_p=dropout, scale=scaling, is_causal=mask is None
            )
        )
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous(), None


def varlen_kernel(query: Tensor, key: Tensor) -> VarlenKernel | None:
    """The kernel that takes all segments in one call; None: there is none for these tensors."""
    groups = query.shape[1] // key.shape[1]
    shape = HeadShape(device=query.device, dtype=query.dtype, width=query.shape[-1], groups=groups)
    return pytorch_kernel(shape).kernel if query.device.type == "cuda" else None


def picture_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **rest: Any,
) -> tuple[Tensor, None]:
    """Attention among all patches of a picture: that of transformers, except where another is faster on a CPU."""
    causal = getattr(module, "is_causal", True) if rest.get("is_causal") is None else rest["is_causal"]
    plain = attention_mask is None and not dropout and not causal and query.shape == key.shape
    pictures, _, patches, _ = query.shape
    by_products = (
        query.device.type == "cpu" and query.dtype.itemsize == 2 and cpu_attention.products_are_faster(query[0])
    )
    if plain and by_products:
        # One row, a segment per picture.
        q, k, v = (tensor.transpose(1, 2).flatten(0, 1).transpose(0, 1)[None] for tensor in (query, key, value))
        output = attend_on_cpu(q, k, v, scaling, (patches,) * pictures, causal=False)
        return output[0].unflatten(0, (pictures, patches)), None
    options = {"dropout": dropout, "scaling": scaling, **rest}
    return sdpa_attention_forward(module, query, key, value, attention_mask, **options)  # type: ignore[no-any-return]


# Without a mask function: transformers would make the host wait to see whether the row is packed.
AttentionInterface.register(SEGMENTS, segment_attention)
AttentionInterface.register(PICTURES, picture_attention)


def segment_arguments(
    segment_lengths: tuple[int, ...],
    device: torch.device,
    *,
    target_positions: Tensor | None = None,
    shared: tuple[int, ...] = (),
) -> dict[str, Any]:
    """Keyword arguments with the segments of a row, for this module's attention and for flash-attention."""
    # `shared`: tokens of the last segment that shares none which each segment has before its own; this module's only.
    if min(segment_lengths) < 1:
        raise ValueError(f"A row has segments of {segment_lengths} tokens, but each needs at least one.")
    spread = kept = None
    if any(shared):
        places, inverse = _shared_places(segment_lengths, shared)
        spread, kept = (indices.to(device, non_blocking=True) for indices in (places, inverse))
        segment_lengths = tuple(map(sum, zip(segment_lengths, shared, strict=True)))
    # A sum on the host and an asynchronous copy: a sum on the device would make the host wait for it.
    ends = torch.tensor([0, *accumulate(segment_lengths)], dtype=torch.int32).to(device, non_blocking=True)
    longest = max(segment_lengths)
    return {
        "step_context": StepContext(
            segment_lengths=segment_lengths, ends=ends, spread=spread, kept=kept, target_positions=target_positions
        ),
        "cu_seq_lens_q": ends,
        "cu_seq_lens_k": ends,
        "max_length_q": longest,
        "max_length_k": longest,
    }


def _shared_places(lengths: tuple[int, ...], shared: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """`StepContext.spread` and `kept`, in main memory; see `segment_arguments`."""
    places: list[int] = []
    kept: list[int] = []
    start = whole = 0
    for length, beginning in zip(lengths, shared, strict=True):
        whole = whole if beginning else start
        places += [*range(whole, whole + beginning), *range(start, start + length)]
        kept += range(len(places) - length, len(places))
        start += length
    return torch.tensor(places), torch.tensor(kept)
