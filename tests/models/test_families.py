"""The table of model families: a line for every entry, held against transformers' own classes."""

from __future__ import annotations

import re

import pytest
import torch
from tiny import make_vision
from vlms import FAMILIES

from mm_moslora.config import VisionConfig
from mm_moslora.models.families import (
    LEAN_LAYERS,
    TOWERS,
    VLMS,
    VlmFamily,
    processor_family,
    vlm_family,
)
from mm_moslora.models.memory_efficient.kernel_selection import use_lean_layers
from mm_moslora.models.pretrained_vlm import tower_path
from mm_moslora.models.vision.vision_tower import load_vision
from mm_moslora.models.vlm import has_own_forward, needs_padding, part_of, projectors


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("clip_vision_model", "clip"), ("siglip_vision_model", "siglip"), ("vit", "vit"), ("dinov2", "dinov2"),
        ("dinov2_with_registers", "dinov2_registers"), ("dinov3_vit", "dinov3"),
    ],
)  # fmt: skip
def test_a_tower_has_the_statistics_of_its_family(name, kind, tmp_path):
    family = TOWERS[name]
    tower, spec = load_vision(VisionConfig(name=str(make_vision(tmp_path, kind))))
    assert tower.config.model_type == name
    assert (spec.mean, spec.std) == (family.statistics.mean, family.statistics.std)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_ready_made_model_has_the_parts_of_its_family(name):
    torch.manual_seed(0)
    model, processor = FAMILIES[name]()
    family = vlm_family(name)
    assert family is VLMS[model.config.model_type]
    assert tower_path(model) == family.tower
    assert all(any(re.search(rf"{end}$", path) for end in family.projectors) for path in projectors(model))
    assert projectors(model)
    assert {part_of(path) for path, _ in model.named_parameters()} == {"projector", "vision", "language"}
    assert needs_padding(model) == (has_own_forward(model) and not family.packed)
    assert processor_family(processor) in ((family,) if family.processor else (VlmFamily(),))
    decoder = type(model.get_decoder().layers[0]).__name__
    assert use_lean_layers(model) == (2 if decoder in LEAN_LAYERS else 0)
