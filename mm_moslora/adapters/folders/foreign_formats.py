"""Read adapter folders that others wrote: stock PEFT, diffusers, the MoSLoRA authors' fork of PEFT.

Stock PEFT's lora_A and lora_B get a mixer that is the identity; of diffusers' file one component is read; those of the
authors are both of these with mixers.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors import safe_open
from torch import Tensor

from mm_moslora.adapters.folder_format import (
    DIFFUSERS_WEIGHTS,
    MIXER,
    OWN_CONFIG,
    PREFIX,
    STOCK_CONFIG,
    STOCK_WEIGHTS,
    USE_MIXER,
    adapted_path,
    declares_mixers,
    is_factor,
    mixers_in,
    names_mixers,
    read_json,
    read_tensors,
    target_paths,
)
from mm_moslora.adapters.folders.authors_format import check_options, mixer_settings, with_known_names
from mm_moslora.adapters.moslora_config import MoSLoRAConfig, from_lora_config, lora_fields
from mm_moslora.utils.errors import AdapterError
from mm_moslora.utils.run_paths import adapters_inside
from mm_moslora.utils.untrusted_data import parse_object


@dataclass(frozen=True, kw_only=True)
class AdapterFolder:
    """What a folder holds, read and verified."""

    config: MoSLoRAConfig
    """The adapter's configuration; its target_modules are whole module paths."""
    tensors: dict[str, Tensor]
    """A, M, B and other entries under PEFT's names."""
    base: dict[str, Any]
    """What was remembered of the base model; empty for a folder of another library."""
    initial_mixers: dict[str, Tensor] = field(default_factory=dict)
    """M as training began, as far as it was kept."""


def read_foreign(root: Path, *, trainable: bool = False, component: str | None = None) -> AdapterFolder:
    """Read a folder of another library."""
    if (root / STOCK_CONFIG).is_file():
        return _read_peft(root, trainable)
    if (root / DIFFUSERS_WEIGHTS).is_file():
        return _read_diffusers(root, component, trainable=trainable)
    if inside := adapters_inside(root):
        raise AdapterError(inside)
    raise AdapterError(f"{root} holds neither {OWN_CONFIG} nor {STOCK_CONFIG}; it is not an adapter folder.")


def _read_peft(root: Path, trainable: bool) -> AdapterFolder:
    data = read_json(root / STOCK_CONFIG)
    if data.get("peft_type") != "LORA":
        raise AdapterError(
            f"{root} holds an adapter of peft_type {data.get('peft_type')!r}; LORA (MoSLoRA and plain LoRA) is read "
            "here. Load it with PEFT itself."
        )
    if not (root / STOCK_WEIGHTS).is_file():
        raise AdapterError(f"{root} lacks {STOCK_WEIGHTS}. Pickled weights (.bin) are not read; save as safetensors.")
    tensors = read_tensors(root / STOCK_WEIGHTS)
    if not declares_mixers(data):
        if name := names_mixers(tensors):
            raise AdapterError(
                f"{root} holds mixers ({name!r}), and its {STOCK_CONFIG} declares none. As plain LoRA the adapter "
                "would be wrong. Restore the file that was saved with it, or save the adapter again with the program "
                "that trained it."
            )
        return _plain(_stock(data), tensors, trainable)
    check_options(data, lora_fields(), str(root))
    tensors = with_known_names(tensors)
    return _content(from_lora_config(_stock(data), **mixer_settings(data, tensors, str(root))), tensors)


def _stock(options: dict[str, Any]) -> LoraConfig:
    return LoraConfig(**{key: value for key, value in options.items() if key in lora_fields()})


def _plain(stock: LoraConfig, tensors: dict[str, Tensor], trainable: bool) -> AdapterFolder:
    config = from_lora_config(stock, mixer_trainable=trainable and not stock.use_dora)
    content = _content(config, tensors)
    if config.mixer_trainable:
        # The mixers are not in the file; the identity makes them exactly this adapter.
        rows = {path: len(tensor) for name, tensor in tensors.items() if (path := adapted_path(name)) is not None}
        tensors |= {f"{PREFIX}{path}{MIXER}": torch.eye(number) for path, number in rows.items()}
    return content


def _content(config: MoSLoRAConfig, tensors: dict[str, Tensor]) -> AdapterFolder:
    config.target_modules = target_paths(tensors)
    return AdapterFolder(config=config, tensors=tensors, base={})


def _read_diffusers(root: Path, component: str | None, *, trainable: bool) -> AdapterFolder:
    path = root / DIFFUSERS_WEIGHTS
    all_tensors = with_known_names(read_tensors(path))
    present = sorted({name.partition(".")[0] for name in all_tensors})
    if component is None and len(present) == 1:
        component = present[0]
    if component not in present:
        raise AdapterError(
            f"{path} holds adapters of {', '.join(present)}; component is {component!r}. Name one of them, such as "
            f"component={present[0]!r}."
            if present
            else f"{path} holds no tensors. Copy the folder again."
        )
    start = f"{component}."
    names = [name for name in all_tensors if name.startswith(start)]
    tensors = {PREFIX + name.removeprefix(start): all_tensors[name] for name in names}
    if unknown := sorted(name for name in tensors if not is_factor(name)):
        raise AdapterError(
            f"{path} holds {start}{unknown[0].removeprefix(PREFIX)}, which is not understood: A, M and B are "
            "read. Load the file with diffusers itself."
        )
    options = _diffusers_options(path, component)
    if not options:
        ranks = sorted({len(tensor) for name, tensor in tensors.items() if adapted_path(name)})
        if len(ranks) != 1:
            raise AdapterError(
                f"{path} holds ranks {', '.join(map(str, ranks))} of {component} and no options, so the scaling of a "
                "module is unknown. Save it again with a diffusers that writes the options (lora_adapter_metadata)."
            )
        options = {"r": ranks[0], "lora_alpha": ranks[0]}
    stock = _stock(options)
    if not mixers_in(tensors):
        return _plain(stock, tensors, trainable)
    return _content(from_lora_config(stock, **mixer_settings({USE_MIXER: True}, tensors, str(path))), tensors)


def _diffusers_options(path: Path, component: str) -> dict[str, Any]:
    """The options of a component that newer versions of diffusers write beside the tensors."""
    with safe_open(path, framework="pt") as file:
        text = (file.metadata() or {}).get("lora_adapter_metadata", "{}")
    try:
        options = parse_object(text)
        start = f"{component}."
        return {key.removeprefix(start): value for key, value in options.items() if key.startswith(start)}
    except (ValueError, AttributeError) as error:
        raise AdapterError(f"{path} has options that are not valid JSON ({error}). Copy the folder again.") from error
