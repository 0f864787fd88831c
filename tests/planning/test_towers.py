"""Plans with every kind of vision tower: what is read off configurations is what loading gives."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from planning_configs import memory_of
from tiny import make_language, make_vision
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig

from mm_moslora.adapters import save_adapter
from mm_moslora.config import Recipe, VisionConfig
from mm_moslora.models.assembly import load_parts
from mm_moslora.models.meta_model import build_meta_model
from mm_moslora.models.trainable_parts import attach_adapters
from mm_moslora.models.vision.vision_tower import load_vision, sketch_vision
from mm_moslora.planning.run_plan import DataSize, plan
from mm_moslora.training.metrics.gpu_specs import parse_gpus
from mm_moslora.utils.errors import ConfigError


@pytest.fixture(scope="module")
def towers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, VisionConfig]:
    folder = tmp_path_factory.mktemp("towers")
    dino, siglip = make_vision(folder / "dinov2"), make_vision(folder / "siglip", "siglip28")
    return {
        "transformers": VisionConfig(name=str(dino), feature_layer=-2, image_size=42),
        "transformers, without prefix": VisionConfig(name=str(siglip), feature_layer=-2),
        "two side by side": VisionConfig(name=str(dino), fuse_with=str(siglip), feature_layer=-2),
        "open_clip": VisionConfig(name="open_clip:ViT-S-32-alt", feature_layer=-2),
        "timm, convolutions": VisionConfig(name="timm:efficientnet_lite0", feature_layer=-1),
        "timm, transformer": VisionConfig(name="timm:vit_tiny_patch16_224", feature_layer=-2),
    }


KINDS = [
    "transformers", "transformers, without prefix", "two side by side", "open_clip", "timm, convolutions",
    "timm, transformer",
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_a_sketch_is_the_tower_without_its_weights(kind: str, towers: dict[str, VisionConfig]) -> None:
    sketched, spec = sketch_vision(towers[kind])
    loaded, expected = load_vision(towers[kind])
    assert spec == expected
    assert all(parameter.is_meta for parameter in sketched.parameters())
    assert {n: p.shape for n, p in sketched.named_parameters()} == {n: p.shape for n, p in loaded.named_parameters()}


@pytest.fixture(scope="module")
def language(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_language(tmp_path_factory.mktemp("language")))


def recipe(language: str, vision: VisionConfig, *, mode: str = "frozen") -> Recipe:
    fields = {"name": vision.name, "feature_layer": vision.feature_layer, "mode": mode}
    more = {"image_size": vision.image_size, "fuse_with": vision.fuse_with}
    fields |= {key: value for key, value in more.items() if value}
    return Recipe.from_dict({"model": {"language": language, "vision": fields}})


@pytest.mark.parametrize("kind", ["transformers", "open_clip"])
def test_checkpointing_a_tower_is_planned(kind: str, towers, language: str) -> None:
    chosen = recipe(language, towers[kind], mode="full").to_dict()
    plain = memory_of(Recipe.from_dict(chosen))
    chosen["train"]["vision_gradient_checkpointing"] = True
    assert 0 < memory_of(Recipe.from_dict(chosen)).picture.kept < 0.6 * plain.picture.kept


@pytest.mark.parametrize("kind", KINDS)
def test_every_tower_can_be_planned_and_its_work_is_counted(kind: str, towers, language: str) -> None:
    chosen = recipe(language, towers[kind])
    data = DataSize(samples=1000, tokens=100)
    found = plan(chosen, parse_gpus("2xRTX4090"), data)
    assert found.best is not None
    tower, spec = load_vision(towers[kind])
    assert found.cost.parts["vision"][0] == sum(parameter.numel() for parameter in tower.parameters())
    # torch's counter does not know the CPU's fused attention, so attention is spelt out.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counted:
        tower.eval()(torch.zeros(1, 3, spec.size, spec.size), output_hidden_states=towers[kind].feature_layer)
    # The projector: forward, for its weights, and for the input of all but its first layer.
    projector = 2 * spec.tokens * found.cost.parts["projector"][0]
    assert 2 * projector < found.flops.vision - counted.get_total_flops() < 3.1 * projector


def test_a_tower_that_trains_needs_more_of_everything(towers, language: str) -> None:
    frozen, trained = (memory_of(recipe(language, towers["transformers"], mode=mode)) for mode in ("frozen", "full"))
    assert trained.picture.kept > 2 * frozen.picture.kept
    assert trained.trainable > frozen.trainable
    chosen = recipe(language, towers["transformers"], mode="full").to_dict()
    chosen["model"]["vision"] |= {"mode": "last_n", "last_n": 1}
    last = memory_of(Recipe.from_dict(chosen))  # of three layers
    assert frozen.picture.kept < last.picture.kept < 0.5 * trained.picture.kept
    plain = recipe(language, towers["transformers"])
    assert build_meta_model(plain.model, plain.adapter).tokens_per_image == 36


@pytest.mark.parametrize(
    ("kind", "name"), [("two side by side", "FusedVisionModel"), ("timm, transformer", "WrappedVisionModel")]
)
def test_a_tower_without_checkpointing_is_refused_by_a_plan_as_by_a_run(kind, name, towers, language: str) -> None:
    chosen = recipe(language, towers[kind]).to_dict()
    chosen["train"]["vision_gradient_checkpointing"] = True
    with pytest.raises(ConfigError, match=f"{name} has no gradient checkpointing"):
        memory_of(Recipe.from_dict(chosen))


def test_a_recipe_that_starts_from_an_adapter_is_planned(towers, language: str, tmp_path) -> None:
    """The image token makes the vocabulary one larger than the language model's configuration says."""
    fresh = recipe(language, towers["transformers"])
    parts = load_parts(fresh.model)
    attach_adapters(parts, fresh.model, fresh.adapter)
    assert parts.model.get_input_embeddings().num_embeddings > AutoConfig.from_pretrained(language).vocab_size
    save_adapter(parts.peft_model, tmp_path, base=parts.base)
    again = dataclasses.replace(fresh, adapter=dataclasses.replace(fresh.adapter, weights=str(tmp_path)))
    assert memory_of(again) == memory_of(fresh)
