"""Token-weighted cross entropy over supervised positions, a block of logits at a time.

Shapes: ``K`` supervised positions of a micro-batch, ``C`` vocabulary, ``D`` LLM width.

The loss of an optimiser step is ``sum over supervised tokens / global count of supervised tokens``; it does not depend
on the split into ranks, micro-batches or packs.
"""

from __future__ import annotations

from math import ceil
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from mm_moslora.models.transformers_patches import mix_in

CHUNK_BYTES = {"cpu": 32 * 2**20, "cuda": 512 * 2**20}
"""Largest block of logits, counted in fp32. On a CPU a few hundred positions: every block reads the head's weights."""
SMALLEST_CHUNK = 128
"""Smallest block in positions; below it the matrix products lose speed."""
CACHED_BYTES = 2 * 2**20
"""Bytes of fp32 logits that a CPU takes through all passes of the softmax at once."""


def token_loss_sum(logits: Tensor, targets: Tensor, right: Tensor | None = None) -> Tensor:
    """Sum of the cross entropies, in fp32.

    Args:
        logits: ``[K, C]`` in any floating dtype; for ``K = 0`` the sum and its gradient are 0.
        targets: int64 ``[K]``.
        right: see `head_loss_sum`.
    """
    if right is not None and targets.numel():
        seen = logits.detach()
        right += (seen.gather(1, targets[:, None]) == seen.amax(-1, keepdim=True)).sum()
    return cross_entropy(logits.float(), targets, reduction="sum")


class LossHead(nn.Linear):
    """A language-model head that can compute the loss; `use_loss_head` mixes it into a plain head."""

    def forward(self, input: Tensor, targets: Tensor | None = None, right: Tensor | None = None) -> Tensor:
        """Logits ``[..., C]``; with targets ``[K]``, the sum of the cross entropies of ``input`` ``[K, D]`` instead.

        The loss is part of the head's call: an engine that gathers weights per module (ZeRO-3) does it once, for any
        number of chunks.
        """
        if targets is None:
            return super().forward(input)
        if torch.is_autocast_enabled(input.device.type):
            return token_loss_sum(super().forward(input), targets, right)
        return cast(Tensor, _ChunkedLoss.apply(input, self.weight, targets, right))


def use_loss_head(model: PreTrainedModel) -> bool:
    """Make the model's head compute the loss in chunks, in place; False where it is not a plain linear layer."""
    head = model.get_output_embeddings()
    if type(head) is nn.Linear and head.bias is None and "forward" not in head.__dict__:
        mix_in(head, LossHead)
    return isinstance(head, LossHead)


def head_loss_sum(model: PreTrainedModel, hidden: Tensor, targets: Tensor, right: Tensor | None = None) -> Tensor:
    """Sum of the cross entropies of the head's logits, fp32 scalar.

    Args:
        model: its head is used.
        hidden: ``[K, D]``.
        targets: int64 ``[K]``.
        right: int64 scalar to which the number of positions is added at which no token is more probable than the
            target.
    """
    head: Any = model.get_output_embeddings()
    if isinstance(head, LossHead):
        return cast(Tensor, head(hidden, targets, right=right))
    return token_loss_sum(head(hidden), targets, right)


class _ChunkedLoss(torch.autograd.Function):
    """The gradients of a chunk are computed with its loss: nothing of size ``K x C`` is kept or computed twice."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, right: Tensor | None) -> Tensor:
        needs_hidden, needs_weight, *_ = ctx.needs_input_grad
        budget = CHUNK_BYTES.get(hidden.device.type, CHUNK_BYTES["cuda"])
        count = hidden.shape[0]
        most = max(SMALLEST_CHUNK, budget // (4 * weight.shape[0]))
        rows = max(1, ceil(count / max(1, ceil(count / most))))  # equal blocks, no small one at the end
        d_hidden = torch.empty_like(hidden) if needs_hidden else None
        d_weight = torch.zeros_like(weight, dtype=torch.float32) if needs_weight else None
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        for start in range(0, count, rows):
            part = hidden[start : start + rows]
            logits = part @ weight.t()
            wanted = targets[start : start + rows, None]
            total += _loss_(logits, wanted, right=right, pull=needs_hidden or needs_weight)
            if d_hidden is not None:
                torch.mm(logits, weight, out=d_hidden[start : start + rows])
            if d_weight is not None:
                d_weight.addmm_(logits.t().float(), part.float())
        ctx.dtype = weight.dtype
        ctx.save_for_backward(d_hidden, d_weight)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        d_hidden, d_weight = ctx.saved_tensors
        # In fp32: a loss scale (fp16) may overflow the narrow dtype where its product with a small gradient does not.
        scaled = None if d_hidden is None else (d_hidden.float() * grad).to(d_hidden.dtype)
        return scaled, None if d_weight is None else (d_weight * grad).to(ctx.dtype), None, None


def _loss_(logits: Tensor, wanted: Tensor, *, right: Tensor | None, pull: bool) -> Tensor:
    """Sum of the cross entropies, in fp32; on a CPU a few rows at a time.

    Args:
        logits: ``[K, C]``, overwritten; with `pull` by their gradient.
        wanted: targets, int64 ``[K, 1]``.
        right: see `head_loss_sum`.
        pull: whether the gradient is computed.
    """
    rows = max(1, CACHED_BYTES // (4 * logits.shape[1])) if logits.device.type == "cpu" else max(1, logits.shape[0])
    total = torch.zeros((), dtype=torch.float32, device=logits.device)
    for block, own in zip(logits.split(rows), wanted.split(rows), strict=True):
        wide = block.float()
        picked, top = wide.gather(1, own), wide.amax(-1, keepdim=True)
        if right is not None:
            right += (picked == top).sum()
        norm = wide.sub_(top).exp_().sum(-1, keepdim=True)
        total += (top + norm.log() - picked).sum()
        if not pull:
            continue
        wide.div_(norm).scatter_add_(1, own, torch.full_like(own, -1, dtype=wide.dtype))
        if wide is not block:
            block.copy_(wide)
    return total
