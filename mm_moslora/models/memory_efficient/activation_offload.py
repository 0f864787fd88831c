"""Inputs of checkpointed layers in main memory until the backward pass recomputes the layers.

With checkpointing a layer keeps its input alone, ``[1, S, D]``: 2 D bytes per token in bf16.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu
from transformers import PreTrainedModel

from mm_moslora.models.transformers_patches import wrap_checkpointing


def offload_inputs(component: PreTrainedModel) -> None:
    """Keep the inputs of a component's checkpointed layers in pinned main memory until the backward pass."""

    def around(_: nn.Module, checkpoint: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def run(function: Callable[..., Tensor], *args: Any) -> Tensor:
            with save_on_cpu(pin_memory=True):  # the checkpoint's own hooks take what is inside
                return checkpoint(function, *args)

        return run

    wrap_checkpointing(component, around)
