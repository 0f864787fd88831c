"""Changes of diffusers: what its savers write of an adapter with mixers draws the same pictures, or is refused.

`pipeline.save_lora_weights` takes a state that its caller made of A, M and B, and no class of the adapter sees it;
diffusers drops M when it reads that. So `LoraBaseMixin.write_lora_layers`, through which the savers of all pipelines
go, folds M into B first. `model.save_lora_adapter` makes its state itself and refuses.

The changes are made once an adapter is put into a model and diffusers is imported.
`tests/packaging/test_private_interfaces.py` fails when diffusers renames one of them.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft import LoraConfig
from torch import Tensor

from mm_moslora.adapters.folder_format import DIFFUSERS_WEIGHTS, MIXER, MIXER_PART, USE_MIXER, mixers_in
from mm_moslora.adapters.folders.authors_format import (
    holds_their_mixers,
    mixer_settings,
    read_tensors,
    with_known_names,
)
from mm_moslora.adapters.folders.folder_tensors import mixer_matrices
from mm_moslora.adapters.moslora_config import MoSLoRAConfig
from mm_moslora.kernels.lora.mixed_product import fold_right
from mm_moslora.utils.errors import AdapterError

_NAMES_OF_B = (".lora_B.weight", ".lora.up.weight", ".lora_linear_layer.up.weight")
"""PEFT's name and diffusers' own."""
_OWN_FIELDS = {field.name for field in dataclasses.fields(MoSLoRAConfig)} - {
    field.name for field in dataclasses.fields(LoraConfig)
}


def without_mixers(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state of a pipeline's adapters as plain LoRA: ``B' = B M``.

    Args:
        tensors: under PEFT's or diffusers' names.

    Raises:
        AdapterError: a mixer without its B.
    """
    if holds_their_mixers(tensors):
        tensors = with_known_names(tensors)
    folded = {name: tensor for name, tensor in tensors.items() if MIXER_PART not in name}
    for stem, M in mixer_matrices(tensors).items():
        factor = next((stem + part for part in _NAMES_OF_B if stem + part in folded), None)
        if factor is None:
            raise AdapterError(
                f"{stem}{MIXER} has no B beside it, so it cannot be folded, and diffusers would drop it. Save with "
                "mm_moslora.adapters.save_adapter, then export_adapter(layout='diffusers')."
            )
        folded[factor] = fold_right(folded[factor], M).to(folded[factor].dtype).contiguous()
    return folded


def plain_pipeline_weights(folder: str | Path) -> dict[str, Tensor]:
    """Plain LoRA of a diffusers file, for ``pipeline.load_lora_weights(plain_pipeline_weights(folder))``.

    Args:
        folder: holds `pytorch_lora_weights.safetensors`; such as the SDXL script of the MoSLoRA paper's authors wrote,
            whose mixers (``lora.downB``) diffusers drops.

    Raises:
        AdapterError: no such file, a damaged one, or a module without mixer beside others that have one.
    """
    path = Path(folder) / DIFFUSERS_WEIGHTS
    if not path.is_file():
        raise AdapterError(f"{folder} holds no {DIFFUSERS_WEIGHTS}. load_adapter reads the other kinds of folders.")
    tensors = with_known_names(read_tensors(path))
    if mixers_in(tensors):
        mixer_settings({USE_MIXER: True}, tensors, str(path))
    return without_mixers(tensors)


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
        told = kwargs.get("lora_adapter_metadata")
        if told:  # LoraConfig of the reader takes its own fields only
            kept = {key: value for key, value in told.items() if key.rpartition(".")[2] not in _OWN_FIELDS}
            kwargs["lora_adapter_metadata"] = kept
        stock_write(without_mixers(state_dict), *args, **kwargs)

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
