"""Adapted embeddings and convolutions.

Shapes: A ``[R, D_in]`` (embedding: a column per token; convolution: ``[R, C, h, w]``), M ``[R, R]``, B ``[D_out, R]``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from peft.tuners.lora.layer import Conv2d as StockConv2d
from peft.tuners.lora.layer import Embedding as StockEmbedding
from torch import Tensor

from mm_moslora.adapters.layers.adapter_layers import MoSLoRALayer
from mm_moslora.adapters.layers.lora_variants import ConvolutionVariant, EmbeddingVariant
from mm_moslora.kernels.lora.lora_math import delta_weight


class MoSLoRAEmbedding(MoSLoRALayer, StockEmbedding):
    """`nn.Embedding` with LoRA and a mixer. In PEFT's start A is zero and B is random here."""

    mixer_variant = EmbeddingVariant
    outer_names = ("lora_embedding_A", "lora_embedding_B")
    random_factor = 1

    def wide_delta(self, adapter_name: str) -> Tensor:
        """``(s B M A)^T``, ``[V, D_out]`` like the base weight."""
        factors = self.factors(adapter_name)
        return delta_weight(factors.A, factors.M, factors.B, factors.scaling).T

    def _mixed_batch_forward(self, x: Tensor, *args: Any, adapter_names: Sequence[str], **kwargs: Any) -> Tensor:
        """A batch with an adapter per row; PEFT's method ignores variants on embeddings and would drop the mixer."""
        result: Tensor = self.base_layer(x, *args, **kwargs)
        for name in sorted({name for name in adapter_names if self.holds(name)}):
            rows = [index for index, wanted in enumerate(adapter_names) if wanted == name]
            if name in self.lora_mixer:
                result[rows] = EmbeddingVariant.forward(self, name, x[rows], result[rows]).to(result.dtype)
            else:
                plain = StockEmbedding._mixed_batch_forward(self, x[rows], adapter_names=[name] * len(rows))
                result[rows] = plain.to(result.dtype)
        return result


class MoSLoRAConv2d(MoSLoRALayer, StockConv2d):
    """`nn.Conv2d` with LoRA and a mixer over the channels between A and B."""

    mixer_variant = ConvolutionVariant
