"""Read adapter folders that others wrote: stock PEFT, the MoSLoRA authors' PEFT fork.

::

    stock PEFT   adapter_config.json + adapter_model.safetensors; lora_A, lora_B. Becomes a mixer that is the identity.
    authors      the same with lora_AB.weight [R, R] (arXiv 2406.11909's fork of PEFT 0.10), safetensors or .bin
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from mm_moslora.adapters.folder_format import (
    MIXER,
    OWN_CONFIG,
    PREFIX,
    STOCK_CONFIG,
    STOCK_WEIGHTS,
    adapted_path,
    read_json,
    target_paths,
)
from mm_moslora.adapters.moslora_config import MoSLoRAConfig, from_lora_config
from mm_moslora.utils.errors import AdapterError
from mm_moslora.utils.run_paths import adapters_inside

_PADDLE_CONFIG = "lora_config.json"
_AUTHORS_MIXER = ".lora_AB.weight"


@dataclass(frozen=True, kw_only=True)
class AdapterFolder:
    """What a folder holds, read and verified."""

    config: MoSLoRAConfig
    """The adapter's configuration; its target_modules are whole module paths."""
    tensors: dict[str, Tensor]
    """A, M, B and other entries under PEFT's names."""
    base: dict[str, Any]
    """What was remembered of the base model; empty for a folder of another library."""


def read_foreign(root: Path, *, trainable: bool = False) -> AdapterFolder:
    """Read a folder of another library.

    Args:
        root: the folder.
        trainable: for plain LoRA, whether the identity mixer trains.

    Raises:
        AdapterError: not an adapter folder; a file that is missing, damaged or of another method.
    """
    if (root / STOCK_CONFIG).is_file():
        return _read_peft(root, trainable)
    if (root / _PADDLE_CONFIG).is_file():
        raise AdapterError(
            f"{root} is an adapter folder of PaddleNLP ({_PADDLE_CONFIG}), which is not read. Save it in PEFT's "
            f"layout: {STOCK_CONFIG}, with lora_use_mixer for mixers, and {STOCK_WEIGHTS} with every matrix "
            f"transposed, under names such as {PREFIX}model.layers.0.self_attn.q_proj.lora_A.weight (lora_B, lora_AB)."
        )
    if inside := adapters_inside(root):
        raise AdapterError(inside)
    raise AdapterError(f"{root} holds neither {OWN_CONFIG} nor {STOCK_CONFIG}; it is not an adapter folder.")


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file.

    Raises:
        AdapterError: damaged or truncated.
    """
    try:
        return load_file(path)
    except SafetensorError as error:
        raise AdapterError(f"{path} is damaged or truncated ({error}). Copy the folder again.") from error


def _read_peft(root: Path, trainable: bool) -> AdapterFolder:
    data = read_json(root / STOCK_CONFIG)
    if data.get("peft_type") != "LORA":
        raise AdapterError(
            f"{root} holds an adapter of peft_type {data.get('peft_type')!r}; LORA (MoSLoRA and plain LoRA) is read "
            "here. Load it with PEFT itself."
        )
    is_authors = bool(data.get("lora_use_mixer") or data.get("lora_use_mixer_pattern"))
    tensors = _peft_tensors(root, pickled=is_authors)
    lost = [name for name in tensors if "lora_mixer" in name or ("lora_AB" in name and not is_authors)]
    if lost:
        raise AdapterError(
            f"{root} holds mixers ({lost[0]!r}), and its {STOCK_CONFIG} declares none. As plain LoRA the adapter would "
            "be wrong. Restore the file that was saved with it, or save the adapter again with the program that "
            "trained it."
        )
    known = {item.name for item in dataclasses.fields(LoraConfig)} - {"runtime_config", "peft_type"}
    stock = LoraConfig(**{key: value for key, value in data.items() if key in known})
    if is_authors:
        return _authors(root, stock, tensors)
    config = from_lora_config(stock, mixer_trainable=trainable and not stock.use_dora)
    config.target_modules = target_paths(tensors)
    if config.mixer_trainable:
        # The mixers are not in the file; the identity makes them exactly this adapter.
        adapted = {adapted_path(name): len(tensor) for name, tensor in tensors.items() if adapted_path(name)}
        tensors |= {f"{PREFIX}{path}{MIXER}": torch.eye(rank) for path, rank in adapted.items()}
    return AdapterFolder(config=config, tensors=tensors, base={})


def _peft_tensors(root: Path, *, pickled: bool) -> dict[str, Tensor]:
    if (root / STOCK_WEIGHTS).is_file():
        return read_tensors(root / STOCK_WEIGHTS)
    path = root / "adapter_model.bin"
    if pickled and path.is_file():
        # The authors' older fork writes nothing else; weights_only keeps a pickle from running code.
        try:
            loaded = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # a broken pickle raises nearly anything, and its sizes MemoryError
            what = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:200]}"
            raise AdapterError(
                f"{path} is damaged, or holds more than tensors ({what}). Copy the folder again."
            ) from error
        if not isinstance(loaded, dict) or not all(isinstance(tensor, Tensor) for tensor in loaded.values()):
            raise AdapterError(f"{path} holds no tensors by name. Copy the folder again.")
        return {str(name): tensor for name, tensor in loaded.items()}
    raise AdapterError(f"{root} lacks {STOCK_WEIGHTS}. Pickled weights (.bin) are not read; save as safetensors.")


def _authors(root: Path, stock: LoraConfig, tensors: dict[str, Tensor]) -> AdapterFolder:
    """Their mixer has another name; a module that `lora_use_mixer_pattern` left out has none and gets the identity."""
    if stock.use_dora:
        raise AdapterError(
            f"{root} combines use_dora with lora_AB. The authors' code trains and merges that differently; it has no "
            "right reading."
        )
    renamed = {name.replace(_AUTHORS_MIXER, MIXER): tensor for name, tensor in tensors.items()}
    if not any(name.endswith(MIXER) for name in renamed):
        raise AdapterError(f"{root} announces mixers (lora_use_mixer) but holds no lora_AB. Copy the folder again.")
    for name, tensor in list(renamed.items()):
        path = adapted_path(name)
        if path is not None:
            renamed.setdefault(f"{PREFIX}{path}{MIXER}", torch.eye(len(tensor), dtype=tensor.dtype))
    config = from_lora_config(stock, mixer_init="kaiming", mixer_trainable=True)
    config.target_modules = target_paths(renamed)
    return AdapterFolder(config=config, tensors=renamed, base={})
