"""The budget of pixels of a picture: `model.min_pixels` and `model.max_pixels`, for any processor that has one."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from mm_moslora.config import ModelConfig
from mm_moslora.models.vision.vision_tower import ImageSpec
from mm_moslora.utils.errors import ModelError


def limit_pixels(processor: Any, config: ModelConfig) -> None:
    """Set the budget of a ready-made model's processor, which exports then have, too."""
    if config.min_pixels is None and config.max_pixels is None:
        return
    images = processor.image_processor
    own: Mapping[str, int] = dict(getattr(images, "size", None) or {})
    least, most = (own.get(name) for name in ("shortest_edge", "longest_edge"))
    if not least or not most or "image_grid_thw" not in images.model_input_names:
        raise ModelError(
            f"model.min_pixels or model.max_pixels is set, and {type(images).__name__} has no budget of pixels: its "
            f"size is {own}. Leave them out, or change the size in the model's preprocessor file."
        )
    least, most = config.min_pixels or min(least, config.max_pixels or least), config.max_pixels or most
    if least > most:
        raise ModelError(f"model.min_pixels is {least}, more than the {most} pixels that the model's processor allows.")
    images.size = {**own, "shortest_edge": least, "longest_edge": most}


def fitting_tiles(config: ModelConfig, spec: ImageSpec) -> Sequence[tuple[int, int]]:
    """The tile grids of an assembled model within `model.max_pixels`."""
    most = config.max_pixels
    if config.min_pixels is not None:
        raise ModelError(
            "model.min_pixels is set, and an assembled model sees every picture in squares of model.vision.image_size. "
            "Leave it out."
        )
    if most is None:
        return config.anyres_tiles
    anyres = config.image_aspect == "anyres"
    tiles = [(rows, columns) for rows, columns in config.anyres_tiles if rows * columns * spec.size**2 <= most]
    if (anyres and not tiles) or (not anyres and spec.size**2 > most):
        raise ModelError(
            f"model.max_pixels is {most}, and {'every grid of squares' if anyres else 'the one square'} of "
            f"{spec.size} x {spec.size} pixels has more. Set model.vision.image_size to at most {math.isqrt(most)}."
        )
    return tiles or config.anyres_tiles
