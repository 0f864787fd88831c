"""Turns pictures into squares of a fixed number of visual tokens, for assembled models without anyres."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from mm_moslora.batch import Example, ImageProcessing, PictureFrame, ProcessedImage
from mm_moslora.config import BoxFormName
from mm_moslora.models.vision.feature_store import tensor_hash
from mm_moslora.utils.errors import ModelError

if TYPE_CHECKING:
    from transformers.video_utils import VideoMetadata


class SquareImageProcessing:
    """One square picture, always the same number of visual tokens."""

    fixed = True
    videos = None

    def __init__(
        self, image_processor: Any, *, image_token_id: int, tokens: int, boxes: BoxFormName | None = None
    ) -> None:
        self.boxes, self._processor = boxes, image_processor
        self._transform = image_transform(image_processor)
        self._placeholders = (image_token_id,) * tokens

    def process(self, images: Sequence[Image.Image]) -> list[ProcessedImage]:
        """See `ImageProcessing.process`."""
        return [
            ProcessedImage(
                placeholders=self._placeholders, tensors={"pixel_values": pixels[None]}, key=tensor_hash(pixels)
            )
            for pixels in map(self._transform, images)
        ]

    def placeholders(self, sizes: Sequence[tuple[int, int] | VideoMetadata]) -> list[tuple[int, ...] | str]:
        """See `ImageProcessing.placeholders`."""
        return [self._placeholders] * len(sizes)

    def frame(self, size: tuple[int, int]) -> PictureFrame:
        """See `ImageProcessing.frame`."""
        if found := picture_frame(self._processor, size):
            return found
        width, height = (self._processor.size[name] for name in ("width", "height"))
        return PictureFrame(width=width, height=height, scale=(width / size[0], height / size[1]))


def picture_frame(processor: Any, size: tuple[int, int]) -> PictureFrame | None:
    """Where the pixels of a picture go that an image processor crops or pads; None: the whole picture is stretched."""
    crops, pads = (bool(getattr(processor, name, False)) for name in ("do_center_crop", "do_pad"))
    if getattr(processor, "image_grid_pinpoints", None) or not (crops or pads):  # the whole one comes beside its tiles
        return None
    edges, crop = (
        {name: value for name, value in dict(given or {}).items() if value}
        for given in (processor.size, getattr(processor, "crop_size", None))
    )
    side = edges.get("shortest_edge", 0)
    known = set(edges) == {"shortest_edge"} and processor.do_resize
    known &= not crops or crop == {"height": side, "width": side}
    if not known or (pads and not type(processor).__name__.startswith("LlavaImageProcessor")):
        raise ModelError(
            f"{type(processor).__name__} crops or pads pictures in a way that is not known, so boxes cannot be placed. "
            "Switch do_center_crop and do_pad off, or write the coordinates into the texts."
        )
    if pads:
        square, *corner = _square(size)
        left, top = (start * side / square for start in corner)
        return PictureFrame(width=side, height=side, scale=(side / square,) * 2, offset=(left, top))
    wide, high = (side * edge // min(size) for edge in size)
    offset = (-((wide - side) // 2), -((high - side) // 2))
    return PictureFrame(width=side, height=side, scale=(wide / size[0], high / size[1]), offset=offset)


def image_transform(processor: LlavaImageProcessorPil) -> Callable[[Image.Image], Tensor]:
    """A function from an RGB picture to float32 ``[3, H, W]``.

    A picture that becomes a square as a whole skips the processor's numpy: the same pixels (to 1e-6) in half the time.
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
    side, left, top = _square(image.size)
    square = Image.new("RGB", (side, side), background)
    square.paste(image, (left, top))
    return square


def _square(size: tuple[int, int]) -> tuple[int, int, int]:
    """Side of the square around a picture, and where the picture begins in it."""
    side = max(size)
    return side, (side - size[0]) // 2, (side - size[1]) // 2


def dummy_image_example(image_processing: ImageProcessing) -> Example:
    """A grey picture and its placeholders without supervision, for ranks without pictures."""
    (picture,) = image_processing.process([Image.new("RGB", (32, 32), (127, 127, 127))])
    assert not isinstance(picture.placeholders, str)
    ids = torch.tensor(picture.placeholders)
    return Example(id="", input_ids=ids, supervised=torch.zeros(len(ids), dtype=torch.bool), pictures=[picture])
