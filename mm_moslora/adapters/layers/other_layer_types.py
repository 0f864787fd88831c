"""Adapted embeddings, convolutions and multi-head attention.

Shapes: A ``[R, D_in]`` (embedding: a column per token; convolution: ``[R, C, h, w]``), M ``[R, R]``, B ``[D_out, R]``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, cast

from peft import LoraConfig
from peft.tuners import lora
from peft.tuners.lora.layer import Conv2d as StockConv2d
from peft.tuners.lora.layer import Embedding as StockEmbedding
from peft.tuners.lora.layer import MultiheadAttention as StockAttention
from torch import Tensor, nn
from torch.func import functional_call

from mm_moslora.adapters.layers.adapter_layers import MoSLoRALayer
from mm_moslora.adapters.layers.fused_linear import MoSLoRALinear
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


class MoSLoRAMultiheadAttention(MoSLoRALayer, StockAttention):
    """`nn.MultiheadAttention` with LoRA and a mixer on in_proj (query, key and value as one) and on out_proj.

    `nn.MultiheadAttention` reads weights and calls no layer, so a forward pass runs with updated weights. PEFT 0.21
    adds the update to the base weights and subtracts it, which leaves rounding errors, and adds the update of out_proj
    twice, live and merged alike. Here the base weights do not change. The factor of two is kept: a saved folder means
    the same to stock PEFT.
    """

    OUT_PROJ_FACTOR: ClassVar[float] = 2.0

    def __init__(
        self,
        base_layer: nn.MultiheadAttention,
        adapter_name: str,
        config: LoraConfig,
        r: int = 0,
        lora_alpha: int = 1,
        **kwargs: Any,
    ) -> None:
        """Adapt both projections; see `peft`'s class."""
        nn.Module.__init__(self)
        lora.LoraLayer.__init__(self, base_layer, **kwargs)
        projection = MoSLoRALinear(
            base_layer.out_proj, adapter_name, config=config, r=r, lora_alpha=lora_alpha, **kwargs
        )
        self.base_layer.out_proj = projection
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config)

    def forward(  # type: ignore[override]  # PEFT's annotation leaves the attention weights out
        self, query: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """The attention of the base layer with adapted projections; arguments and result are the base layer's."""
        self._check_forward_args(query, *args, **kwargs)
        names = [name for name in self.active_adapters if self.holds(name)]
        if self.disable_adapters or self.merged or not names:
            if self.disable_adapters and self.merged:
                self.unmerge()
            plain: tuple[Tensor, Tensor | None] = self.base_layer(query, *args, **kwargs)
            return plain
        base = self.get_base_layer()
        projection = cast(MoSLoRALinear, base.out_proj)
        frozen = {"in_proj_weight": base.in_proj_weight, "out_proj.base_layer.weight": projection.weight}
        weights = cast("dict[str, Tensor]", frozen)
        for name in names:
            updates = (self.wide_delta(name), self.OUT_PROJ_FACTOR * projection.wide_delta(name))
            weights = {key: weight + update for (key, weight), update in zip(weights.items(), updates, strict=True)}
        dtype = projection.weight.dtype
        weights = {key: weight.to(dtype) for key, weight in weights.items()}
        adapted: tuple[Tensor, Tensor | None] = functional_call(base, weights, (query, *args), kwargs)
        return adapted
