"""Assembly: any tower, any projector, saved and loaded back with equal logits."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny import make_vision, supervised_logits
from transformers import AutoModelForImageTextToText, AutoProcessor, LlavaForConditionalGeneration
from vlm_runs import vision_name

from mm_moslora.batch import Batch, Example, ProcessedImage
from mm_moslora.config import AdapterConfig, ModelConfig, ProjectorConfig, VisionConfig
from mm_moslora.kernels.attention.attention_choice import choose_attention, set_attention
from mm_moslora.kernels.attention.segment_attention import SEGMENTS
from mm_moslora.models.assembly import load_parts
from mm_moslora.models.processing.image_processing import dummy_image_example
from mm_moslora.models.processing.llava_processor import save_processor
from mm_moslora.models.projectors.projector_layers import ProjectorShape
from mm_moslora.models.trainable_parts import attach_adapters
from mm_moslora.models.vlm import image_features
from mm_moslora.utils.errors import ModelError


def config_for(language, vision, projector="mlp2x_gelu", **options):
    return ModelConfig(
        language=str(language),
        vision=VisionConfig(name=vision, **options),
        projector=ProjectorConfig(kind=projector),
    )


def example(assembly, text=(5, 6, 7, 8), name="a"):
    places = [assembly.image_token_id] * assembly.tokens_per_image
    ids = torch.tensor([1, *places, *text])
    supervised = torch.zeros(len(ids), dtype=torch.bool)
    supervised[-3:] = True
    generator = torch.Generator().manual_seed(3)
    size = assembly.image.size
    picture = ProcessedImage(tensors={"pixel_values": torch.randn(1, 3, size, size, generator=generator)})
    return Example(id=name, input_ids=ids, supervised=supervised, pictures=[picture])


MATRIX = [
    ("dinov2", "mlp2x_gelu", True, 16),
    ("clip", "mlp2x_gelu", True, 16),
    ("siglip", "mlp2x_gelu", True, 16),
    ("dinov2", "pixel_shuffle", False, 4),
    ("clip", "linear", False, 16),
    ("open_clip", "mlp2x_gelu", True, 16),
    ("timm", "mlp2x_gelu", False, 100),
    ("vit", "mlp2x_gelu", True, 16),
    ("dinov2_registers", "mlp2x_gelu", False, 16),
    ("dinov3", "mlp2x_gelu", False, 16),
    ("open_clip", "pixel_shuffle", False, 4),
    ("clip cls_patch", "mlp2x_gelu", True, 17),
    ("dinov2 cls_patch", "mlp2x_gelu", True, 17),
]


@pytest.mark.parametrize(("vision", "projector", "stock", "tokens"), MATRIX)
def test_every_combination_builds_saves_and_loads_back_with_equal_logits(
    vision, projector, stock, tokens, language_folder, tmp_path
):
    vision, _, select = vision.partition(" ")
    config = config_for(language_folder, vision_name(vision, tmp_path), projector, select=select or "patch")
    assembly = load_parts(config)
    assert assembly.tokens_per_image == tokens
    assert (type(assembly.model) is LlavaForConditionalGeneration) == stock
    assembly.model.save_pretrained(tmp_path / "out")
    save_processor(assembly.processor, tmp_path / "out")
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(tmp_path / "out", backend="pil")
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what color?"}]}]
    text = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    inputs = processor(images=[Image.new("RGB", (50, 70), (200, 30, 30))], text=text, return_tensors="pt")
    assert int((inputs["input_ids"] == model.config.image_token_id).sum()) == tokens
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).logits, assembly.model(**inputs).logits, rtol=0, atol=0)
    assert model.generate(**inputs, max_new_tokens=2, do_sample=False).shape[1] >= inputs["input_ids"].shape[1]


@pytest.mark.parametrize("vision", ["dinov2", "open_clip"])
def test_a_padding_free_batch_gives_each_sample_the_logits_it_has_alone(vision, language_folder, tmp_path):
    assembly = load_parts(config_for(language_folder, vision_name(vision, tmp_path)))
    with_image = example(assembly)
    text = Example(id="t", input_ids=torch.tensor([4, 5, 6, 9]), supervised=torch.tensor([False, True, True, True]))
    batch = Batch.from_examples([text, with_image, text])
    alone = []
    with torch.no_grad():
        for item in (text, with_image, text):
            shown = Batch.from_examples([item]).pixel_values
            logits = assembly.model(input_ids=item.input_ids[None], pixel_values=shown).logits[0]
            alone.append(logits[item.supervised.nonzero().flatten() - 1])
        for attention in (choose_attention(assembly.model).name, "sdpa"):
            set_attention(assembly.model, attention)
            torch.testing.assert_close(supervised_logits(assembly.model, batch), torch.cat(alone), rtol=0, atol=1e-5)
    assert choose_attention(assembly.model).name == SEGMENTS


def test_a_dummy_image_touches_every_projector_weight_and_changes_nothing(language_folder, vision_folder):
    assembly = load_parts(config_for(language_folder, str(vision_folder)))
    assembly.model.requires_grad_(False)
    projector = assembly.model.model.multi_modal_projector.requires_grad_(True)
    text = Example(id="t", input_ids=torch.tensor([4, 5, 6]), supervised=torch.tensor([False, True, True]))
    batch = Batch.from_examples([text])
    plain = supervised_logits(assembly.model, batch)
    dummy = supervised_logits(
        assembly.model, batch, dummy=Batch.from_examples([dummy_image_example(assembly.image_processing)])
    )
    torch.testing.assert_close(dummy, plain, rtol=0, atol=0)
    dummy.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in projector.parameters())


def test_placeholders_that_do_not_match_the_images_are_named(language_folder, vision_folder):
    assembly = load_parts(config_for(language_folder, str(vision_folder)))
    good = example(assembly, name="row 17")
    bad = replace(good, input_ids=good.input_ids[:-6], supervised=good.supervised[:-6])
    with pytest.raises(ModelError, match=r"14 image placeholders.*16 visual tokens.*row 17"):
        supervised_logits(assembly.model, Batch.from_examples([bad]))


def test_data_preparation_and_planning_need_no_weights(language_folder, tmp_path):
    tower = make_vision(tmp_path / "clip", "clip")
    (tower / "model.safetensors").unlink()
    config = config_for(language_folder, str(tower))
    found = load_parts(config, weights="none")
    assert (found.model, found.tokens_per_image) == (None, 16)
    assert len(found.image_processing.placeholders([(30, 20)])[0]) == 16
    shapes = load_parts(config, weights="shapes")
    assert {parameter.device.type for parameter in shapes.model.parameters()} == {"meta"}
    assert (shapes.tokenizer, shapes.processor, shapes.tokens_per_image) == (None, None, 16)


@pytest.mark.parametrize("aspect", ["pad", "anyres"])
def test_on_the_meta_device_no_weights_are_read_and_all_else_is_the_same(aspect, language_folder, tmp_path):
    config = replace(config_for(language_folder, str(make_vision(tmp_path / "clip", "clip"))), image_aspect=aspect)
    loaded, states = [], []
    for device in (None, torch.device("meta")):
        torch.manual_seed(3)
        parts = load_parts(config, device=device)
        attach_adapters(parts, config, AdapterConfig(rank=2, alpha=4))
        loaded.append(parts.model)
        states.append(torch.get_rng_state())
    assert torch.equal(*states)
    here, there = (dict(model.named_parameters(remove_duplicate=False)) for model in loaded)
    assert {name: (p.shape, p.dtype, p.requires_grad) for name, p in here.items()} == {
        name: (p.shape, p.dtype, p.requires_grad) for name, p in there.items()
    }
    made = [name for name, parameter in there.items() if not parameter.is_meta]
    assert all("multi_modal_projector" in name or "image_newline" in name for name in made)
    assert all(torch.equal(there[name], here[name]) for name in made)
    assert len(made) == 4 + (aspect == "anyres")
    assert loaded[1].get_input_embeddings().weight is loaded[1].get_output_embeddings().weight


@pytest.mark.parametrize("weights", ["all", "none", "shapes"])
@pytest.mark.parametrize(("vision", "projector"), [("dinov2", "linear"), ("siglip", "mlp2x_gelu")])
def test_parts_that_do_not_fit_are_refused_however_much_is_loaded(
    weights, vision, projector, language_folder, tmp_path
):
    config = config_for(language_folder, vision_name(vision, tmp_path), projector, select="cls_patch")
    with pytest.raises(ModelError, match="cls_patch, which only a stock tower"):
        load_parts(config, weights=weights)


def test_dinov2_runs_at_another_size_and_clip_refuses(language_folder, tmp_path):
    dinov2 = config_for(language_folder, str(make_vision(tmp_path / "dinov2", "dinov2")), image_size=14)
    assert load_parts(dinov2).tokens_per_image == 4
    clip = config_for(language_folder, str(make_vision(tmp_path / "clip", "clip")), image_size=64)
    with pytest.raises(ModelError, match="fixed position embeddings for 32 pixels"):
        load_parts(clip)


@pytest.mark.parametrize("part", ["language", "vision"])
@pytest.mark.parametrize("kept", [0, 20, 0.5])
def test_a_damaged_file_of_weights_is_told_with_the_part(kept, part, language_folder, vision_folder, tmp_path):
    folders = {"language": language_folder, "vision": vision_folder}
    folders[part] = Path(shutil.copytree(folders[part], tmp_path / part))
    weights = folders[part] / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[: kept if isinstance(kept, int) else int(kept * len(content))])
    with pytest.raises(ModelError, match=rf"model\.{part}.* does not load as a"):
        load_parts(config_for(folders["language"], str(folders["vision"])))


def test_a_damaged_tower_of_timm_is_one_error(language_folder, tmp_path):
    (tmp_path / "config.json").write_text('{"architecture": "test_vit"}')
    (tmp_path / "model.safetensors").write_bytes(b"cut")
    with pytest.raises(ModelError, match=r"model\.safetensors is damaged or truncated"):
        load_parts(config_for(language_folder, str(tmp_path)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vision": "open_clip:ViT-B-33"}, "open_clip has no model 'ViT-B-33'. Did you mean"),
        ({"vision": "open_clip:laion/ViT-B-32"}, "open_clip has no model 'laion/ViT-B-32'"),
        ({"vision": "timm:resnet51"}, "timm has no model 'resnet51'"),
        ({"vision": "nowhere/at-all"}, "model.vision.name is .* config.json, or go online"),
        ({"projector": "mlp2x"}, "Did you mean 'mlp2x_gelu'"),
        ({"feature_layer": 9}, "no features at layer 9"),
        ({"language": "nowhere/at-all"}, "does not load as a causal language model"),
    ],
)
def test_an_unknown_part_is_named(options, message, language_folder, vision_folder):
    config = config_for(
        options.get("language", language_folder),
        options.get("vision", str(vision_folder)),
        options.get("projector", "mlp2x_gelu"),
        **{k: v for k, v in options.items() if k == "feature_layer"},
    )
    with pytest.raises(ModelError, match=message.replace("?", r"\?")):
        load_parts(config)


def test_a_projector_of_other_widths_is_refused(language_folder, vision_folder, tmp_path):
    from safetensors.torch import save_file

    from mm_moslora.models.projectors.projector_layers import MlpProjector

    wrong = MlpProjector(ProjectorShape(vision_width=48, language_width=64, grid=4))
    save_file(wrong.state_dict(), tmp_path / "projector.safetensors")
    config = ModelConfig(
        language=str(language_folder),
        vision=VisionConfig(name=str(vision_folder)),
        projector=ProjectorConfig(weights=str(tmp_path / "projector.safetensors")),
    )
    with pytest.raises(ModelError, match=r"linear_1.weight: file \[64, 48\], model \[64, 32\]"):
        load_parts(config)


def test_a_tower_with_batch_norm_stays_in_fp32_and_rotary_buffers_too(language_folder):
    config = config_for(language_folder, "timm:test_efficientnet", feature_layer=-1)
    assembly = load_parts(config, dtype=torch.bfloat16)
    dtypes = {p.dtype for p in assembly.model.model.vision_tower.parameters()}
    assert dtypes == {torch.float32}
    assert assembly.model.lm_head.weight.dtype == torch.bfloat16
    assert assembly.model.model.language_model.rotary_emb.inv_freq.dtype == torch.float32
    with torch.no_grad():
        logits = supervised_logits(assembly.model, Batch.from_examples([example(assembly)]))
    assert torch.isfinite(logits.float()).all()


def test_a_frozen_tower_with_batch_norm_sees_in_training_what_it_sees_in_evaluation(language_folder):
    assembly = load_parts(config_for(language_folder, "timm:test_efficientnet", feature_layer=-1))
    model, tower = assembly.model, assembly.model.model.vision_tower
    tower.requires_grad_(False)
    before = {name: value.clone() for name, value in tower.named_buffers()}
    assert before
    pixels = torch.randn(2, 3, assembly.image.size, assembly.image.size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = image_features(model.eval(), pixels)
        seen = image_features(model.train(), pixels)
    assert model.training
    torch.testing.assert_close(seen, expected, rtol=0, atol=0)
    assert all(torch.equal(value, before[name]) for name, value in tower.named_buffers())
