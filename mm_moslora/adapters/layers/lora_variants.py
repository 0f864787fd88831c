"""Start, forward pass, merge and unmerge of a LoRA layer with a mixer: PEFT's variant interface, one class per type.

Shapes: x ``[..., D_in]`` (token ids for embeddings, ``[N, C, H, W]`` for convolutions), A ``[R, D_in]``, M ``[R, R]``,
B ``[D_out, R]``.

DoRA (arXiv 2402.09353) scales every row of ``W + s B A`` to a trained length. With a mixer the direction is
``W + s B M A``; PEFT's DoRA modules compute it when ``M A`` (or ``B M``) takes the place of A (or B).
"""

from __future__ import annotations

from typing import Any, ClassVar

from peft.tuners.lora import variants as stock
from peft.tuners.lora.dora import DoraConv2dLayer, DoraEmbeddingLayer, DoraLinearLayer
from peft.tuners.lora.layer import LoraVariant
from torch import Tensor, nn

from mm_moslora.kernels.lora.lora_math import fold, is_traced
from mm_moslora.kernels.lora.mixed_product import combine
from mm_moslora.kernels.lora.seeded_dropout import seeded_dropout


class MoSLoRAVariant(LoraVariant):
    """The mixer on a linear layer; merging works on every layer type."""

    @staticmethod
    def init(module: Any, adapter_name: str, config: Any = None, **kwargs: Any) -> None:
        """Create the mixer next to A and B, on their device and in their dtype."""
        module.start_factors(adapter_name, config)

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


class MixedFactor:
    """``M A`` in the place of the module A: a call mixes A's output, and `weight` is the folded factor."""

    def __init__(self, A: nn.Module, mixer: nn.Module, *, channels_first: bool = False) -> None:
        self._A, self._mixer, self._channels_first = A, mixer, channels_first

    @property
    def weight(self) -> Tensor:
        """``M A``, shaped like A."""
        folded = fold(self._A.weight, self._mixer.matrix())  # type: ignore[operator,arg-type]
        return folded.to(self._A.weight.dtype)  # type: ignore[arg-type]

    def __call__(self, x: Tensor) -> Tensor:
        """``M(A(x))``."""
        z = self._A(x).movedim(1, -1) if self._channels_first else self._A(x)
        mixed: Tensor = self._mixer(z)
        return mixed.movedim(-1, 1) if self._channels_first else mixed


class _Dora:
    """DoRA around ``W + s B M A``; merging is PEFT's, through `get_delta_weight`."""

    magnitudes: ClassVar[type[DoraLinearLayer]]
    """PEFT's module of the trained lengths."""
    channels_first: ClassVar[bool] = False

    @classmethod
    def init(cls, module: Any, adapter_name: str, config: Any = None, **kwargs: Any) -> None:
        """Create the mixer and the magnitudes."""
        module.start_factors(adapter_name, config)
        factors = module.factors(adapter_name)
        # PEFT hands over the factors of an embedding transposed.
        transposed = cls.magnitudes is DoraEmbeddingLayer or getattr(module, "fan_in_fan_out", False)
        magnitude = cls.magnitudes(fan_in_fan_out=transposed)
        folded = fold(factors.A, factors.M).to(factors.A.dtype)
        magnitude.update_layer(
            base_layer=module.get_base_layer(), lora_A=folded, lora_B=factors.B, scaling=factors.scaling
        )
        module.lora_magnitude_vector[adapter_name] = magnitude

    @classmethod
    def forward(cls, module: Any, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any) -> Tensor:
        """The layer's output, shaped like `result`."""
        dropout = module.lora_dropout[active_adapter]
        drops = module.training and not isinstance(dropout, nn.Identity)
        mixer = module.lora_mixer[active_adapter]
        total: Tensor = result + module.lora_magnitude_vector[active_adapter](
            dropout(x) if drops else x,
            lora_A=MixedFactor(module.lora_A[active_adapter], mixer, channels_first=cls.channels_first),
            lora_B=module.lora_B[active_adapter],
            scaling=module.scaling[active_adapter],
            base_layer=module.get_base_layer(),
            base_result=None if drops else result,
            adapter_name=active_adapter,
        )
        return total


class DoraMixerVariant(_Dora, stock.DoraLinearVariant):
    """DoRA with a mixer on a linear layer."""

    magnitudes = DoraLinearLayer


class DoraConvolutionVariant(_Dora, stock.DoraConv2dVariant):
    """DoRA with a mixer on a convolution."""

    magnitudes = DoraConv2dLayer
    channels_first = True


class DoraEmbeddingVariant(_Dora, stock.DoraEmbeddingVariant):
    """DoRA with a mixer on an embedding."""

    magnitudes = DoraEmbeddingLayer

    @classmethod
    def forward(cls, module: Any, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any) -> Tensor:
        """The looked-up rows, ``[..., D_out]``."""
        factors = module.factors(active_adapter)
        magnitude, branch = module.lora_magnitude_vector[active_adapter](
            x,
            lora_A=factors.A.T,
            lora_B=combine(factors.B, factors.M, factors.B.dtype).T,
            scaling=factors.scaling,
            base_layer=module.get_base_layer(),
            embed_fn=module._embed,
            adapter_name=active_adapter,
        )
        scale = module._get_embed_scale()
        total: Tensor = magnitude * result + (branch if scale is None else branch * scale.to(branch.dtype))
        return total
