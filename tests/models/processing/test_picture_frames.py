"""Pictures: the pixels of the stock processor, where each goes, and a box drawn in it, the budget, tokens around it."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as t
from PIL import Image, ImageDraw
from small_families import default_config, stand_in_processor
from tiny import make_vision
from transformers import AutoModelForImageTextToText
from vlms import FAMILIES, make_vlm

from mm_moslora.config import ModelConfig, VisionConfig
from mm_moslora.models.assembly import load_parts, pretrained_parts
from mm_moslora.models.batching.padded_batch import text_inputs
from mm_moslora.models.families import box_form_of
from mm_moslora.models.processing.image_processing import SquareImageProcessing, image_transform, picture_frame
from mm_moslora.models.processing.llava_processor import image_processor
from mm_moslora.models.processing.processor_images import ProcessorImageProcessing
from mm_moslora.models.vision.vision_tower import ImageSpec
from mm_moslora.planning.model_probes import SIGHTED, example_of, stock_inputs
from mm_moslora.utils.errors import ConfigError, ModelError

SIZES = [(640, 480), (150, 450), (51, 37)]
SPEC = ImageSpec(size=224, tokens=1, width=1, prefix=0, patch=14, mean=(0.5,) * 3, std=(0.5,) * 3)


def drawn(size: tuple[int, int]) -> tuple[Image.Image, tuple[float, ...]]:
    """A black picture with a white box off its centre, and the box's corners."""
    width, height = size
    box = (width * 2 // 5, height * 3 // 8, width * 3 // 5, height * 5 // 6)
    image = Image.new("RGB", size)
    ImageDraw.Draw(image).rectangle((*box[:2], box[2] - 1, box[3] - 1), fill="white")
    return image, box


def found(light: np.ndarray) -> np.ndarray:
    """Corners of what is light in ``[h, w]``, in its pixels."""
    rows, columns = np.nonzero(light > 0.3)
    return np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])


def expected(frame, box: tuple[float, ...]) -> np.ndarray:
    return np.array([*frame.seen(*box[:2]), *frame.seen(*box[2:])])


@pytest.mark.parametrize("aspect", ["pad", "resize", "crop"])
@pytest.mark.parametrize("size", SIZES)
def test_a_box_is_where_the_frame_of_an_assembled_model_says(aspect: str, size: tuple[int, int]) -> None:
    processing = SquareImageProcessing(image_processor(SPEC, aspect), image_token_id=0, tokens=1)
    image, box = drawn(size)
    frame = processing.frame(size)
    pixels = processing.process([image])[0].tensors["pixel_values"][0, 0].numpy()
    assert (frame.width, frame.height) == (224, 224)
    seen = np.clip(expected(frame, box), 0, 224)
    np.testing.assert_allclose(found(pixels), seen, atol=1.5)
    assert frame.in_file(*frame.seen(*box[:2])) == pytest.approx(box[:2])


def test_a_ready_made_processor_that_crops_is_followed() -> None:
    _, processor = FAMILIES["llava"]()
    processor.image_processor = t.CLIPImageProcessor(
        size={"shortest_edge": 224}, crop_size={"height": 224, "width": 224}
    )
    processing = ProcessorImageProcessing(processor, image_token_id=0)
    image, box = drawn((640, 480))
    frame = processing.frame((640, 480))
    pixels = processing.process([image])[0].tensors["pixel_values"][0, 0].numpy()
    assert frame.seen(0, 0) == pytest.approx((-37, 0), abs=1)
    np.testing.assert_allclose(found(pixels), expected(frame, box), atol=1.5)


@pytest.mark.parametrize("family", ["llava_next", "llava_onevision", "internvl", "smolvlm", "qwen2_vl", "paligemma"])
def test_tiles_and_patches_show_the_whole_picture(family: str) -> None:
    model, processor = FAMILIES[family]()
    processing = ProcessorImageProcessing(processor, image_token_id=model.config.image_token_id)
    for size in SIZES:
        frame = processing.frame(size)
        assert (*frame.offset, *frame.seen(*size)) == (0, 0, frame.width, frame.height)


