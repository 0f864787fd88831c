"""The table of model families: a line for every entry, held against transformers' own classes."""

from __future__ import annotations

import re

import pytest
import torch
import transformers
from tiny import make_vision
from transformers import AutoConfig
from vlms import FAMILIES

from mm_moslora.config import VisionConfig
from mm_moslora.models.export.gguf_model import FAMILIES as GGUF
from mm_moslora.models.families import (
    DECODERS,
    LEAN_LAYERS,
    TOWERS,
    VLMS,
    VlmFamily,
    processor_family,
    tower_family,
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


@pytest.mark.parametrize("name", TOWERS)
def test_transformers_knows_every_tower_and_the_model_around_it(name):
    family = TOWERS[name]
    assert type(AutoConfig.for_model(name)).model_type == name
    if family.whole is not None:
        assert tower_family(family.whole) is family
        assert AutoConfig.for_model(family.whole).vision_config.model_type == name


SMALL = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


@pytest.mark.parametrize("name", GGUF)
def test_a_decoder_that_is_exported_to_gguf_has_an_entry(name):
    assert name in DECODERS


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


@pytest.mark.parametrize("name", VLMS)
def test_transformers_knows_every_ready_made_model_and_its_processor(name):
    assert AutoConfig.for_model(name).model_type == name
    assert not VLMS[name].processor or hasattr(transformers, VLMS[name].processor)


def test_an_entry_is_what_makes_a_family(monkeypatch):
    """Without its entry a model runs on the defaults."""
    model, processor = FAMILIES["smolvlm"]()
    assert not needs_padding(model)
    monkeypatch.delitem(VLMS, "smolvlm")
    assert needs_padding(model)
    assert processor_family(processor) == VlmFamily()
