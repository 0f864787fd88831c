"""Linear layers that the fused kernel computes; shapes as in `adapter_layers`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, cast, get_args

from peft.tuners import lora
from torch import Tensor, nn

from mm_moslora.adapters.layers.adapter_layers import MoSLoRALayer
from mm_moslora.adapters.layers.base_weights import fetches_whole, only_fetches, weight_of
from mm_moslora.adapters.layers.lora_variants import MoSLoRAVariant
from mm_moslora.adapters.mixer import Mixer
from mm_moslora.kernels.lora.lora_linear import LinearOperands, compute_dtype, fused_linears
from mm_moslora.kernels.lora.lora_math import is_traced
from mm_moslora.kernels.lora.mixed_product import mixed_product
from mm_moslora.kernels.lora.seeded_dropout import exact_rate
from mm_moslora.utils.errors import AdapterError, suggestion

Kernel = Literal["auto", "reference", "fused"]

# Other types are wrappers (FSDP's, for example) or replacements by the user.
_FACTOR_TYPES = (nn.Linear, Mixer)


class FusedLinear(MoSLoRALayer):
    """A linear layer that the fused kernel computes where PEFT's layer computes nothing more."""

    kernel: Kernel = "auto"
    """See `use_kernel`."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Base output plus the active adapters, ``[..., D_out]``."""
        if args or kwargs or is_traced():
            return super().forward(x, *args, **kwargs)  # type: ignore[no-any-return]
        layer = self.fused_operands(x)
        return super().forward(x) if layer is None else fused_linears(x, [layer])[0]  # type: ignore[no-any-return]

    def fused_operands(self, x: Tensor, *, plain_too: bool = False) -> LinearOperands | None:
        """This layer's operands for the fused kernel; None where the modules would compute something else."""
        # `plain_too`: also for an adapter without any mixer in the model, which the kernel `auto` leaves to PEFT.
        adapter = self._fusable_adapter(plain_too=plain_too)
        if adapter is None:
            return None
        base = cast(nn.Linear, self.base_layer)
        weight = weight_of(base, x)
        if weight is None:
            return None
        if (not isinstance(weight, Tensor) or hasattr(weight, "ds_id")) and not fetches_whole(self):
            return None
        parts = [part[adapter] for part in (self.lora_A, self.lora_B, self.lora_mixer) if adapter in part]
        if not all(map(self._only_holds, parts)):
            return None
        A, B = (cast(Tensor, part[adapter].weight) for part in (self.lora_A, self.lora_B))
        M = cast(Tensor, self.lora_mixer[adapter].weight) if adapter in self.lora_mixer else None
        dropout = self.lora_dropout[adapter]
        rate = exact_rate(dropout.p) if self.training and isinstance(dropout, nn.Dropout) else 0.0
        C = mixed_product(B, M, self.scaling[adapter] / (1.0 - rate), compute_dtype(x))
        return LinearOperands(weight=weight, bias=base.bias, A=A, C=C, dropout=rate)

    @staticmethod
    def _only_holds(part: nn.Module) -> bool:
        """Whether a factor's weight can be read without calling its module (FSDP and offloading gather in a call)."""
        return type(part) in _FACTOR_TYPES and "forward" not in part.__dict__ and only_fetches(part)

    def _fusable_adapter(self, *, plain_too: bool) -> str | None:
        """The one active adapter, if the fused kernel computes exactly what the modules compute."""
        if self.kernel == "reference" or self.disable_adapters or self.merged:
            return None
        active = [name for name in self.active_adapters if name in self.lora_A]
        if len(active) != 1:
            return None
        name = active[0]
        mixed = name in self.lora_mixer
        left_to_peft = self.kernel == "auto" and not plain_too and name not in self.mixer_init
        if not mixed and (left_to_peft or name in self.lora_variant):
            return None
        if mixed and type(self.lora_variant[name]) is not MoSLoRAVariant:
            return None
        if self.lora_bias[name] or not isinstance(self.scaling[name], int | float):
            return None
        return name


class MoSLoRALinear(FusedLinear, lora.Linear):
    """`nn.Linear` (or transformers' `Conv1D`) with LoRA and a mixer."""


@contextmanager
def use_kernel(model: nn.Module, kernel: Kernel) -> Iterator[None]:
    """Choose how the adapted layers of a model compute within the block, in whatever thread.

    Args:
        kernel: `auto` (fused where it applies; outside of lean layers, PEFT's path for adapters without any mixer),
            `reference` (always factor by factor) or `fused` (those too).

    Raises:
        AdapterError: another name.
    """
    if kernel not in get_args(Kernel):
        hint = suggestion(kernel, get_args(Kernel))
        raise AdapterError(f"The kernel is {kernel!r}, expected one of {', '.join(get_args(Kernel))}.{hint}")
    before = [(layer, layer.kernel) for layer in model.modules() if isinstance(layer, FusedLinear)]
    try:
        for layer, _ in before:
            layer.kernel = kernel
        yield
    finally:
        for layer, earlier in before:
            layer.kernel = earlier
