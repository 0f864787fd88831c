"""What a step of a ready-made model needs, by its own pictures: tiles and patches as the batch holds them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny import make_language, make_vision
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from vlms import FAMILIES, make_vlm

from mm_moslora.batch import Batch, Example
from mm_moslora.config import Recipe
from mm_moslora.kernels.attention.attention_choice import set_attention
from mm_moslora.kernels.attention.segment_attention import SEGMENTS
from mm_moslora.models.assembly import Parts, load_parts
from mm_moslora.models.batching.padded_batch import picture_inputs
from mm_moslora.models.trainable_parts import attach_adapters
from mm_moslora.models.vlm import has_own_forward, image_features, needs_padding
from mm_moslora.training.metrics.model_cost import FlopCounter, StepShape, model_cost

PICTURES = ((150, 60), (40, 90), (64, 64))
"""Widths and heights: other tiles and patches each; the last two belong to one conversation."""


def built(model: dict[str, object]) -> Parts:
    recipe = Recipe.from_dict({"model": model, "adapter": {"rank": 4}})
    assembly = load_parts(recipe.model)
    attach_adapters(assembly, recipe.model, recipe.adapter)
    if not needs_padding(assembly.model.train()):
        set_attention(assembly.model, SEGMENTS)
    return assembly


def seen_batch(assembly: Parts) -> Batch:
    """A conversation with one picture and one with two."""
    torch.manual_seed(0)
    pictures = [Image.effect_noise(size, 50).convert("RGB") for size in PICTURES]
    examples = []
    for own in (pictures[:1], pictures[1:]):
        seen = assembly.image_processing.process(own)
        ids = torch.tensor([number for one in seen for number in (*one.placeholders, 5)] + [5] * 24)
        examples.append(Example(id="", input_ids=ids, supervised=torch.arange(len(ids)) >= len(ids) - 9, pictures=seen))
    return Batch.from_examples(examples)


def needed(recipe: dict[str, object], assembly: Parts, batch: Batch) -> float:
    """FLOPs of the batch's pictures, by those of a picture of another size on the meta device."""
    given = Recipe.from_dict({"model": recipe, "adapter": {"rank": 4}})
    picture = model_cost(given.model, given.adapter).picture
    shape = StepShape.of([1], supervised=1, images=picture.count(batch))
    return FlopCounter(assembly.model, picture=picture).count(shape).vision


def counted(assembly: Parts, batch: Batch) -> int:
    """By torch, of the pictures' way through tower and projector and, where one of them trains, back."""
    model = assembly.model
    # Its counter knows neither the CPU's fused attention nor the in-place addmm_ of adapters.
    known = {torch.ops.aten.addmm_: lambda _, left, right, **__: 2 * left[0] * left[1] * right[1]}
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False, custom_mapping=known) as mode:
        if batch.image_inputs or has_own_forward(model):
            inputs = picture_inputs(model, batch.pixel_values, batch.image_inputs)
            output = model.base_model.get_image_features(**inputs, return_dict=True)
            features = tree_leaves((output.pooler_output, getattr(output, "deepstack_features", ())))
        else:
            features = [image_features(model, batch.pixel_values)]
        if features[0].requires_grad:
            sum(feature.sum() for feature in features).backward()
    return mode.get_total_flops()


@pytest.mark.parametrize(
    ("family", "projector"), [*((family, "full") for family in FAMILIES), ("qwen2_5_vl", "frozen")]
)
def test_the_pictures_of_a_step_are_counted_within_two_per_cent_of_torchs_count(
    family: str, projector: str, tmp_path: Path
) -> None:
    model = {"vlm": str(make_vlm(tmp_path / family, family)), "projector": {"mode": projector}}
    assembly = built(model)
    batch = seen_batch(assembly)
    assert needed(model, assembly, batch) == pytest.approx(counted(assembly, batch), rel=0.02)


def test_tiles_of_an_assembled_model_are_counted(tmp_path: Path) -> None:
    parts = {"language": str(make_language(tmp_path / "language")), "image_aspect": "anyres"}
    model = parts | {"vision": {"name": str(make_vision(tmp_path / "vision", "clip"))}}
    assembly = built(model)
    batch = seen_batch(assembly)
    assert needed(model, assembly, batch) == pytest.approx(counted(assembly, batch), rel=0.02)
