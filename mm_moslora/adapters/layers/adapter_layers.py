"""Adapted layers: PEFT's LoRA layers with a mixer between A and B.

Shapes: x ``[..., D_in]``, A ``[R, D_in]``, M ``[R, R]``, B ``[D_out, R]``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from peft import LoraConfig
from peft.tuners import lora
from peft.tuners.lora.layer import LoraVariant
from peft.utils.other import transpose
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from mm_moslora.adapters.adapter_options import AdapterOptions
from mm_moslora.adapters.folder_format import START_PART
from mm_moslora.adapters.layers.lora_variants import MoSLoRAVariant
from mm_moslora.adapters.mixer import Mixer, init_mixer, random_stream_of_mixers
from mm_moslora.kernels.lora.lora_math import delta_weight, fold, without_autocast
from mm_moslora.utils.errors import AdapterError


@dataclass(frozen=True, kw_only=True)
class Factors:
    """One adapter's factors in one layer."""

    A: Tensor
    """``[R, D_in]``; ``[R, C, h, w]`` in a convolution."""
    M: Tensor | None
    """``[R, R]``; None is the frozen identity (plain LoRA)."""
    B: Tensor
    """``[D_out, R]``; ``[D_out, R, 1, 1]`` in a convolution."""
    scaling: float
    """s."""


