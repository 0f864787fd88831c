"""Changes of diffusers: what it reads and writes of an adapter with mixers draws the same pictures, or is refused.

`pipeline.save_lora_weights` takes a state that its caller made of A, M and B, and no class of the adapter sees it;
diffusers drops M when it reads that. So `LoraBaseMixin.write_lora_layers`, through which the savers of all pipelines
go, folds M into B first. `model.save_lora_adapter` makes its state itself and refuses. `_fetch_state_dict`, through
which all of them read files and dictionaries, folds the mixers of the paper's authors.

The changes are made where diffusers is imported: with `mm_moslora.adapters`, and once an adapter is put into a model.
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

from mm_moslora.adapters.folder_format import DIFFUSERS_WEIGHTS, MIXER, USE_MIXER, is_factor, mixers_in
from mm_moslora.adapters.folders.authors_format import (
    holds_their_mixers,
    mixer_settings,
    read_tensors,
    with_known_names,
)
from mm_moslora.adapters.folders.folder_tensors import check_tensors, fold_state_dict
from mm_moslora.adapters.moslora_config import MoSLoRAConfig
from mm_moslora.utils.errors import AdapterError

_NAMES_OF_B = (".lora_B.weight", ".lora.up.weight", ".lora_linear_layer.up.weight")
"""PEFT's name and diffusers' own."""
_OWN_FIELDS = {field.name for field in dataclasses.fields(MoSLoRAConfig)} - {
    field.name for field in dataclasses.fields(LoraConfig)
}


def without_mixers(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state of a pipeline's adapters, under PEFT's or diffusers' names, as plain LoRA: ``B' = B M``.

    Raises:
        AdapterError: a mixer without its B.
    """
    if holds_their_mixers(tensors):
        tensors = with_known_names(tensors)
    return fold_state_dict(tensors, names_of_B=_NAMES_OF_B) if mixers_in(tensors) else dict(tensors)


def plain_pipeline_weights(folder: str | Path) -> dict[str, Tensor]:
    """Plain LoRA of a diffusers file, for ``pipeline.load_lora_weights(plain_pipeline_weights(folder))``.

    Args:
        folder: holds `pytorch_lora_weights.safetensors`; such as the SDXL script of the MoSLoRA paper's authors wrote,
            whose mixers (``lora.downB``) diffusers drops.

    Raises:
        AdapterError: no such file, a damaged one, or one that `load_adapter` refuses: a module without mixer beside
            others that have one, a tensor that is not understood, factors that do not fit each other, or hold NaN.
    """
    path = Path(folder) / DIFFUSERS_WEIGHTS
    if not path.is_file():
        raise AdapterError(f"{folder} holds no {DIFFUSERS_WEIGHTS}. load_adapter reads the other kinds of folders.")
    return _plain_of_authors(with_known_names(read_tensors(path)), str(path))


def _plain_of_authors(tensors: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """Plain LoRA of the tensors of a pipeline file, under PEFT's names; without mixers they are as they were."""
    mixers = mixers_in(tensors)
    if not mixers:
        return dict(tensors)
    mixer_settings({USE_MIXER: True}, tensors, source)
    if unknown := min((name for name in tensors if not is_factor(name)), default=None):
        raise AdapterError(f"{source} holds {unknown}, which is not understood: A, M and B are read.")
    shapes: dict[str, tuple[int, ...]] = {}
    for name, A in tensors.items():
        stem = name.removesuffix(".lora_A.weight")
        if stem == name:
            continue
        rank, B = A.shape[0] if A.ndim else 0, tensors.get(f"{stem}.lora_B.weight")
        shape_of_B = (0, rank) if B is None else (*B.shape[:1], rank, *B.shape[2:])
        shapes |= {name: tuple(A.shape), f"{stem}.lora_B.weight": shape_of_B}
        if stem in mixers:
            shapes[f"{stem}{MIXER}"] = (rank, rank)
    check_tensors(tensors, shapes, source=source)
    return without_mixers(tensors)


def patch_diffusers() -> bool:
    """Change diffusers' savers and its reader where it is imported; a second call changes nothing.

    Returns:
        Whether this call changed them.
    """
    if "diffusers" not in sys.modules:
        return False
    from diffusers.loaders import lora_base, peft

    pipelines: Any = lora_base.LoraBaseMixin
    models: Any = peft.PeftAdapterMixin
    if hasattr(pipelines.write_lora_layers, "__wrapped__"):
        return False
    stock_write, stock_save = pipelines.write_lora_layers, models.save_lora_adapter
    stock_fetch: Any = lora_base._fetch_state_dict

    @functools.wraps(stock_fetch)
    def fetch_state_dict(*args: Any, **kwargs: Any) -> tuple[Any, ...]:
        state, *rest = stock_fetch(*args, **kwargs)
        if holds_their_mixers(state):
            state = _plain_of_authors(with_known_names(state), "The state of the pipeline's adapters")
        return state, *rest

    @functools.wraps(stock_write)
    def write_lora_layers(state_dict: dict[str, Tensor], *args: Any, **kwargs: Any) -> None:
        metadata = kwargs.get("lora_adapter_metadata")
        if metadata:  # LoraConfig of the reader takes its own fields only
            of_lora = {key: value for key, value in metadata.items() if key.rpartition(".")[2] not in _OWN_FIELDS}
            kwargs["lora_adapter_metadata"] = of_lora
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
    for module in (lora_base, peft, sys.modules.get("diffusers.loaders.lora_pipeline")):
        if module is not None:
            module._fetch_state_dict = fetch_state_dict  # type: ignore[attr-defined]
    return True
