"""Vision encoders: open_clip towers as transformers' own, two side by side, several layers, and what trains in them."""

from __future__ import annotations

import pytest
import timm
import torch
from tiny import make_vision
from transformers import CLIPVisionModel, SiglipVisionModel

from mm_moslora.config import AdapterConfig, ModelConfig, VisionConfig
from mm_moslora.models.assembly import load_parts
from mm_moslora.models.export.export_huggingface import export_model
from mm_moslora.models.load_model import load
from mm_moslora.models.trainable_parts import attach_adapters
from mm_moslora.models.vision.timm_open_clip_tower import to_transformers
from mm_moslora.models.vision.vision_tower import load_vision
from mm_moslora.models.vlm import part_of
from mm_moslora.utils.errors import ModelError

PLAIN = {"image_size": 32, "layers": 3, "width": 64, "head_width": 32, "patch_size": 8}


def pixels(size=32, count=2):
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(4))


def built(quick_gelu=False, **more):
    from open_clip.model import _build_vision_tower

    torch.manual_seed(3)
    return _build_vision_tower(32, PLAIN | more, quick_gelu=quick_gelu).eval()


def timm_siglip(**more):
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(3)
    settings = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2, "num_classes": 0}
    return VisionTransformer(**settings, class_token=False, global_pool="map", **more).eval()


@pytest.mark.parametrize("quick_gelu", [True, False])
@pytest.mark.parametrize("more", [{}, {"mlp_ratio": 3.0, "head_width": 16}])
def test_an_open_clip_tower_becomes_a_clip_tower_with_equal_features(quick_gelu, more):
    tower = built(quick_gelu, **more)
    model = to_transformers(tower)
    assert isinstance(model, CLIPVisionModel)
    with torch.no_grad():
        theirs = tower.forward_intermediates(pixels(), indices=[0, 1, 2], normalize_intermediates=False)
        ours = model.eval()(pixels(), output_hidden_states=True).hidden_states
    for block, expected in enumerate(theirs["image_intermediates"]):
        torch.testing.assert_close(ours[block + 1][:, 1:], expected.flatten(2).transpose(1, 2), rtol=0, atol=1e-5)


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
def test_a_siglip_tower_of_timm_becomes_a_siglip_tower_with_equal_features(activation):
    trunk = timm_siglip(act_layer=activation)
    model = to_transformers(trunk)
    assert isinstance(model, SiglipVisionModel)
    with torch.no_grad():
        final, maps = trunk.forward_intermediates(pixels(), indices=[0, 1, 2])
        output = model.eval()(pixels(), output_hidden_states=True)
    for block, expected in enumerate(maps):
        ours = output.hidden_states[block + 1]
        torch.testing.assert_close(ours, expected.flatten(2).transpose(1, 2), rtol=0, atol=1e-5)
    torch.testing.assert_close(output.last_hidden_state, final, rtol=0, atol=1e-5)


@pytest.mark.parametrize("more", [{"no_ln_pre": True}, {"ls_init_value": 1e-4}, {"pos_embed_type": "sin_cos_2d"}])
def test_what_transformers_cannot_express_stays_open_clips_own(more):
    assert to_transformers(built(**more)) is None
    assert to_transformers(timm.create_model("test_vit", num_classes=0)) is None  # it has a class token


