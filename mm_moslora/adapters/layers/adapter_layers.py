"""Adapted layers: PEFT's LoRA layers with a mixer between A and B.

Shapes: x ``[..., D_in]``, A ``[R, D_in]``, M ``[R, R]``, B ``[D_out, R]``.

`MoSLoRALayer` is the base of all layer types, which are in `fused_linear`, `other_layer_types`, `quantised_layers` and
`bitsandbytes_layers`; `layer_dispatch` chooses.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, cast, runtime_checkable

import torch
from peft import LoraConfig
from peft.tuners import lora
from peft.tuners.lora.layer import LoraVariant
from peft.utils.integrations import dequantize_module_weight
from peft.utils.other import transpose
from torch import Tensor, nn

from mm_moslora.adapters.layers.lora_variants import MoSLoRAVariant
from mm_moslora.adapters.mixer import FrozenFactor, Mixer, init_mixer, orthonormal_rows
from mm_moslora.kernels.lora.lora_math import delta_weight
from mm_moslora.utils.errors import AdapterError


@runtime_checkable
class AdapterOptions(Protocol):
    """What layers and folders need to know of a configuration; `MoSLoRAConfig` has it."""

    mixer_trainable: bool
    use_dora: bool
    task_type: Any

    @property
    def mixer_form(self) -> str:
        """dense or diagonal."""

    @property
    def factor_form(self) -> str:
        """free, svd or orthonormal."""

    @property
    def changes_base(self) -> bool:
        """Whether the start of A and B is taken out of the base weight."""

    def is_plain(self, module_path: str) -> bool:
        """Whether one module is plain LoRA."""

    def mixer_for(self, module_path: str) -> str:
        """The initialisation of one module's mixer."""

    def to_dict(self) -> dict[str, Any]:
        """Every field."""

    def to_lora_config(self, **changes: Any) -> LoraConfig:
        """The same without the mixer."""


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
    other_param_names = (*lora.LoraLayer.other_param_names, "mixer_init", "factor_form")
    mixer_variant: ClassVar[type[LoraVariant]] = MoSLoRAVariant
    dora_variant: ClassVar[type[LoraVariant] | None] = None

    lora_mixer: nn.ModuleDict
    mixer_init: dict[str, str]
    factor_form: dict[str, str]
    _adding: str
    _module_path: str

    def update_layer(self, adapter_name: str, r: int, *args: Any, **kwargs: Any) -> None:
        """Add or replace one adapter; see `peft`'s `LoraLayer.update_layer`."""
        if not hasattr(self, "lora_mixer"):
            self.lora_mixer = nn.ModuleDict()
            self.mixer_init = {}
            self.factor_form = {}
        # The module's path decides the mixer, and PEFT resolves the variant before it passes the path. For a new layer
        # of some types PEFT does not pass it at all; `create_layer` sets it in the configuration.
        path = str(kwargs.get("target_name") or getattr(kwargs.get("config"), "module_path", ""))
        self._adding, self._module_path = adapter_name, path
        super().update_layer(adapter_name, r, *args, **kwargs)

    def resolve_lora_variant(self, *, config: LoraConfig, **kwargs: Any) -> LoraVariant | None:
        """The mixer's variant, or PEFT's where there is no mixer."""
        if not isinstance(config, AdapterOptions):
            return super().resolve_lora_variant(config=config, **kwargs)
        if config.is_plain(self._module_path):
            return super().resolve_lora_variant(config=config.to_lora_config(), **kwargs)
        if config.use_dora and self.dora_variant is None:
            raise AdapterError(
                f"{self._module_path}: use_dora with a mixer does not exist for {type(self).__name__}. Unset use_dora."
            )
        self.mixer_init[self._adding] = config.mixer_for(self._module_path)
        variant = self.dora_variant if config.use_dora else self.mixer_variant
        assert variant is not None
        return variant()

    def start_factors(self, adapter_name: str, config: AdapterOptions) -> None:
        """Create the mixer, and set A and B as the form of the factors demands."""
        like = self.factors(adapter_name).A
        rank = self.r[adapter_name]
        self.factor_form[adapter_name] = config.factor_form
        if config.factor_form != "free":
            self._place_factors(adapter_name, config)
            # B A is not zero here. A mixer of (almost) zero makes training start at the base model.
            scale = 1e-5 if config.factor_form == "svd" else 0.0
            weight = torch.randn(rank, rank, dtype=torch.float32).mul_(scale).to(like)  # the same on every device
        elif config.mixer_form == "diagonal":
            weight = torch.ones(rank, dtype=like.dtype, device=like.device)
        else:
            weight = init_mixer(rank, self.mixer_init[adapter_name], dtype=like.dtype, device=like.device)
        self.lora_mixer[adapter_name] = Mixer(weight, trainable=config.mixer_trainable)

    def _place_factors(self, adapter_name: str, config: AdapterOptions) -> None:
        """The truncated SVD of the base weight (LoRA-XS), or random orthonormal factors (StelLA)."""
        if not isinstance(self, lora.Linear):
            raise AdapterError(
                f"factor_form={config.factor_form!r} is for unquantised linear layers; {self._module_path} is a "
                f"{type(self).__name__}. Choose other targets."
            )
        A, B = (cast(Tensor, factor[adapter_name].weight) for factor in (self.lora_A, self.lora_B))
        rank = self.r[adapter_name]
        if rank > min(self.widths):
            raise AdapterError(f"{self._module_path} has rank {rank}, above its smaller width {min(self.widths)}.")
        if A.device.type == "meta":
            if config.factor_form == "svd":
                self.lora_A[adapter_name], self.lora_B[adapter_name] = FrozenFactor(A), FrozenFactor(B)
            return
        if config.factor_form == "svd":
            weight = transpose(dequantize_module_weight(self.get_base_layer()).detach().float(), self.fan_in_fan_out)
            U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
            self.lora_A[adapter_name] = FrozenFactor(Vh[:rank].to(A.dtype).contiguous())
            self.lora_B[adapter_name] = FrozenFactor((U[:, :rank] * S[:rank]).to(B.dtype).contiguous())
        else:
            A.data.copy_(orthonormal_rows(*A.shape))
            B.data.copy_(orthonormal_rows(*B.shape[::-1]).T)

    def holds(self, adapter_name: str) -> bool:
        """Whether this layer has factors of that adapter."""
        return adapter_name in self.lora_A

    def adapter_names(self) -> list[str]:
        """The adapters in this layer, sorted."""
        return sorted(self.lora_A)

    def factors(self, adapter_name: str) -> Factors:
        """A, M, B and s of one adapter; A and B are the parameters themselves, and so is a dense M."""
        return Factors(
            A=cast(Tensor, self.lora_A[adapter_name].weight),
            M=self.mixer_matrix(adapter_name),
            B=cast(Tensor, self.lora_B[adapter_name].weight),
            scaling=self.scaling[adapter_name],
        )

    def mixer_matrix(self, adapter_name: str) -> Tensor | None:
        """M ``[R, R]`` of one adapter; None for the frozen identity."""
        return cast(Mixer, self.lora_mixer[adapter_name]).matrix() if adapter_name in self.lora_mixer else None

    def named_factor_shapes(self, adapter_name: str) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Names, as PEFT saves them below the module's path, and whole shapes of A, B and M."""
        factors = {"lora_A.weight": self.lora_A[adapter_name].weight, "lora_B.weight": self.lora_B[adapter_name].weight}
        yield from self._shapes(adapter_name, cast("dict[str, Tensor]", factors))

    def _shapes(self, adapter_name: str, factors: dict[str, Tensor]) -> Iterator[tuple[str, tuple[int, ...]]]:
        if adapter_name in self.lora_mixer:
            factors["lora_mixer.weight"] = cast(Tensor, self.lora_mixer[adapter_name].weight)
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
            plain: Tensor = super().get_delta_weight(adapter)  # type: ignore[misc]
            return plain
        return self.wide_delta(adapter).to(self.factors(adapter).B.dtype)

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        """Load the identity as the mixer where a state holds A and no mixer.

        Folded factors and plain LoRA have no mixer. Beside the random start of a mixer they would be silently wrong;
        with the identity they are exact.
        """
        for adapter_name, mixer in self.lora_mixer.items():
            key = f"{prefix}lora_mixer.{adapter_name}.weight"
            names = (f"{prefix}lora_A.{adapter_name}.weight", f"{prefix}lora_embedding_A.{adapter_name}")
            factor = next((state_dict[name] for name in names if name in state_dict), None)
            if factor is not None and key not in state_dict:
                rank = factor.shape[0]
                square = cast(Tensor, mixer.weight).ndim == 2
                start = torch.eye(rank) if square else torch.ones(rank)
                state_dict[key] = start.to(factor)
        super()._load_from_state_dict(state_dict, prefix, *args)