def test_pixels_of_the_resized_picture_are_those_of_the_patches() -> None:
    model, processor = FAMILIES["qwen2_5_vl"]()
    processor.image_processor.size = {"shortest_edge": 28**2, "longest_edge": 420**2}
    assert box_form_of(processor) == "qwen2_5_vl"
    processing = ProcessorImageProcessing(processor, image_token_id=model.config.image_token_id, boxes="qwen2_5_vl")
    image, box = drawn((640, 480))
    tensors = processing.process([image])[0].tensors
    _, high, wide = tensors["image_grid_thw"][0].tolist()
    patches = tensors["pixel_values"].reshape(high // 2, wide // 2, 2, 2, 3, 2, 14, 14)[..., 0, 0, :, :]
    pixels = patches.permute(0, 2, 4, 1, 3, 5).reshape(high * 14, wide * 14).numpy()
    frame = processing.frame((640, 480))
    assert (frame.width, frame.height) == (wide * 14, high * 14)
    assert frame.width * frame.height <= 420**2
    np.testing.assert_allclose(found(pixels), expected(frame, box), atol=1.5)


@pytest.mark.parametrize("processor", [
    t.CLIPImageProcessor(size={"shortest_edge": 224}, crop_size={"height": 200, "width": 200}),
    t.CLIPImageProcessor(size={"height": 256, "width": 256}, crop_size={"height": 224, "width": 224}),
    t.PixtralImageProcessor(),
])  # fmt: skip
def test_other_ways_to_crop_and_pad_are_refused(processor: object) -> None:
    with pytest.raises(ModelError, match=r"ImageProcessor.* crops or pads pictures in a way that is not known"):
        picture_frame(processor, (64, 32))


@pytest.mark.parametrize(
    ("family", "token", "form"),
    [
        ("qwen2_vl", None, "qwen2_vl"), ("qwen3_vl", None, "qwen3_vl"), ("llava", None, None),
        ("llava", "<loc0000>", "paligemma"), ("llava", "<box>", "internvl"),
    ],
)  # fmt: skip
def test_the_form_comes_from_the_family_or_the_vocabulary(family: str, token: str | None, form: str | None) -> None:
    _, processor = FAMILIES[family]()
    processor.tokenizer.add_tokens([token] if token else [])
    assert box_form_of(processor) == form


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_a_budget_of_pixels_holds_and_is_exported(family: str, tmp_path: Path) -> None:
    folder = make_vlm(tmp_path / "vlm", family)
    parts = load_parts(ModelConfig(vlm=str(folder), max_pixels=64**2), weights="none")
    free = load_parts(ModelConfig(vlm=str(folder), min_pixels=256**2, max_pixels=512**2), weights="none")
    (few,), (many,) = (item.image_processing.placeholders([(900, 700)]) for item in (parts, free))
    assert len(few) < 8 < len(many)
    assert len(free.image_processing.placeholders([(20, 20)])[0]) > 8
    parts.processor.save_pretrained(tmp_path / "out")
    again = t.AutoProcessor.from_pretrained(tmp_path / "out")
    assert dict(again.image_processor.size)["longest_edge"] == 64**2


def test_a_processor_without_a_budget_and_an_assembled_square_refuse_it(
    language_folder: Path, vision_folder: Path, tmp_path: Path
) -> None:
    folder = make_vlm(tmp_path / "vlm", "internvl")
    with pytest.raises(ModelError, match="GotOcr2ImageProcessor has no budget of pixels"):
        load_parts(ModelConfig(vlm=str(folder), max_pixels=64**2), weights="none")
    made = {"language": str(language_folder), "vision": VisionConfig(name=str(vision_folder))}
    with pytest.raises(ModelError, match=r"Set model\.vision\.image_size to at most 10"):
        load_parts(ModelConfig(**made, max_pixels=100), weights="none")
    with pytest.raises(ModelError, match="Leave it out"):
        load_parts(ModelConfig(**made, min_pixels=100), weights="none")
    with pytest.raises(ConfigError, match=r"model\.min_pixels is 9, more than model\.max_pixels, 4"):
        ModelConfig(**made, min_pixels=9, max_pixels=4)


def test_a_cap_leaves_out_large_grids_of_an_assembled_model(language_folder: Path, tmp_path: Path) -> None:
    tower = VisionConfig(name=str(make_vision(tmp_path / "clip", "clip")))
    made = {"language": str(language_folder), "vision": tower, "image_aspect": "anyres"}
    side = load_parts(ModelConfig(**made), weights="none").image.size
    capped = load_parts(ModelConfig(**made, max_pixels=2 * side**2), weights="none")
    assert capped.processor.image_processor.image_grid_pinpoints == [[side, 2 * side], [2 * side, side]]
    with pytest.raises(ModelError, match="every grid of squares"):
        load_parts(ModelConfig(**made, max_pixels=side**2), weights="none")


CASES = [
    *itertools.product(["pad", "resize", "crop"], [(32, 32), (50, 20), (333, 201)]),
    ("pad", (1, 3)),
    ("resize", (1, 3)),
]
"""A line of pixels has nothing to crop."""


@pytest.mark.parametrize(("aspect", "size"), CASES)
@pytest.mark.parametrize("resample", [2, 3])
def test_pixels_are_those_of_the_stock_processor(aspect: str, size: tuple[int, int], resample: int) -> None:
    spec = replace(SPEC, size=32, mean=(0.48, 0.46, 0.41), std=(0.27, 0.26, 0.28), resample=resample)
    processor = image_processor(spec, aspect)
    image = Image.effect_noise(size, 120).convert("RGB")
    image.paste((250, 10, 30), (0, 0, max(1, size[0] // 3), size[1]))
    stock = torch.as_tensor(processor(image, return_tensors="pt")["pixel_values"][0])
    own = image_transform(processor)(image)
    assert own.dtype == torch.float32
    torch.testing.assert_close(own, stock.float(), rtol=0, atol=1e-6)


def test_ids_and_types_of_tokens_are_those_of_the_processor() -> None:
    """Gemma 3's joins its line breaks to the text's."""
    config = default_config("gemma3")
    processor = stand_in_processor(config)
    parts = pretrained_parts(processor, model=None, image_token_id=config.image_token_id, base={})
    example = example_of(parts, SIGHTED)
    expected = stock_inputs(processor, SIGHTED)
    assert example.input_ids.tolist() == expected["input_ids"][0, : example.length].tolist()
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    given = text_inputs(model, [example.input_ids])
    assert given["token_type_ids"].tolist() == expected["token_type_ids"][:, : example.length].tolist()


def test_a_processor_that_joins_pictures_is_refused() -> None:
    """MiniCPM-V's pictures become one tensor."""
    config = default_config("minicpmv4_6")
    with pytest.raises(ModelError, match=r"joins the pictures of a call.*Choose another model"):
        pretrained_parts(stand_in_processor(config), model=None, image_token_id=config.image_token_id, base={})