def test_two_towers_see_the_picture_each_in_its_own_way(language_folder, tmp_path):
    names = [str(make_vision(tmp_path / kind, kind)) for kind in ("dinov2", "siglip28")]
    config = ModelConfig(language=str(language_folder), vision=VisionConfig(name=names[0], fuse_with=names[1]))
    assembly = load_parts(config)
    assert (assembly.image.width, assembly.image.tokens, assembly.image.prefix) == (64, 16, 0)
    (first, spec), (second, other) = (load_vision(VisionConfig(name=name)) for name in names)
    picture = torch.rand(1, 3, 28, 28, generator=torch.Generator().manual_seed(0))

    def normalised(item):
        return (picture - torch.tensor(item.mean)[:, None, None]) / torch.tensor(item.std)[:, None, None]

    with torch.no_grad():
        expected = torch.cat(
            [
                first.eval()(normalised(spec), output_hidden_states=-2).hidden_states[-2][:, 1:],
                second.eval()(normalised(other), output_hidden_states=-2).hidden_states[-2],
            ],
            dim=-1,
        )
        tower = assembly.model.model.vision_tower
        seen = tower(normalised(spec), output_hidden_states=-2).hidden_states[-2]
    torch.testing.assert_close(seen, expected, rtol=0, atol=1e-5)
    exported = export_model(assembly, tmp_path / "out")
    assert exported.max_logit_difference < 1e-5
    assert load(tmp_path / "out").tokens_per_image == 16
    with pytest.raises(ModelError, match="two vision towers side by side"):
        export_model(assembly, tmp_path / "stock", require_stock=True)


def test_towers_with_other_patches_cannot_be_joined(tmp_path):
    names = [str(make_vision(tmp_path / kind, kind)) for kind in ("dinov2", "dinov3")]
    with pytest.raises(ModelError, match=r"gives 64 patches at 64 pixels; .* gives 81"):
        load_vision(VisionConfig(name=names[0], fuse_with=names[1], image_size=64))


def test_a_siglip2_whose_patches_depend_on_the_picture_is_refused(tmp_path):
    import transformers

    transformers.Siglip2VisionConfig(hidden_size=32, num_attention_heads=2, num_hidden_layers=1).save_pretrained(
        tmp_path
    )
    with pytest.raises(ModelError, match="NaFlex"):
        load_vision(VisionConfig(name=str(tmp_path)))


@pytest.mark.parametrize("kind", ["clip", "siglip", "vit", "dinov2_registers", "dinov3", "fused"])
@pytest.mark.parametrize("mode", ["frozen", "adapter", "last_n", "full"])
def test_a_tower_trains_as_the_recipe_says(kind, mode, language_folder, tmp_path):
    name = str(make_vision(tmp_path / "a", "dinov2" if kind == "fused" else kind))
    beside = str(make_vision(tmp_path / "b", "siglip28")) if kind == "fused" else None
    vision = VisionConfig(name=name, fuse_with=beside, mode=mode, last_n=int(mode == "last_n"))
    config = ModelConfig(language=str(language_folder), vision=vision)
    assembly = load_parts(config)
    attach_adapters(assembly, config, AdapterConfig(rank=2))
    tower = {n: p for n, p in assembly.model.named_parameters() if part_of(n) == "vision"}
    trains = [name for name, parameter in tower.items() if parameter.requires_grad]
    if mode == "frozen":
        assert not trains
    elif mode == "full":
        assert len(trains) == len(tower)
    elif mode == "adapter":
        assert trains
        assert all("lora_" in name for name in trains)
    else:
        assert trains
        assert len({name.split("towers.")[-1][:1] for name in trains}) == (2 if kind == "fused" else 1)
        assert all(".2." in name for name in trains)


@pytest.mark.parametrize(
    ("name", "tag"),
    [
        ("ViT-B-16-SigLIP", "webli"), ("ViT-B-32", "openai"), ("MobileCLIP-S1", "datacompdr"),
        ("MobileCLIP-S1", "/weights/of/a/file.pt"), ("MobileCLIP-S1", None),
    ],
)  # fmt: skip
def test_open_clip_takes_statistics_and_interpolation_of_the_pretrained_tag(name, tag):
    import open_clip

    from mm_moslora.models.vision.timm_open_clip_tower import load_open_clip

    known = open_clip.get_pretrained_cfg(name, tag if tag in ("webli", "openai") else "datacompdr")
    _, pixels = load_open_clip(name, VisionConfig(name=f"open_clip:{name}", pretrained=tag), weights=False)
    assert (pixels.mean, pixels.std) == (known["mean"], known["std"])
    assert pixels.resample == {"bilinear": 2, "bicubic": 3}[known["interpolation"]]
