"""Adapted layers: PEFT's LoRA layers with a mixer between A and B.

Shapes: x ``[..., D_in]``, A ``[R, D_in]``, M ``[R, R]``, B ``[D_out, R]``.

`create_layer` is the only entrance. It knows the module types that are supported and raises for every other one;
PEFT's own dispatch, left to itself, would put plain LoRA on a quantised layer without a word.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from peft import LoraConfig
from peft.tuners import lora
from peft.tuners.lora.layer import LoraVariant
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import transpose
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from mm_moslora.adapters.functional import current_kernel, delta_weight, fused_linear
from mm_moslora.adapters.mixer import Mixer, init_mixer
from mm_moslora.errors import AdapterError

if TYPE_CHECKING:
    from mm_moslora.adapters.config import MoSLoRAConfig

_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class MoSLoRAVariant(LoraVariant):
    """PEFT's view of the method: how a LoRA layer starts, runs, merges and unmerges with a mixer."""

    @staticmethod
    def init(module: Any, adapter_name: str, config: Any = None, **kwargs: Any) -> None:
        """Create the mixer next to A and B, on their device and in their dtype."""
        like = module.lora_A[adapter_name].weight
        weight = init_mixer(
            module.r[adapter_name], module.mixer_init[adapter_name], dtype=like.dtype, device=like.device
        )
        module.lora_mixer[adapter_name] = Mixer(weight, trainable=config.mixer_trainable)

    @staticmethod
    def forward(module: Any, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any) -> Tensor:
        """``result + s B(M(A(dropout(x))))``, by calling the submodules: their hooks (ZeRO-3, FSDP) must fire."""
        z = module.lora_A[active_adapter](module.lora_dropout[active_adapter](x))
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


@dataclass(frozen=True, kw_only=True)
class Factors:
    """One adapter's factors in one layer."""

    A: Tensor
    """``[R, D_in]``."""
    M: Tensor | None
    """``[R, R]``; None is the frozen identity (plain LoRA)."""
    B: Tensor
    """``[D_out, R]``."""
    scaling: float
    """s."""


class MoSLoRALayer(nn.Module, lora.LoraLayer):
    """What all adapted layer types share: the mixers, by adapter name."""

    adapter_layer_names = (*lora.LoraLayer.adapter_layer_names, "lora_mixer")
    other_param_names = (*lora.LoraLayer.other_param_names, "mixer_init")

    lora_mixer: nn.ModuleDict
    mixer_init: dict[str, str]
    _adding: str
    _module_path: str

    def update_layer(self, adapter_name: str, r: int, *args: Any, **kwargs: Any) -> None:
        """Add or replace one adapter; see `peft`'s `LoraLayer.update_layer`."""
        if not hasattr(self, "lora_mixer"):
            self.lora_mixer = nn.ModuleDict()
            self.mixer_init = {}
        # PEFT resolves the variant before it hands the module's path on, and the path decides the mixer.
        self._adding, self._module_path = adapter_name, kwargs.get("target_name", "")
        super().update_layer(adapter_name, r, *args, **kwargs)

    def resolve_lora_variant(self, *, config: LoraConfig, **kwargs: Any) -> LoraVariant | None:
        """The mixer's variant, or what PEFT does where there is no mixer."""
        if not hasattr(config, "mixer_init"):
            return super().resolve_lora_variant(config=config, **kwargs)
        own = cast("MoSLoRAConfig", config)
        if own.is_plain(self._module_path):
            return super().resolve_lora_variant(config=own.to_lora_config(), **kwargs)
        self.mixer_init[self._adding] = own.mixer_for(self._module_path)
        return MoSLoRAVariant()

    def factors(self, adapter_name: str) -> Factors:
        """A, M, B and s of one adapter; the parameters themselves."""
        mixer = self.lora_mixer[adapter_name].weight if adapter_name in self.lora_mixer else None
        return Factors(
            A=cast(Tensor, self.lora_A[adapter_name].weight),
            M=cast("Tensor | None", mixer),
            B=cast(Tensor, self.lora_B[adapter_name].weight),
            scaling=self.scaling[adapter_name],
        )

    @property
    def widths(self) -> tuple[int, int]:
        """``(D_in, D_out)``."""
        return cast(int, self.in_features), cast(int, self.out_features)

    def wide_delta(self, adapter_name: str) -> Tensor:
        """``s B M A`` in the layout of the base weight, at least float32."""
        factors = self.factors(adapter_name)
        update = delta_weight(factors.A, factors.M, factors.B, factors.scaling)
        return transpose(update, bool(self.fan_in_fan_out))

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        """Give a mixer the identity when A comes without one.

        Folded factors and plain LoRA carry no mixer. Loading them beside a mixer that keeps its random start would be
        wrong in silence; with the identity it is exact.
        """
        for adapter_name in self.lora_mixer:
            key = f"{prefix}lora_mixer.{adapter_name}.weight"
            factor = state_dict.get(f"{prefix}lora_A.{adapter_name}.weight")
            if factor is not None and key not in state_dict:
                state_dict[key] = torch.eye(factor.shape[0], dtype=factor.dtype, device=factor.device)
        super()._load_from_state_dict(state_dict, prefix, *args)


