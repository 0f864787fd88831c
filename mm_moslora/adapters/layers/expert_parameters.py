"""Adapted experts: stacked weights ``[E, D_out, D_in]`` that a module holds as a parameter, with a mixer per expert.

Shapes: E experts; A ``[R E, D_in]``, an expert's rows beside each other; B ``[D_out, R E]``, the columns of one rank
beside each other; M ``[E, R, R]``. PEFT's `ParamWrapper` adds ``s B M A`` of every expert to its weight while the
module that holds it computes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora.layer import LoraVariant, ParamWrapper
from torch import Tensor, nn

from mm_moslora.adapters.adapter_options import AdapterOptions
from mm_moslora.adapters.layers.adapter_layers import Factors, MoSLoRALayer
from mm_moslora.adapters.mixer import MixerForm, PerExpert
from mm_moslora.kernels.lora.lora_linear import is_plain
from mm_moslora.kernels.lora.lora_math import without_autocast
from mm_moslora.kernels.lora.mixed_product import fold_right

_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class MoSLoRAExperts(MoSLoRALayer, ParamWrapper):
    """PEFT's wrapper of one stacked parameter, with a mixer between A and B of every expert."""

    def update_layer(self, adapter_name: str, r: int, *args: Any, **kwargs: Any) -> None:
        """Add or replace one adapter; PEFT's wrapper takes no variant, so the mixer is made after A and B."""
        super().update_layer(adapter_name, r, *args, **kwargs)
        config = kwargs.get("config")
        if isinstance(config, AdapterOptions) and not config.is_plain(self._module_path):
            self.start_factors(adapter_name, config)
            self.set_adapter(self.active_adapters, inference_mode=bool(getattr(config, "inference_mode", False)))

    def resolve_lora_variant(self, *, config: LoraConfig, **kwargs: Any) -> LoraVariant | None:
        """No variant; see `update_layer`."""
        if isinstance(config, AdapterOptions) and config.has_mixer:
            self.mixer_init[self._adding] = config.mixer_for(self._module_path)
        return None

    def new_form(self, config: AdapterOptions) -> MixerForm:
        """The form that the configuration names, for every expert."""
        return PerExpert(super().new_form(config), self.num_experts)

    def factors(self, adapter_name: str) -> Factors:
        """A ``[E, R, D_in]``, M ``[E, R, R]`` and B ``[E, D_out, R]`` of one adapter."""
        stored = super().factors(adapter_name)
        A, B = by_expert(stored.A, stored.B, self.r[adapter_name])
        return Factors(A=A, M=stored.M, B=B, scaling=stored.scaling)

    def wide_delta(self, adapter_name: str) -> Tensor:
        """``s B M A`` of every expert in the layout of the parameter, at least float32."""
        A, B = by_expert(*self._mixed(adapter_name), self.r[adapter_name])
        dtype = torch.promote_types(torch.promote_types(A.dtype, B.dtype), torch.float32)
        with without_autocast(A.device):
            update = B.to(dtype) @ A.to(dtype) * self.scaling[adapter_name]
        return update if self._did_swap_in_out_features else update.mT

    def get_delta_weight(  # type: ignore[override]  # PEFT's two classes name the argument differently
        self, adapter: str, *args: Any, **kwargs: Any
    ) -> Tensor:
        """``s B M A`` of every expert in the layout and dtype of the parameter."""
        if adapter not in self.lora_mixer:
            plain: Tensor = ParamWrapper.get_delta_weight(self, adapter)
            return plain
        return self.wide_delta(adapter).to(self.get_param())

    def get_delta_factors(self, adapter_name: str) -> tuple[Tensor, Tensor, float]:
        """Left and right factor and s, as PEFT adds their product to the parameter; B M is the left or right one."""
        A, B = by_expert(*self._mixed(adapter_name), self.r[adapter_name])
        left, right = (B, A) if self._did_swap_in_out_features else (A.mT, B.mT)
        dtype = self.get_param().dtype
        return left.to(dtype), right.to(dtype), self.scaling[adapter_name]

    def _mixed(self, adapter_name: str) -> tuple[Tensor, Tensor]:
        """A and ``B M`` as they are stored; the latter rounds to the dtype of B, as a folded adapter in a file does."""
        A, B = self.outer_factors(adapter_name)
        M = super().factors(adapter_name).M
        with without_autocast(B.device):  # as PEFT adds the product
            return A, B if M is None else fold_right(B, M).to(B.dtype)

    @contextmanager
    def adapted_parameter(self) -> Iterator[Tensor]:
        """The parameter as the module that holds it sees it in a forward pass."""
        names = [] if self.disable_adapters or self.merged else self.active_adapters
        with self._activate_lora(names):
            yield self.get_param()


# PEFT finds the wrappers that it may nest by the name of their class.
MoSLoRAExperts.__name__ = ParamWrapper.__name__


def adapted_stacks(module: nn.Module) -> list[Tensor]:
    """The parameters below a module that PEFT's wrappers adapt, each of which a forward pass makes anew."""
    return [wrapper.get_param() for wrapper in module.modules() if isinstance(wrapper, ParamWrapper)]


def by_expert(A: Tensor, B: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A ``[E, R, D_in]`` and B ``[E, D_out, R]`` from the factors as PEFT stores them.

    Args:
        A: ``[R E, D_in]``.
        B: ``[D_out, R E]``.
        rank: R.
    """
    return A.unflatten(0, (-1, rank)), B.unflatten(1, (rank, -1)).permute(2, 0, 1)


def expert_factor_shapes(holder: nn.Module, name: str, rank: int) -> dict[str, tuple[int, ...]]:
    """Shapes of A and B of one parameter to adapt, under their names behind the wrapper's path.

    Args:
        holder: the module that holds it, without adapters.
        name: of the parameter in it.
        rank: R.
    """
    parameter = getattr(holder, name)
    experts, *widths = map(int, getattr(parameter, "ds_shape", parameter.shape))
    width_in, width_out = widths if getattr(holder, "is_transposed", False) else reversed(widths)
    return {"lora_A.weight": (rank * experts, width_in), "lora_B.weight": (width_out, rank * experts)}


def why_not_adaptable_parameter(holder: nn.Module, name: str) -> str | None:
    """Why a parameter cannot be adapted as a stack of experts, None if it can.

    Args:
        holder: the module that holds it, without adapters.
        name: of the parameter in it.
    """
    parameter = getattr(holder, name)
    shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
    if len(shape) != 3 or isinstance(holder, nn.Conv1d | nn.ConvTranspose1d):
        return (
            f"it is {list(shape)} in a {type(holder).__name__}, expected the weights of experts, [E, D_out, D_in]. "
            "Routers stay frozen, and linear layers are adapted as modules (targets, target_modules)."
        )
    if hasattr(holder, "_hf_hook") and parameter.is_meta:
        return "accelerate has offloaded it. Add or load the adapter first, and offload the model with it."
    if not is_plain(parameter.data) or parameter.dtype not in _FLOATS:
        return (
            f"it is quantised or sharded ({type(parameter.data).__name__}, {parameter.dtype}). Load the base in "
            "float32, bfloat16 or float16."
        )
    return None
