"""Tensors of a base that its class does not load, such as layers that predict several tokens (`mtp.*`)."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from mm_moslora.adapters.folders.weight_files import WeightFiles
from mm_moslora.adapters.name_mapping import map_names
from mm_moslora.utils.files import read_json, rename, replace_text

FILE = "model-of-base.safetensors"
_WHOLE, _ONLY, _INDEX = "model.safetensors", "model-00001-of-00001.safetensors", "model.safetensors.index.json"


def copy_unloaded(base: Path, folder: Path) -> list[str]:
    """Copy what the written folder lacks of its base's tensors, as they are; returns their names."""
    config = base / "config.json"
    if not any(base.glob("*.safetensors")) or (
        config.is_file() and "quantization_config" in read_json(config, linked=True)
    ):
        return []  # pickles, or numbers in another form
    before, after = WeightFiles(base), WeightFiles(folder)
    written = map_names(before.shapes, after.shapes, source=str(base), target=str(folder), least=2)
    lost = before.shapes.keys() - written.keys() - after.shapes.keys()  # an enlarged vocabulary has its name
    copied = sorted(name for name in lost if before.twin(name, written) is None)
    if not copied:
        return []
    state = {name: torch.cat([torch.atleast_1d(block) for _, block in before.blocks(name)]) for name in copied}
    state = {name: value.reshape(before.shapes[name]) for name, value in state.items()}
    save_file(state, folder / FILE, metadata={"format": "pt"})
    if (folder / _WHOLE).is_file():
        rename(folder / _WHOLE, folder / _ONLY)
        index: dict[str, dict[str, object]] = {"metadata": {}, "weight_map": dict.fromkeys(after.shapes, _ONLY)}
    else:
        index = read_json(folder / _INDEX)
    index["weight_map"] |= dict.fromkeys(copied, FILE)
    replace_text(folder / _INDEX, json.dumps(index, indent=2, sort_keys=True))
    return copied
