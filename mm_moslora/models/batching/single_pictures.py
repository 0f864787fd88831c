"""Pictures that a model must encode one by one, because its forward pass takes several of them for another.

Some processors write places within all pictures of a call, or join pictures along another dimension than the first;
some towers give every picture the shape of the first. A batch holds such tensors flat, with their shapes.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from mm_moslora.models.families import PICTURE_SHAPES, PICTURE_TOKENS
from mm_moslora.utils.errors import ModelError

ENCODED = "mm_encoder_outputs"
"""Keyword argument of forward passes: pictures that are already encoded."""
_DIMENSIONS = 6
"""Most that a tensor of a picture has."""


def flat(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of one picture in one dimension each, and `PICTURE_SHAPES`.

    Args:
        tensors: as the processor made them for this picture alone.
    """
    names = _names(tensors)
    shapes = [[*tensors[name].shape] + [0] * (_DIMENSIONS - tensors[name].ndim) for name in names]
    return tensors | {name: tensors[name].reshape(-1) for name in names} | {PICTURE_SHAPES: torch.tensor([shapes])}


def _names(tensors: dict[str, Tensor]) -> list[str]:
    return sorted(tensors.keys() - {PICTURE_TOKENS, PICTURE_SHAPES})


def encoded_one_by_one(model: PreTrainedModel, tensors: dict[str, Tensor], shapes: Tensor) -> dict[str, Any]:
    """The keyword arguments of a model for pictures, each encoded by itself; others than pixels give positions.

    Args:
        model: an image-text-to-text model of transformers.
        tensors: of all pictures in order, from `flat`.
        shapes: their `PICTURE_SHAPES`, in main memory.

    Raises:
        ModelError: ranks would encode other numbers of pictures, which ZeRO-3 does not take.
    """
    inner: Any = model.base_model
    if any(hasattr(weight, "ds_id") for weight in inner.parameters()):
        raise ModelError(
            f"{type(inner).__name__} of transformers {transformers.__version__} must encode pictures one by one, whose "
            "number differs between ranks, and under ZeRO-3 all ranks must run alike. Set train.zero to zero2 or less."
        )
    taken = inspect.signature(type(inner).get_image_features).parameters
    names = _names(tensors)
    parts = [tensors[name].split([_size(shape[at]) for shape in shapes.tolist()]) for at, name in enumerate(names)]
    pictures = [
        {name: parts[at][number].view([side for side in shape[at] if side]) for at, name in enumerate(names)}
        for number, shape in enumerate(shapes.tolist())
    ]
    outputs: list[Any] = [
        inner.get_image_features(**{name: picture[name] for name in names if name in taken}, return_dict=True)
        for picture in pictures
    ]
    features = [output.pooler_output for output in outputs]
    joined = outputs[0]
    joined.pooler_output = (
        torch.cat(features) if isinstance(features[0], Tensor) else [part for group in features for part in group]
    )
    others = {name: torch.cat([picture[name] for picture in pictures]) for name in names if name != "pixel_values"}
    return others | {ENCODED: {"image": joined}}


def _size(shape: list[int]) -> int:
    size = 1
    for side in shape:
        size *= side or 1
    return size
