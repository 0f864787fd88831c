"""An export loses nothing of its base: what the class does not load is copied, and readers skip it as before."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import make_language
from transformers import AutoModelForCausalLM

from mm_moslora.config import ModelConfig
from mm_moslora.models.assembly import load_parts
from mm_moslora.models.export.export_huggingface import export_model

MORE = {"mtp.fc.weight": torch.arange(6.0).reshape(2, 3), "mtp.norm.weight": torch.ones(4), "scale": torch.tensor(2.0)}


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return load_file(folder / "model.safetensors")
    files = json.loads(index.read_text())["weight_map"]
    return {name: load_file(folder / file)[name] for name, file in files.items()}


@pytest.mark.parametrize("more", [{}, MORE], ids=["nothing", "mtp"])
def test_tensors_that_the_class_does_not_load_are_exported_as_they_are(more, tmp_path):
    base = Path(make_language(tmp_path / "base"))
    held = load_file(base / "model.safetensors")
    save_file(held | more, base / "model.safetensors", metadata={"format": "pt"})
    exported = export_model(load_parts(ModelConfig(language=str(base))), tmp_path / "out")
    written = tensors_of(tmp_path / "out")
    assert sorted(more) == exported.copied
    assert written.keys() >= held.keys() - {"lm_head.weight"} | more.keys()
    assert all(torch.equal(written[name], value) for name, value in more.items())
    _, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
