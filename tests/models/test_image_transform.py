"""Pictures become the pixels of the stock image processor, by whichever way."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from mm_moslora.models.processor import image_processor, image_transform
from mm_moslora.models.vision import ImageSpec


def spec(resample: int) -> ImageSpec:
    import dataclasses

    values = {"size": 32, "mean": (0.48, 0.46, 0.41), "std": (0.27, 0.26, 0.28), "resample": resample}
    fields = {item.name: values.get(item.name, 1) for item in dataclasses.fields(ImageSpec)}
    return ImageSpec(**fields)


@pytest.mark.parametrize("aspect", ["pad", "resize", "crop"])
@pytest.mark.parametrize("size", [(32, 32), (50, 20), (20, 50), (1, 3), (333, 201)])
@pytest.mark.parametrize("resample", [2, 3])
def test_pixels_are_those_of_the_stock_processor(aspect: str, size: tuple[int, int], resample: int) -> None:
    if aspect == "crop" and min(size) == 1:
        pytest.skip("a crop of a line of pixels is not the question here")
    processor = image_processor(spec(resample), aspect)
    image = Image.effect_noise(size, 120).convert("RGB")
    image.paste((250, 10, 30), (0, 0, max(1, size[0] // 3), size[1]))
    stock = torch.as_tensor(processor(image, return_tensors="pt")["pixel_values"][0])
    own = image_transform(processor)(image)
    assert own.dtype == torch.float32
    torch.testing.assert_close(own, stock.float(), rtol=0, atol=1e-6)
