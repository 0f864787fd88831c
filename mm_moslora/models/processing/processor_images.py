"""Turns pictures into tensors and placeholder ids where a processor decides how many tokens a picture takes.

These are ready-made models, and assembled ones with anyres.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from mm_moslora.batch import PictureFrame, ProcessedImage
from mm_moslora.config import BoxFormName
from mm_moslora.models.families import processor_family
from mm_moslora.models.processing.probed_frame import probed_frame
from mm_moslora.utils.errors import ModelError

_PROBED = ((320, 240), (96, 288))
"""Pictures that show whether any picture is cropped or padded."""
_OF_TEXT = {"input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids", "labels"}


class ProcessorImageProcessing:
    """Pictures as a processor of transformers prepares them, with its tiles, patches and wrapper tokens.

    Args:
        processor: with `image_token`.
        image_token_id: the token that visual features replace.
        boxes: see `ImageProcessing.boxes`.
    """

    fixed = False

    def __init__(self, processor: Any, *, image_token_id: int, boxes: BoxFormName | None = None) -> None:
        self.processor, self.image_token_id, self.boxes = processor, image_token_id, boxes
        self._family = processor_family(processor)
        self._count = functools.lru_cache(maxsize=65_536)(self._count_tokens)
        self.frame = functools.lru_cache(maxsize=65_536)(self._frame)

    def process(self, images: Sequence[Image.Image]) -> list[ProcessedImage]:
        """See `ImageProcessing.process`."""
        if len(images) > 1 and self._family.untiled_when_several:
            return self._several(images)
        return [self._one(image) for image in images]

    def placeholders(self, sizes: Sequence[tuple[int, int]]) -> list[tuple[int, ...]]:
        """See `ImageProcessing.placeholders`."""
        if len(sizes) > 1 and self._family.untiled_when_several:
            return [image.placeholders for image in self._several([Image.new("RGB", (8, 8)) for _ in sizes])]
        return [self._count(*size) for size in sizes]

    def _frame(self, size: tuple[int, int]) -> PictureFrame:
        """See `ImageProcessing.frame`."""
        if not self._shows_all:
            found = probed_frame(size, self._pixels)
            if found is not None:
                return found
        if self.boxes != "qwen2_5_vl":  # the others count shares of the picture
            return PictureFrame(width=size[0], height=size[1])
        grid = self._call([Image.new("RGB", size)])[1].get("image_grid_thw")
        if grid is None:
            raise ModelError(
                "model.boxes is qwen2_5_vl, whose boxes count pixels of the resized picture, and "
                f"{type(self.processor).__name__} does not show that size. Choose another form."
            )
        height, width = (int(count) * int(self.processor.image_processor.patch_size) for count in grid[0, 1:])
        return PictureFrame(width=width, height=height, scale=(width / size[0], height / size[1]))

    @functools.cached_property
    def _shows_all(self) -> bool:
        """Whether pictures of two shapes are seen as a whole and fill what the model sees; then others are, too."""
        frames = [(size, probed_frame(size, self._pixels)) for size in _PROBED]
        return all(
            frame is None or (*frame.offset, *frame.seen(*size)) == (0, 0, frame.width, frame.height)
            for size, frame in frames
        )

    def _pixels(self, image: Image.Image) -> NDArray[np.float64]:
        tensors = self._call([image])[1]
        return np.asarray(tensors["pixel_values"].double())

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
