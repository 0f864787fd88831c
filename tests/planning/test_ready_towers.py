"""Plans with a ready-made model whose tower carries adapters: counts and kept bytes are those of the real model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from vlms import FAMILIES, make_vlm

from mm_moslora.config import Recipe
from mm_moslora.footprint import kept_bytes
from mm_moslora.gpus import parse_gpus
from mm_moslora.models.build import assemble
from mm_moslora.models.ready import READY_PIXELS, tower_path
from mm_moslora.models.trainable import attach_adapters, component_table
from mm_moslora.planning import DataSize, plan
from mm_moslora.training.optim import parameter_groups
from mm_moslora.training.speed import Speedometer


def a_picture(config: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Of the size that plans take, or one tile."""
    if hasattr(config, "spatial_merge_size"):
        side = READY_PIXELS // config.patch_size
        width = 3 * config.temporal_patch_size * config.patch_size**2
        return torch.zeros(side**2, width), {"grid_thw": torch.tensor([[1, side, side]])}
    return torch.zeros(1, 3, 32, 32), {}


@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_in_a_ready_made_tower_are_planned_as_they_train(family: str, tmp_path) -> None:
    model = {"vlm": str(make_vlm(tmp_path / family, family)), "vision": {"mode": "adapter"}}
    optim = {"lr": 1e-4, "vision_lr": 2e-4, "projector_lr": 3e-4, "lora_plus_ratio": 4.0}
    recipe = Recipe.from_dict({"model": model, "adapter": {"rank": 4}, "optim": optim})
    assembly = assemble(recipe.model)
    attach_adapters(assembly, recipe.model, recipe.adapter)
    real = {row.name: (row.total, row.trainable) for row in component_table(assembly)}

    rates = {group.name: group.peak_lr for group in parameter_groups(assembly.model, recipe.optim)}
    assert rates == {"adapter": 1e-4, "adapter B": 4e-4, "mixer": 1e-4, "vision": 2e-4, "vision B": 8e-4}

    found = plan(recipe, parse_gpus("8xA100-80G"), DataSize(samples=1000, tokens=300))
    parts = dict(found.footprint.parts)
    mixers = [parts.pop(name) for name in ("mixer", "vision mixer")]
    assert parts | {"mixer": tuple(map(sum, zip(*mixers, strict=True)))} == real

    tower = assembly.model.get_submodule(tower_path(assembly.model)).bfloat16()
    pixels, inputs = a_picture(tower.config)
    kept = kept_bytes(lambda: tower(pixels.bfloat16(), **inputs), tower)
    assert found.footprint.kept_per_image == pytest.approx(kept, rel=0.1)
    assert found.flops.vision > 0
    assert Speedometer(assembly.model, device_name="NVIDIA A100-SXM4-80GB").counter is not None


@pytest.mark.parametrize("family", FAMILIES)
def test_checkpointing_a_ready_made_tower_is_planned(family: str, tmp_path) -> None:
    model = {"vlm": str(make_vlm(tmp_path / family, family)), "vision": {"mode": "adapter"}}
    plain, again = (
        Recipe.from_dict({"model": model, "train": {"vision_gradient_checkpointing": wanted}})
        for wanted in (False, True)
    )
    data = DataSize(samples=1000, tokens=300)
    found, cheaper = (plan(recipe, parse_gpus("8xA100-80G"), data) for recipe in (plain, again))
    assert 0 < cheaper.footprint.kept_per_image < found.footprint.kept_per_image
    assert found.flops.vision < cheaper.flops.vision < 1.5 * found.flops.vision
