"""MoSLoRA adapters on PEFT: configuration, layers, injection, folders, merge. Needs torch and PEFT only."""

from mm_moslora.adapters.adapter_targets import AdaptedModule, adapted_modules, add_moslora, resolve_targets
from mm_moslora.adapters.folders.export_adapter import Layout, export_adapter
from mm_moslora.adapters.folders.folder_tensors import fold_state_dict
from mm_moslora.adapters.folders.load_folder import load_adapter
from mm_moslora.adapters.folders.save_folder import AdapterSnapshot, adapter_snapshot, save_adapter
from mm_moslora.adapters.layers.adapter_layers import MoSLoRALayer
from mm_moslora.adapters.layers.fused_linear import MoSLoRALinear, use_kernel
from mm_moslora.adapters.merge_adapter import merge, why_not_merged
from mm_moslora.adapters.mixer import MIXER_INITS, Mixer, MixerInit, butterfly, init_mixer
from mm_moslora.adapters.moslora_config import MoSLoRAConfig
from mm_moslora.adapters.peft_methods import (
    add_method,
    load_method,
    method_config,
    method_named,
    method_snapshot,
    restore_method,
)
from mm_moslora.adapters.peft_patches import patch_peft
from mm_moslora.adapters.trainer_callback import MixerCallback, spare_mixers_from_decay
from mm_moslora.adapters.tree import base_fingerprint, is_adapter_parameter
from mm_moslora.kernels.lora.lora_linear import fused_linear
from mm_moslora.kernels.lora.lora_math import delta_weight, fold, reference_linear

patch_peft()

__all__ = [
    "MIXER_INITS",
    "AdaptedModule",
    "AdapterSnapshot",
    "Layout",
    "Mixer",
    "MixerCallback",
    "MixerInit",
    "MoSLoRAConfig",
    "MoSLoRALayer",
    "MoSLoRALinear",
    "adapted_modules",
    "adapter_snapshot",
    "add_method",
    "add_moslora",
    "base_fingerprint",
    "butterfly",
    "delta_weight",
    "export_adapter",
    "fold",
    "fold_state_dict",
    "fused_linear",
    "init_mixer",
    "is_adapter_parameter",
    "load_adapter",
    "load_method",
    "merge",
    "method_config",
    "method_named",
    "method_snapshot",
    "reference_linear",
    "resolve_targets",
    "restore_method",
    "save_adapter",
    "spare_mixers_from_decay",
    "use_kernel",
    "why_not_merged",
]
