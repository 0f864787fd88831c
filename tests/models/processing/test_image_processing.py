"""Pictures become the pixels of the stock image processor, by whichever way."""

from __future__ import annotations

import itertools

import pytest
import torch
from PIL import Image

from mm_moslora.models.processing.image_processing import image_transform
from mm_moslora.models.processing.llava_processor import image_processor
from mm_moslora.models.vision.vision_tower import ImageSpec


def spec(resample: int) -> ImageSpec:
    import dataclasses

    values = {"size": 32, "mean": (0.48, 0.46, 0.41), "std": (0.27, 0.26, 0.28), "resample": resample}
    fields = {item.name: values.get(item.name, 1) for item in dataclasses.fields(ImageSpec)}
    return ImageSpec(**fields)


SIZES = [(32, 32), (50, 20), (20, 50), (333, 201)]
# A line of pixels has nothing to crop.
CASES = [*itertools.product(["pad", "resize", "crop"], SIZES), ("pad", (1, 3)), ("resize", (1, 3))]


@pytest.mark.parametrize(("aspect", "size"), CASES)
@pytest.mark.parametrize("resample", [2, 3])
def test_pixels_are_those_of_the_stock_processor(aspect: str, size: tuple[int, int], resample: int) -> None:
    processor = image_processor(spec(resample), aspect)
    image = Image.effect_noise(size, 120).convert("RGB")
    image.paste((250, 10, 30), (0, 0, max(1, size[0] // 3), size[1]))
    stock = torch.as_tensor(processor(image, return_tensors="pt")["pixel_values"][0])
    own = image_transform(processor)(image)
    assert own.dtype == torch.float32
    torch.testing.assert_close(own, stock.float(), rtol=0, atol=1e-6)
