"""Changes of diffusers: what it reads and writes of an adapter with mixers draws the same pictures, or is refused.

`pipeline.save_lora_weights` takes a state that its caller made of A, M and B, and diffusers drops M when it reads that.
So `LoraBaseMixin.write_lora_layers`, through which the savers of all pipelines go, folds M into B first.
`model.save_lora_adapter` makes its state itself and refuses. Both are changed where diffusers is imported: with
`mm_moslora.adapters`, and once an adapter is put into a model.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from typing import Any

from peft import LoraConfig
from torch import Tensor

from mm_moslora.adapters.folder_format import mixers_in
from mm_moslora.adapters.folders.folder_tensors import fold_state_dict
from mm_moslora.adapters.moslora_config import MoSLoRAConfig
from mm_moslora.utils.errors import AdapterError

_NAMES_OF_B = (".lora_B.weight", ".lora.up.weight", ".lora_linear_layer.up.weight")
"""PEFT's name and diffusers' own."""
_OWN_FIELDS = {field.name for field in dataclasses.fields(MoSLoRAConfig)} - {
    field.name for field in dataclasses.fields(LoraConfig)
}


def patch_diffusers() -> None:
    """Change diffusers' savers where it is imported; a second call changes nothing."""
    if "diffusers" not in sys.modules:
        return
    from diffusers.loaders import lora_base, peft

    pipelines: Any = lora_base.LoraBaseMixin
    models: Any = peft.PeftAdapterMixin
    if hasattr(pipelines.write_lora_layers, "__wrapped__"):
        return
    stock_write, stock_save = pipelines.write_lora_layers, models.save_lora_adapter

    @functools.wraps(stock_write)
    def write_lora_layers(state_dict: dict[str, Tensor], *args: Any, **kwargs: Any) -> None:
        metadata = kwargs.get("lora_adapter_metadata")
        if metadata:  # LoraConfig of the reader takes its own fields only
            of_lora = {key: value for key, value in metadata.items() if key.rpartition(".")[2] not in _OWN_FIELDS}
            kwargs["lora_adapter_metadata"] = of_lora
        folded = fold_state_dict(state_dict, names_of_B=_NAMES_OF_B) if mixers_in(state_dict) else state_dict
        stock_write(folded, *args, **kwargs)

    @functools.wraps(stock_save)
    def save_lora_adapter(self: Any, save_directory: Any, adapter_name: str = "default", **kwargs: Any) -> None:
        if isinstance(getattr(self, "peft_config", {}).get(adapter_name), MoSLoRAConfig):
            raise AdapterError(
                "save_lora_adapter would write mixers that diffusers drops when it reads them. Save with "
                "mm_moslora.adapters.save_adapter, or with the pipeline's save_lora_weights."
            )
        stock_save(self, save_directory, adapter_name=adapter_name, **kwargs)

    pipelines.write_lora_layers = staticmethod(write_lora_layers)
    models.save_lora_adapter = save_lora_adapter
