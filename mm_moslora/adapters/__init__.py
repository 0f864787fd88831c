"""MoSLoRA adapters on PEFT: configuration, layers, injection, folders, merge. Needs torch and PEFT only."""

from typing import TYPE_CHECKING, Any

from mm_moslora.adapters.combine import add_weighted_adapter, hot_swap
from mm_moslora.adapters.config import MoSLoRAConfig
from mm_moslora.adapters.export import Layout, export_adapter
from mm_moslora.adapters.functional import delta_weight, fold, reference_linear, use_kernel
from mm_moslora.adapters.guards import guard_peft
from mm_moslora.adapters.inject import AdaptedModule, adapted_modules, add_moslora, resolve_targets
from mm_moslora.adapters.kernel import fused_linear
from mm_moslora.adapters.layer import MoSLoRALayer, MoSLoRALinear
from mm_moslora.adapters.load import load_adapter
from mm_moslora.adapters.merge import merge
from mm_moslora.adapters.mixer import MIXER_INITS, Mixer, MixerInit, butterfly, init_mixer
from mm_moslora.adapters.orthonormal import keep_orthonormal
from mm_moslora.adapters.siblings import link_siblings
from mm_moslora.adapters.state import TakenAdapter, base_fingerprint, fold_state_dict, save_adapter, take_adapter
from mm_moslora.adapters.steps import one_product_per_step

if TYPE_CHECKING:
    from mm_moslora.adapters.callback import MixerCallback

guard_peft()

__all__ = [
    "MIXER_INITS",
    "AdaptedModule",
    "Layout",
    "Mixer",
    "MixerCallback",
    "MixerInit",
    "MoSLoRAConfig",
    "MoSLoRALayer",
    "MoSLoRALinear",
    "TakenAdapter",
    "adapted_modules",
    "add_moslora",
    "add_weighted_adapter",
    "base_fingerprint",
    "butterfly",
    "delta_weight",
    "export_adapter",
    "fold",
    "fold_state_dict",
    "fused_linear",
    "hot_swap",
    "init_mixer",
    "keep_orthonormal",
    "link_siblings",
    "load_adapter",
    "merge",
    "one_product_per_step",
    "reference_linear",
    "resolve_targets",
    "save_adapter",
    "take_adapter",
    "use_kernel",
]


def __getattr__(name: str) -> Any:
    if name != "MixerCallback":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from mm_moslora.adapters.callback import MixerCallback  # transformers' Trainer brings datasets and pandas: a second

    return MixerCallback
