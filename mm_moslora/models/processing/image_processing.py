"""Turns pictures into tensors and placeholder ids.

An assembled model without anyres takes one square per picture and a fixed number of visual tokens. For any other model
its processor decides how many tokens a picture takes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from mm_moslora.batch import Example, ImageProcessing, ProcessedImage
from mm_moslora.models.families import processor_family
from mm_moslora.models.vision.feature_cache import pixel_hash

_OF_TEXT = {"input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids", "labels"}


class SquareImageProcessing:
    """One square picture, always the same number of visual tokens.

    Args:
        image_processor: of the tower.
        image_token_id: the placeholder.
        tokens: visual tokens per picture.
    """

    fixed = True

    def __init__(self, image_processor: Any, *, image_token_id: int, tokens: int) -> None:
        self._transform = image_transform(image_processor)
        self._placeholders = (image_token_id,) * tokens

    def process(self, images: Sequence[Image.Image]) -> list[ProcessedImage]:
        """See `ImageProcessing.process`."""
        return [
            ProcessedImage(
                placeholders=self._placeholders, tensors={"pixel_values": pixels[None]}, key=pixel_hash(pixels)
            )
            for pixels in map(self._transform, images)
        ]

    def placeholders(self, sizes: Sequence[tuple[int, int]]) -> list[tuple[int, ...]]:
        """See `ImageProcessing.placeholders`."""
        return [self._placeholders] * len(sizes)


def image_transform(processor: LlavaImageProcessorPil) -> Callable[[Image.Image], Tensor]:
    """A function from an RGB picture to float32 ``[3, H, W]``.

    A picture that becomes a square as a whole, padded or not, skips the processor's steps in numpy: the same pixels (to
    1e-6) in half the time.
    """
    side = _whole_square(processor)

    def transform(image: Image.Image) -> Tensor:
        pixels = processor(image, return_tensors="pt")["pixel_values"][0]
        return torch.as_tensor(pixels, dtype=torch.float32)

    if side is None:
        return transform
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (processor.image_mean, processor.image_std))
    background = tuple(int(value * 255) for value in processor.image_mean)

    def transform_square(image: Image.Image) -> Tensor:
        square = _on_square(image, background) if processor.do_pad else image
        resized = square.resize((side, side), processor.resample)
        pixels = torch.from_numpy(np.array(resized)).permute(2, 0, 1).float()
        return pixels.div_(255).sub_(mean).div_(std).contiguous()

    return transform_square


def _whole_square(processor: LlavaImageProcessorPil) -> int | None:
    """Side of the square to which every picture is resized as a whole; None for any other processing."""
    size = {name: value for name, value in dict(processor.size).items() if value}
    steps = processor.do_resize and processor.do_rescale and processor.do_normalize
    if not steps or abs(processor.rescale_factor * 255 - 1) > 1e-9:
        return None
    if set(size) == {"height", "width"} and size["height"] == size["width"] and not processor.do_center_crop:
        return int(size["height"])
    crop = {name: value for name, value in dict(processor.crop_size or {}).items() if value}
    if set(size) == {"shortest_edge"} and processor.do_pad:
        side = int(size["shortest_edge"])
        return side if not processor.do_center_crop or crop == {"height": side, "width": side} else None
    return None


def _on_square(image: Image.Image, background: tuple[int, ...]) -> Image.Image:
    if image.width == image.height:
        return image
    side = max(image.size)
    square = Image.new("RGB", (side, side), background)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


class ProcessorImageProcessing:
    """Pictures as a processor of transformers prepares them, with its tiles, patches and wrapper tokens.

    Args:
        processor: with `image_token`.
        image_token_id: the token that visual features replace.
    """

    fixed = False

    def __init__(self, processor: Any, *, image_token_id: int) -> None:
        self.processor, self.image_token_id = processor, image_token_id
        self._family = processor_family(processor)
        self._count = functools.lru_cache(maxsize=65_536)(self._count_tokens)

    def process(self, images: Sequence[Image.Image]) -> list[ProcessedImage]:
        """See `ImageProcessing.process`."""
        if len(images) > 1 and self._family.untiled_when_several:
            return self._several(images)
        return [self._one(image) for image in images]

    def placeholders(self, sizes: Sequence[tuple[int, int]]) -> list[tuple[int, ...]]:
        """See `ImageProcessing.placeholders`."""
        if len(sizes) > 1 and self._family.untiled_when_several:
            return [seen.placeholders for seen in self._several([Image.new("RGB", (8, 8)) for _ in sizes])]
        return [self._count(*size) for size in sizes]

    def _one(self, image: Image.Image) -> ProcessedImage:
        ids, tensors = self._call([image])
        if self._family.one_image_list:
            tensors = {name: value[0] for name, value in tensors.items()}
        if self._family.adds_text:
            ids = [number for number in ids if number == self.image_token_id]
        return ProcessedImage(placeholders=tuple(ids), tensors=tensors)

    def _several(self, images: Sequence[Image.Image]) -> list[ProcessedImage]:
        """Several pictures of one sample, for a processor that does not tile them then (LLaVA-OneVision)."""
        ids, tensors = self._call(images)
        count = len(images)
        tensors["batch_num_images"] = torch.full((count,), count)
        share = len(ids) // count
        return [
            ProcessedImage(
                placeholders=tuple(ids[index * share : (index + 1) * share]),
                tensors={name: value[index : index + 1] for name, value in tensors.items()},
            )
            for index in range(count)
        ]

    def _call(self, images: Sequence[Image.Image]) -> tuple[list[int], dict[str, Tensor]]:
        output = self.processor(
            text=[self.processor.image_token * len(images)], images=[list(images)], return_tensors="pt",
            add_special_tokens=False,
        )  # fmt: skip
        tensors = {name: torch.as_tensor(value) for name, value in output.items() if name not in _OF_TEXT}
        return output["input_ids"][0].tolist(), tensors

    def _count_tokens(self, width: int, height: int) -> tuple[int, ...]:
        count = getattr(self.processor, "_get_num_multimodal_tokens", None)
        if count is None:
            return self._one(Image.new("RGB", (width, height))).placeholders
        visual = int(count(image_sizes=[(height, width)])["num_image_tokens"][0])
        return (self.image_token_id,) * (visual + self._uncounted)

    @functools.cached_property
    def _uncounted(self) -> int:
        """Tokens around the visual ones, which some processors count and others do not."""
        counted = self.processor._get_num_multimodal_tokens(image_sizes=[(32, 32)])["num_image_tokens"][0]
        return len(self._one(Image.new("RGB", (32, 32))).placeholders) - int(counted)


def dummy_image_example(image_processing: ImageProcessing) -> Example:
    """A grey picture and its placeholders without supervision, for ranks without pictures."""
    (seen,) = image_processing.process([Image.new("RGB", (32, 32), (127, 127, 127))])
    ids = torch.tensor(seen.placeholders)
    return Example(id="", input_ids=ids, supervised=torch.zeros(len(ids), dtype=torch.bool), pictures=[seen])
