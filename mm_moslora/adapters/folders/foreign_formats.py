"""Read adapter folders that others wrote: stock PEFT, diffusers, the MoSLoRA authors' fork of PEFT.

Stock PEFT's lora_A and lora_B get a mixer that is the identity; of diffusers' file one component is read. The authors
(arXiv 2406.11909) have both with mixers::

    PEFT 0.10 fork   adapter_config.json (lora_use_mixer) + adapter_model; the mixer is lora_AB.weight [R, R]
    SDXL script      pytorch_lora_weights.safetensors of diffusers; diffusers renames lora_A to lora.down, and with it
                     lora_AB to lora.downB (lora_linear_layer.downB in text encoders). It has no alpha, which is R
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.utils.other import get_pattern_key
from safetensors import safe_open
from torch import Tensor

from mm_moslora.adapters.folder_format import (
    DIFFUSERS_WEIGHTS,
    MIXER,
    OWN_CONFIG,
    PREFIX,
    REFERENCE_MIXERS,
    STOCK_CONFIG,
    STOCK_WEIGHTS,
    USE_MIXER,
    USE_MIXER_PATTERN,
    adapted_path,
    declares_mixers,
    first_mixer,
    is_factor,
    mixers_in,
    read_json,
    read_tensors,
    target_paths,
)
from mm_moslora.adapters.moslora_config import MoSLoRAConfig, from_lora_config, lora_fields
from mm_moslora.utils.errors import AdapterError
from mm_moslora.utils.run_paths import adapters_inside
from mm_moslora.utils.untrusted_data import parse_object

_MIXERS = (".lora_AB.weight", ".lora.downB.weight", ".lora_linear_layer.downB.weight")
_OF_DIFFUSERS = {
    f".{part}.{theirs}.weight": f".{ours}.weight"
    for part in ("lora", "lora_linear_layer")
    for theirs, ours in (("down", "lora_A"), ("up", "lora_B"))
}
# In their older fork's configuration: how the layer computes, not what.
_WITHOUT_MEANING = {USE_MIXER, USE_MIXER_PATTERN, "merge_weights", "runtime_config", "peft_type"}


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
        if name := first_mixer(tensors):
            raise AdapterError(
                f"{root} holds mixers ({name!r}), and its {STOCK_CONFIG} declares none. As plain LoRA the adapter "
                "would be wrong. Restore the file that was saved with it, or save the adapter again with the program "
                "that trained it."
            )
        return _plain(_stock(data), tensors, trainable)
    _check_options(data, lora_fields(), str(root))
    tensors = _with_known_names(tensors)
    return _content(from_lora_config(_stock(data), **_mixer_settings(data, tensors, str(root))), tensors)


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
    all_tensors = _with_known_names(read_tensors(path))
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
    return _content(from_lora_config(stock, **_mixer_settings({USE_MIXER: True}, tensors, str(path))), tensors)


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


def _with_known_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of the authors' fork, or of diffusers, under PEFT's names, the mixers as ``.lora_mixer.weight``."""
    renamed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        ends = dict.fromkeys(_MIXERS, MIXER) | _OF_DIFFUSERS
        end = next((end for end in ends if name.endswith(end)), None)
        if end is None and first_mixer([name], REFERENCE_MIXERS):
            raise AdapterError(
                f"{name!r} is a part of a mixer that is not understood; {' or '.join(_MIXERS)} is expected at its end. "
                "Without it the adapter would compute other values."
            )
        renamed[name if end is None else name.removesuffix(end) + ends[end]] = tensor
    return renamed


def _mixer_settings(config: Mapping[str, Any], tensors: Mapping[str, Tensor], source: str) -> dict[str, Any]:
    """The mixers' fields of a `MoSLoRAConfig` from the authors' options; modules without a mixer get `none`."""
    if config.get("use_dora"):
        raise AdapterError(
            f"{source} combines use_dora with lora_AB. The authors' code trains and merges that differently; it has no "
            "right reading."
        )
    mixers, without = mixers_in(tensors), []
    if not mixers:
        raise AdapterError(f"{source} announces mixers (lora_use_mixer) but holds no lora_AB. Copy the folder again.")
    pattern = config.get(USE_MIXER_PATTERN) or {}
    for name, tensor in tensors.items():
        path = adapted_path(name)
        if path is None or name.removesuffix(".lora_A.weight") in mixers:
            continue
        has_mixer = pattern.get(get_pattern_key(list(pattern), path), config.get(USE_MIXER))
        # Their embeddings and convolutions have no mixer, whatever the configuration says.
        if has_mixer and name.endswith(".lora_A.weight") and tensor.ndim == 2:
            raise AdapterError(
                f"{source} holds no lora_AB of {path!r}, though its configuration announces one. With another matrix "
                "in its place the adapter would be wrong. Copy the folder again."
            )
        without.append(path)
    return {"mixer_init": "kaiming", "mixer_trainable": True, "mixer_pattern": dict.fromkeys(sorted(without), "none")}


def _check_options(config: Mapping[str, Any], understood: set[str], source: str) -> None:
    """Refuse options of a configuration with mixers that are not `understood` and change what the adapter computes."""
    unknown = sorted(key for key, value in config.items() if value and key not in understood | _WITHOUT_MEANING)
    if unknown:
        raise AdapterError(
            f"{source} sets {unknown[0]} to {config[unknown[0]]!r}, which is not understood. The adapter may compute "
            f"something else with it; remove it from {STOCK_CONFIG} if it has no effect."
        )
