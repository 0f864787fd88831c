"""Token-weighted cross entropy over supervised positions.

Shapes: ``K`` supervised positions of a micro-batch, ``C`` vocabulary.

The loss of an optimiser step is ``sum over supervised tokens / global count of supervised tokens``; it does not depend
on how the step is split into ranks, micro-batches or packs.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import cross_entropy


def token_loss_sum(logits: Tensor, targets: Tensor) -> Tensor:
    """Sum of the cross entropies, in fp32.

    Args:
        logits: ``[K, C]`` in any floating dtype; ``K`` may be 0, the sum is then 0 and carries a gradient of zero.
        targets: int64 ``[K]``.
    """
    return cross_entropy(logits.float(), targets, reduction="sum")
