"""Changes of PEFT itself on import: three entries in its tables, and functions without a table.

- `PEFT_TYPE_TO_TUNER_MAPPING[LORA]` becomes `MoSLoRAModel` and `PEFT_TYPE_TO_CONFIG_MAPPING[LORA]`
  `LoraConfigOfFolder`: `register_peft_method` refuses existing types, and the enumeration of types is closed
  (huggingface/peft#2273, #2282). `PEFT_TYPE_TO_CONFIG_MAPPING["MOSLORA"]` is new: programs that read a configuration
  through PEFT, as its method comparison does, get a `MoSLoRAConfig`.
- `load_peft_weights` reads A, M and B of a double folder: no hook of a tuner sees the folder, and trainers that resume
  from a checkpoint load it into an existing adapter (huggingface/peft#2273).
- `get_peft_model_state_dict`, as `save_pretrained` calls it, refuses shards: writing them ends in an error of
  safetensors about storages.
"""

from __future__ import annotations

import functools
import re
from typing import Any

import peft
from peft import peft_model, utils
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import hotswap, save_and_load
from torch import Tensor
from torch.distributed.tensor import DTensor

from mm_moslora.adapters.folder_format import (
    OWN_CONFIG,
    OWN_TYPE,
    OWN_WEIGHTS,
    PREFIX,
    STOCK_WEIGHTS,
    downloaded,
    first_mixer,
)
from mm_moslora.adapters.folders.diffusers_saving import patch_diffusers
from mm_moslora.adapters.folders.folder_tensors import initial_mixers
from mm_moslora.adapters.folders.load_folder import read_folder
from mm_moslora.adapters.layers.base_weights import why_not_whole
from mm_moslora.adapters.moslora_config import MoSLoRAConfig
from mm_moslora.adapters.tuner import LoraConfigOfFolder, MoSLoRAModel
from mm_moslora.utils.errors import AdapterError

_stock_state = save_and_load.get_peft_model_state_dict
_stock_weights = save_and_load.load_peft_weights


@functools.wraps(_stock_state)
def whole_state(model: Any, state_dict: Any = None, adapter_name: str = "default", **kwargs: Any) -> dict[str, Tensor]:
    """The tensors that `save_pretrained` writes, whole, and the start of the mixers."""
    tensors: dict[str, Tensor] = _stock_state(model, state_dict, adapter_name, **kwargs)
    if isinstance(model.peft_config[adapter_name], MoSLoRAConfig):
        for name, tensor in tensors.items():
            if isinstance(tensor, DTensor) and (reason := why_not_whole(tensor)):
                raise AdapterError(f"{name} {reason}")
        tensors |= initial_mixers(model, adapter_name)
    return tensors


@functools.wraps(_stock_weights)
def load_peft_weights(
    model_id: str, device: Any = None, key_mapping: dict[str, str] | None = None, **hub: Any
) -> dict[str, Tensor]:
    """A, M, B and M's start of a double folder, checked against its hashes; otherwise PEFT's result."""
    folder = downloaded(model_id, (OWN_CONFIG, OWN_WEIGHTS, STOCK_WEIGHTS), **hub)
    if folder is None:
        stock: dict[str, Tensor] = _stock_weights(model_id, device=device, key_mapping=key_mapping, **hub)
        if name := first_mixer(stock):
            raise AdapterError(
                f"{model_id} holds mixers ({name!r}), which this way of loading drops. Load it with "
                "mm_moslora.adapters.load_adapter."
            )
        return stock
    device = utils.infer_device() if device is None else device
    content = read_folder(folder)
    stored = content.tensors | content.initial_mixers
    return {_renamed(name, key_mapping or {}): tensor.to(device) for name, tensor in stored.items()}


def _renamed(name: str, key_mapping: dict[str, str]) -> str:
    """The name after the first pattern that occurs in it, without PEFT's prefix, was replaced."""
    path = name.removeprefix(PREFIX)
    for pattern, replacement in key_mapping.items():
        path, count = re.subn(pattern, replacement, path)
        if count:
            break
    return f"{PREFIX}{path}"


def patch_peft() -> None:
    """Enter the tuner and the configuration, and replace the functions; a second call changes nothing."""
    patch_diffusers()
    PEFT_TYPE_TO_TUNER_MAPPING[peft.PeftType.LORA] = MoSLoRAModel
    types: dict[Any, Any] = PEFT_TYPE_TO_CONFIG_MAPPING
    types[peft.PeftType.LORA] = types[OWN_TYPE] = LoraConfigOfFolder
    saving: Any = peft_model
    saving.get_peft_model_state_dict = whole_state  # in save_pretrained alone: others may save shards
    modules: tuple[Any, ...] = (peft, peft_model, utils, save_and_load, hotswap)
    for module in modules:
        module.load_peft_weights = load_peft_weights