class MoSLoRALinear(MoSLoRALayer, lora.Linear):
    """`nn.Linear` (or transformers' `Conv1D`) with LoRA and a mixer."""

    def get_delta_weight(self, adapter: str) -> Tensor:
        """``s B M A`` in the layout of the base weight and the dtype of B."""
        if adapter not in self.lora_mixer:
            return super().get_delta_weight(adapter)
        return self.wide_delta(adapter).to(self.factors(adapter).B.dtype)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Base output plus the active adapters, ``[..., D_out]``."""
        adapter = None if args or kwargs else self._fusable_adapter(x)
        if adapter is None:
            return super().forward(x, *args, **kwargs)
        base = cast(nn.Linear, self.base_layer)
        factors = self.factors(adapter)
        return fused_linear(x, base.weight, base.bias, factors.A, factors.M, factors.B, factors.scaling)

    def _fusable_adapter(self, x: Tensor) -> str | None:
        """The one active adapter, if the fused kernel computes exactly what the modules would."""
        kernel = current_kernel()
        if kernel == "reference" or self.disable_adapters or self.merged:
            return None
        active = [name for name in self.active_adapters if name in self.lora_A]
        if len(active) != 1:
            return None
        name = active[0]
        plain = name not in self.lora_mixer
        if plain and (kernel == "auto" or name in self.lora_variant):
            return None
        dropout = self.lora_dropout[name]
        if self.lora_bias[name] or (self.training and not isinstance(dropout, nn.Identity)):
            return None
        return name if self._base_is_plain(x, self.factors(name).A) else None

    def _base_is_plain(self, x: Tensor, A: Tensor) -> bool:
        base = self.base_layer
        # Hooks and replaced forwards (offloading, tensor parallelism) only run when the base is called as a module.
        if type(base).forward is not nn.Linear.forward or "forward" in base.__dict__:
            return False
        if base._forward_hooks or base._forward_pre_hooks or base._backward_hooks or base._backward_pre_hooks:
            return False
        weight = base.weight
        if hasattr(weight, "ds_id") or hasattr(A, "ds_id"):
            # ZeRO-3 fetches a shard when its own module is called.
            return False
        return (
            not weight.requires_grad
            and weight.dtype == x.dtype
            and not torch.is_autocast_enabled(x.device.type)
            and not torch.compiler.is_compiling()
        )


def create_layer(target: nn.Module, adapter_name: str, *, config: MoSLoRAConfig, **kwargs: Any) -> nn.Module:
    """The adapted layer around `target`; PEFT calls this for every module it replaces.

    Args:
        target: the layer to adapt.
        adapter_name: the adapter's name.
        config: the adapter's configuration.
        **kwargs: PEFT's own (rank, alpha, the module's path, ...).

    Raises:
        AdapterError: a module type, a quantised weight or a single parameter that cannot be adapted.
    """
    path = kwargs.get("target_name", "")
    if kwargs.pop("parameter_name", None) is not None:
        raise AdapterError("target_parameters is not supported with a mixer. Name modules in target_modules.")
    base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
    reason = why_not_adaptable(base)
    if reason:
        raise AdapterError(f"{path or type(base).__name__} cannot carry MoSLoRA: {reason}")
    is_conv1d = isinstance(base, Conv1D)
    # Per layer, not in the user's configuration: one model may hold both layouts.
    own = config if config.fan_in_fan_out == is_conv1d else _with_layout(config, is_conv1d)
    return MoSLoRALinear(target, adapter_name, config=own, is_target_conv_1d_layer=is_conv1d, **kwargs)


def why_not_adaptable(base: nn.Module) -> str | None:
    """Why a module cannot be adapted, None if it can."""
    if not isinstance(base, nn.Linear | Conv1D):
        return (
            f"it is {type(base).__module__}.{type(base).__name__}, expected torch.nn.Linear or transformers' Conv1D. "
            "Choose other targets."
        )
    weight = base.weight
    if type(weight) not in (nn.Parameter, Tensor) or weight.dtype not in _FLOATS:
        return (
            f"its weight is quantised or sharded ({type(weight).__name__}, {weight.dtype}), and stock PEFT would put "
            "plain LoRA there without a word. Load the base in float32, bfloat16 or float16."
        )
    return None


def _with_layout(config: MoSLoRAConfig, fan_in_fan_out: bool) -> MoSLoRAConfig:
    own = copy.copy(config)
    own.fan_in_fan_out = fan_in_fan_out
    return own
