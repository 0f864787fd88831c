"""Anyres: the whole picture and tiles of it, without padding, with a newline embedding after every row of patches.

The composition is transformers' `LlavaNextForConditionalGeneration` with the recipe's parts inside, so that stock
transformers loads the trained model. As in LLaVA-NeXT the whole picture is squeezed to a square.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import (
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextProcessor,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

from mm_moslora.config import ModelConfig
from mm_moslora.models.processing.llava_processor import flattening_template
from mm_moslora.models.vision.vision_tower import ImageSpec
from mm_moslora.utils.errors import ModelError

NEWLINE = "image_newline"
"""Name of the newline embedding in the model and in `projector.safetensors`."""


def require_anyres(config: ModelConfig, spec: ImageSpec, tower: PreTrainedModel, *, standard: bool) -> None:
    """Refuse parts that LLaVA-NeXT does not support."""
    assert config.vision is not None
    if not standard:
        raise ModelError(
            "model.image_aspect is anyres, which LLaVA-NeXT supports with one CLIP, SigLIP, ViT or DINOv2 tower and "
            f"mlp2x_gelu; found {config.vision.name!r} and {config.projector.kind}. Choose these, or image_aspect pad."
        )
    if config.vision.select == "cls_patch":
        raise ModelError(
            "model.image_aspect is anyres, and its tiles have no CLS token. Use model.vision.select: patch."
        )
    native = getattr(tower.config, "image_size", spec.size)
    if native != spec.size:
        raise ModelError(
            f"model.image_aspect is anyres at {spec.size} pixels, but LLaVA-NeXT cuts tiles of the tower's native "
            f"size, {native}. Set model.vision.image_size to {native} or leave it out."
        )


def compose_anyres(
    config: ModelConfig, settings: dict[str, Any], spec: ImageSpec, *, dtype: torch.dtype, device: torch.device | None
) -> PreTrainedModel:
    """The model with weights on the meta device, except the newline embedding, which is drawn in main memory."""
    whole = LlavaNextConfig(**settings, image_grid_pinpoints=pinpoints(spec, config.anyres_tiles))
    with torch.device("meta"):
        model = LlavaNextForConditionalGeneration(whole)
    width = whole.get_text_config().hidden_size
    newline = torch.randn(width, dtype=dtype) * width**-0.5
    model.model.image_newline = nn.Parameter(newline.to(device=device))
    return model


def pinpoints(spec: ImageSpec, tiles: Sequence[tuple[int, int]]) -> list[list[int]]:
    """Heights and widths, in pixels, that pictures are fitted into."""
    return [[rows * spec.size, columns * spec.size] for rows, columns in tiles]


def newline_of(model: PreTrainedModel) -> nn.Parameter | None:
    """The newline embedding ``[D]`` of an anyres model."""
    return getattr(model.model, NEWLINE, None)


def anyres_processor(
    tokenizer: PreTrainedTokenizerBase, spec: ImageSpec, tiles: Sequence[tuple[int, int]]
) -> LlavaNextProcessor:
    """The processor of the model, PIL backend."""
    images = LlavaNextImageProcessorPil(
        size={"shortest_edge": spec.size},
        crop_size={"height": spec.size, "width": spec.size},
        image_grid_pinpoints=pinpoints(spec, tiles),
        image_mean=list(spec.mean),
        image_std=list(spec.std),
        resample=spec.resample,
    )
    return LlavaNextProcessor(
        images,
        tokenizer,
        patch_size=spec.patch,
        vision_feature_select_strategy="default" if spec.prefix else "full",
        num_additional_image_tokens=spec.prefix,
        chat_template=flattening_template(tokenizer),
    )


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
