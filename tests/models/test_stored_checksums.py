"""Weights are read only whole: with the bytes that a manifest names, and all that a model needs."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import make_vision
from torch import Tensor
from trials import with_train
from vlms import make_vlm

from mm_moslora.config import VisionConfig
from mm_moslora.models.assembly import load_parts
from mm_moslora.models.language_model import load_language
from mm_moslora.models.load_model import load
from mm_moslora.models.pretrained_vlm import load_pretrained_vlm
from mm_moslora.models.vision.vision_tower import load_vision
from mm_moslora.training.training_loop import train
from mm_moslora.utils.errors import ModelError, MoSLoRAError


@pytest.fixture
def checkpoint(recipe, tmp_path):
    tower = replace(recipe.model.vision, mode="full")
    recipe = replace(recipe, model=replace(recipe.model, vision=tower))
    train(with_train(recipe, steps=1))
    return tmp_path / "run" / "checkpoint-000001"


def flipped(content: bytes) -> bytes:
    return content[:-7] + bytes([content[-7] ^ 1]) + content[-6:]


DAMAGES = {
    "a flipped bit": flipped,
    "truncated": lambda content: content[:-100],
    "zeroed": lambda content: bytes(len(content)),
}
READERS = {
    "load": lambda checkpoint, recipe: load(checkpoint),
    "load a run": lambda checkpoint, recipe: load(checkpoint.parent),
    "the next run": lambda checkpoint, recipe: load_parts(
        replace(recipe.model, projector=replace(recipe.model.projector, weights=str(checkpoint)))
    ),
    "the next run, by file": lambda checkpoint, recipe: load_parts(
        replace(
            recipe.model,
            projector=replace(recipe.model.projector, weights=str(checkpoint / "projector.safetensors")),
        )
    ),
}


def test_damaged_weights_are_refused_by_every_reader(checkpoint, recipe):
    for reader in READERS.values():
        reader(checkpoint, recipe)
    for name in (
        "projector.safetensors",
        "vision.safetensors",
        "adapter/adapter_model.safetensors",
        "adapter/moslora.safetensors",
    ):
        file = checkpoint / name
        whole = file.read_bytes()
        for what, damage in DAMAGES.items():
            file.write_bytes(damage(whole))
            for how, read in READERS.items():
                if "next run" in how and "projector" not in name:
                    continue
                with pytest.raises(MoSLoRAError) as caught:
                    read(checkpoint, recipe)
                assert str(file) in str(caught.value), (name, what, how)
        file.unlink()
        with pytest.raises(MoSLoRAError, match=f"{file.name} is missing"):
            load(checkpoint)
        file.write_bytes(whole)
    load(checkpoint)


def test_other_files_may_be_edited_which_is_said_and_a_projector_alone_has_no_manifest(
    checkpoint, recipe, tmp_path, caplog
):
    (checkpoint / "preprocessing.json").unlink()
    load(checkpoint)
    assert "was edited" not in caplog.text
    with (checkpoint / "config.yaml").open("a") as config:
        config.write("# moved\n")
    load(checkpoint.parent)
    assert f"{checkpoint / 'config.yaml'} was edited after the checkpoint was saved" in caplog.text
    file = tmp_path / "projector.safetensors"
    shutil.copy(checkpoint / "projector.safetensors", file)
    alone = replace(recipe.model, projector=replace(recipe.model.projector, weights=str(file)))
    load_parts(alone)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(MoSLoRAError, match="is damaged or truncated"):
        load_parts(alone)


@pytest.mark.parametrize("content", [b"{", b"[]", b'{"files": 3}'])
def test_a_damaged_manifest_is_one_line(checkpoint, content):
    (checkpoint / "manifest.json").write_bytes(content)
    with pytest.raises(MoSLoRAError, match=r"manifest\.json is damaged"):
        load(checkpoint)


Change = Callable[[str], str | None]


def changed(source: Path, target: Path, change: Change) -> Path:
    """A copy of a model with other names of its weights; None leaves one out."""
    target.mkdir()
    for file in source.iterdir():
        if file.name != "model.safetensors":
            (target / file.name).write_bytes(file.read_bytes())
    weights: Mapping[str, Tensor] = load_file(source / "model.safetensors")
    named = {name: tensor for old, tensor in weights.items() if (name := change(old)) is not None}
    save_file(named, target / "model.safetensors", metadata={"format": "pt"})
    return target


WRAPPED: Mapping[str, Change] = {
    "compiled": lambda name: f"_orig_mod.{name}",
    "data parallel": lambda name: f"module.{name}",
    "a layer": lambda name: None if ".layers.1.mlp.up_proj" in name else name,
}


@pytest.mark.parametrize("change", WRAPPED)
def test_a_language_model_that_lacks_weights_is_refused(change: str, language_folder: Path, tmp_path: Path) -> None:
    broken = changed(language_folder, tmp_path / "broken", WRAPPED[change])
    for loading in (lambda: load_language(str(broken), None, dtype=torch.float32), lambda: load(broken)):
        with pytest.raises(ModelError, match=r"lacks \d+ weights of \w+, such as .*: they would be random"):
            loading()


def test_a_ready_made_model_that_lacks_weights_is_refused(tmp_path: Path) -> None:
    whole = make_vlm(tmp_path / "whole", "qwen2_5_vl")
    broken = changed(whole, tmp_path / "broken", WRAPPED["compiled"])
    with pytest.raises(ModelError, match=r"such as _orig_mod\."):
        load_pretrained_vlm(str(broken), None, dtype=torch.float32)


@pytest.mark.parametrize("kind", ["vit", "siglip", "dinov2"])
def test_a_tower_needs_the_weights_that_its_features_use(kind: str, tmp_path: Path) -> None:
    whole = make_vision(tmp_path / "whole", kind)
    behind = changed(
        whole, tmp_path / "behind",
        lambda name: None if any(part in name for part in ("pooler", "head.", "layer.2.", "layers.2.")) else name,
    )  # fmt: skip
    second_last = VisionConfig(name=str(behind), feature_layer=-2)
    load_vision(second_last)
    with pytest.raises(ModelError, match=r"lacks \d+ weights"):
        load_vision(VisionConfig(name=str(behind), feature_layer=-1))
    first = changed(whole, tmp_path / "first", lambda name: None if "layer.0." in name or "layers.0." in name else name)
    with pytest.raises(ModelError, match=r"lacks \d+ weights"):
        load_vision(VisionConfig(name=str(first), feature_layer=-2))
