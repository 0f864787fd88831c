"""Start, forward pass, merge and unmerge of a LoRA layer with a mixer: PEFT's variant interface, one class per type.

Shapes: x ``[..., D_in]`` (token ids for embeddings, ``[N, C, H, W]`` for convolutions), A ``[R, D_in]``, M ``[R, R]``,
B ``[D_out, R]``.
"""

from __future__ import annotations

from typing import Any

from peft.tuners.lora.layer import LoraVariant
from torch import Tensor, nn

from mm_moslora.kernels.lora.lora_math import is_traced
from mm_moslora.kernels.lora.seeded_dropout import seeded_dropout


class MoSLoRAVariant(LoraVariant):
    """The mixer on a linear layer; merging works on every layer type."""

    @staticmethod
    def init(module: Any, adapter_name: str, config: Any = None, **kwargs: Any) -> None:
        """Create the mixer next to A and B, on their device and in their dtype."""
        module.add_mixer(adapter_name, config)

    @staticmethod
    def forward(module: Any, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any) -> Tensor:
        """``result + s B(M(A(dropout(x))))``; the submodules are called, so that their hooks (ZeRO-3, FSDP) run."""
        dropout = module.lora_dropout[active_adapter]
        if module.training and isinstance(dropout, nn.Dropout):
            x = dropout(x) if is_traced() else seeded_dropout(x, dropout.p)
        z = module.lora_A[active_adapter](x)
        branch = module.lora_B[active_adapter](module.lora_mixer[active_adapter](z))
        total: Tensor = result + branch * module.scaling[active_adapter]
        return total

    @staticmethod
    def merge_safe(module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:
        """The merged weight as a new tensor."""
        merged: Tensor = orig_weight + module.wide_delta(active_adapter)
        return merged.to(orig_weight.dtype)

    @staticmethod
    def merge_unsafe(module: Any, active_adapter: str, orig_weight: Tensor) -> None:
        """Add the update in place; the sum is taken in float32 and rounded once."""
        orig_weight.data += module.wide_delta(active_adapter)

    @staticmethod
    def unmerge(module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:
        """The weight without the update."""
        restored: Tensor = orig_weight.data - module.wide_delta(active_adapter)
        return restored.to(orig_weight.dtype)


class ConvolutionVariant(MoSLoRAVariant):
    """The mixer on a convolution: it mixes the channels between A and B at every position."""

    @staticmethod
    def forward(module: Any, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any) -> Tensor:
        """``result + s B(M(A(dropout(x))))``, ``[N, D_out, H, W]``."""
        z = module.lora_A[active_adapter](module.lora_dropout[active_adapter](x))
        mixed = module.lora_mixer[active_adapter](z.movedim(1, -1)).movedim(-1, 1)
        total: Tensor = result + module.lora_B[active_adapter](mixed) * module.scaling[active_adapter]
        return total


class EmbeddingVariant(MoSLoRAVariant):
    """The mixer on an embedding: it mixes the column of A that a token looks up."""

    @staticmethod
    def forward(module: Any, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any) -> Tensor:
        """``result + s B M A[:, ids]``, ``[..., D_out]``; like PEFT without dropout."""
        z = module._embed(x, module.lora_embedding_A[active_adapter].T)
        mixed = module.lora_mixer[active_adapter](z)
        branch = (mixed @ module.lora_embedding_B[active_adapter].T) * module.scaling[active_adapter]
        scale = module._get_embed_scale()
        total: Tensor = result + (branch if scale is None else branch * scale.to(branch.dtype))
        return total
