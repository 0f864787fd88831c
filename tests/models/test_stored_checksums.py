"""Weights of a checkpoint are read only with the bytes that its manifest names."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest
from trials import with_train

from mm_moslora.models.assembly import load_parts
from mm_moslora.models.load_model import load
from mm_moslora.training.training_loop import train
from mm_moslora.utils.errors import MoSLoRAError


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


def test_other_files_may_be_edited_and_a_projector_alone_has_no_manifest(checkpoint, recipe, tmp_path):
    (checkpoint / "preprocessing.json").unlink()
    load(checkpoint)
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