class MoSLoRALayer(nn.Module, lora.LoraLayer):
    """The base of all adapted layer types; holds the mixers, by adapter name."""

    adapter_layer_names = (*lora.LoraLayer.adapter_layer_names, "lora_mixer")
    other_param_names = (*lora.LoraLayer.other_param_names, "mixer_init", "initial_mixers")
    mixer_variant: ClassVar[type[LoraVariant]] = MoSLoRAVariant
    outer_names: ClassVar[tuple[str, str]] = ("lora_A.weight", "lora_B.weight")
    """A and B, as PEFT saves them below the module's path."""
    random_factor: ClassVar[int] = 0
    """Which of them starts random; the other starts at zero."""

    lora_mixer: nn.ModuleDict
    mixer_init: dict[str, str]
    """How M starts, or `none`, by adapter; adapters without any mixer in the model are left out."""
    initial_mixers: dict[str, Tensor]
    """M as training began, float32 on the CPU, by adapter name; values that are loaded without it remove it."""
    _adding: str
    _module_path: str

    def update_layer(self, adapter_name: str, r: int, *args: Any, **kwargs: Any) -> None:
        """Add or replace one adapter; see `peft`'s `LoraLayer.update_layer`."""
        if not hasattr(self, "lora_mixer"):
            self.lora_mixer = nn.ModuleDict()
            self.mixer_init = {}
            self.initial_mixers = {}
        # The module's path decides the mixer, and PEFT resolves the variant before it passes the path. For a new layer
        # of some types PEFT does not pass it at all; `create_layer` sets it in the configuration.
        path = str(kwargs.get("target_name") or getattr(kwargs.get("config"), "module_path", ""))
        self._adding, self._module_path = adapter_name, path
        super().update_layer(adapter_name, r, *args, **kwargs)
        config = kwargs.get("config")
        if isinstance(config, AdapterOptions) and config.factor_form == "mixed":
            self._mix_start(adapter_name, config)

    def resolve_lora_variant(self, *, config: LoraConfig, **kwargs: Any) -> LoraVariant | None:
        """The mixer's variant, or PEFT's where there is no mixer."""
        if not isinstance(config, AdapterOptions):
            return super().resolve_lora_variant(config=config, **kwargs)
        if config.has_mixer:
            self.mixer_init[self._adding] = config.mixer_for(self._module_path)
        if config.is_plain(self._module_path):
            return super().resolve_lora_variant(config=config.to_lora_config(), **kwargs)
        return self.mixer_variant()

    def add_mixer(self, adapter_name: str, config: AdapterOptions) -> None:
        """Create the mixer."""
        like, _ = self.outer_factors(adapter_name)
        rank = self.r[adapter_name]
        with random_stream_of_mixers():
            if like.is_meta:
                M = torch.empty(rank, rank, device="meta")
            else:
                M = init_mixer(rank, self.mixer_init[adapter_name])
        M = M.to(like)
        self.lora_mixer[adapter_name] = Mixer(M, trainable=config.mixer_trainable)
        if not like.is_meta:
            self.keep_initial_mixer(adapter_name, M)

    @torch.no_grad()
    def _mix_start(self, adapter_name: str, config: AdapterOptions) -> None:
        """Multiply the start of a mixer into A (into B of an embedding, whose A is zero); what trains is plain LoRA."""
        kind, factor = config.mixer_for(self._module_path), self.outer_factors(adapter_name)[self.random_factor]
        if kind == "none" or factor.is_meta:
            return
        with random_stream_of_mixers():
            M = init_mixer(self.r[adapter_name], kind).to(factor.device)
        factor.copy_(fold(factor.T, M.T).T if self.random_factor else fold(factor, M))

    def _outer(self) -> list[Any]:
        """PEFT's dictionaries of A and B: of modules, or of parameters where a layer keeps them bare."""
        return [getattr(self, name.partition(".")[0]) for name in self.outer_names]

    def holds(self, adapter_name: str) -> bool:
        """Whether this layer has factors of that adapter."""
        return adapter_name in self._outer()[0]

    def adapter_names(self) -> list[str]:
        """The adapters in this layer, sorted."""
        return sorted(self._outer()[0].keys())

    def outer_factors(self, adapter_name: str) -> tuple[Tensor, Tensor]:
        """A and B of one adapter, the parameters themselves; ``[R, V]`` and ``[D_out, R]`` in an embedding."""
        A, B = (factors[adapter_name] for factors in self._outer())
        return getattr(A, "weight", A), getattr(B, "weight", B)

    def factors(self, adapter_name: str) -> Factors:
        """A, M, B and s of one adapter; A, M and B are the parameters themselves. See `mixer` for what is refused."""
        A, B = self.outer_factors(adapter_name)
        return Factors(A=A, M=self.mixer(adapter_name), B=B, scaling=self.scaling[adapter_name])

    def mixer(self, adapter_name: str) -> Tensor | None:
        """M of one adapter, the parameter or buffer itself; None: the frozen identity.

        Raises:
            AdapterError: another module has replaced the `Mixer`, or computes M (torch.nn.utils.parametrize).
        """
        if adapter_name not in self.lora_mixer:
            return None
        module: Any = self.lora_mixer[adapter_name]
        own = isinstance(getattr(module, "trainable", None), bool)  # wrappers such as FSDP's pass attributes on
        if not own or is_parametrized(module):
            raise AdapterError(
                f"The mixer of adapter {adapter_name!r} was replaced by a {type(module).__name__}, which no reader of "
                "a folder knows. Put the Mixer back."
            )
        return cast(Tensor, module.weight)

    def keep_initial_mixer(self, adapter_name: str, mixer: Tensor | None) -> None:
        """Keep this M as the initial one; one of another rank, a shard and NaN leave it unknown."""
        self.initial_mixers.pop(adapter_name, None)
        if adapter_name not in self.lora_mixer or mixer is None:
            return
        if mixer.shape == (self.r[adapter_name],) * 2 and bool(mixer.isfinite().all()):
            self.initial_mixers[adapter_name] = mixer.detach().to("cpu", torch.float32, copy=True)

    def named_factor_shapes(self, adapter_name: str) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Names, as PEFT saves them below the module's path, and whole shapes of A, B and M."""
        factors = dict(zip(self.outer_names, self.outer_factors(adapter_name), strict=True))
        if (M := self.mixer(adapter_name)) is not None:
            factors["lora_mixer.weight"] = M
        for name, factor in factors.items():
            yield name, tuple(getattr(factor, "ds_shape", factor.shape))

    @property
    def widths(self) -> tuple[int, int]:
        """``(D_in, D_out)``."""
        return cast(int, self.in_features), cast(int, self.out_features)

    def wide_delta(self, adapter_name: str) -> Tensor:
        """``s B M A`` in the layout of the base weight, at least float32."""
        factors = self.factors(adapter_name)
        update = delta_weight(factors.A, factors.M, factors.B, factors.scaling)
        return transpose(update, bool(getattr(self, "fan_in_fan_out", False)))

    def get_delta_weight(self, adapter: str) -> Tensor:
        """``s B M A`` in the layout of the base weight and the dtype of B."""
        if adapter not in self.lora_mixer:
            with without_autocast(cast(Any, self).weight.device):
                plain: Tensor = super().get_delta_weight(adapter)  # type: ignore[misc]
            return plain
        return self.wide_delta(adapter).to(self.factors(adapter).B.dtype)

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        """Load the identity as the mixer where a state holds A and no mixer."""
        # Folded factors and plain LoRA have none. A random one would be silently wrong, the identity is exact.
        for adapter_name in self.lora_mixer:
            mixer = f"{prefix}lora_mixer.{adapter_name}.weight"
            names = (f"{prefix}lora_A.{adapter_name}.weight", f"{prefix}lora_embedding_A.{adapter_name}")
            factor = next((state_dict[name] for name in names if name in state_dict), None)
            if factor is not None or mixer in state_dict:
                initial = state_dict.pop(f"{prefix}{START_PART[1:]}{adapter_name}.weight", None)
                self.keep_initial_mixer(adapter_name, initial)
            if factor is not None and mixer not in state_dict:
                state_dict[mixer] = torch.eye(self.r[adapter_name], device="cpu").to(factor)
        super()._load_from_state_dict(state_dict, prefix, *args)
