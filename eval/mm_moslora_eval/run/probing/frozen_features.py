"""Mean features of pictures by the frozen encoder of a recipe's model.

Shapes: ``V`` width of the features.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mm_moslora.utils.errors import DataError
from mm_moslora.utils.progress_bar import Progress
from mm_moslora.utils.text_format import format_seconds

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from mm_moslora.config import ModelConfig

_AT_ONCE = 16

Opened = Mapping[str, "Callable[[], Image]"]
"""Pictures by name, each opened by a call."""
Features = Mapping[str, NDArray[np.float32]]


class NoProbeError(Exception):
    """Why a probe would tell nothing."""


class FrozenEncoder:
    """Mean features of pictures by the frozen encoder of a recipe; a picture that cannot be decoded has none."""

    def __init__(self, config: ModelConfig, seconds: float) -> None:
        self._config, self._seconds = config, seconds
        self._encode: Callable[[Sequence[Image]], list[Tensor]] | None = None
        self._known: dict[str, NDArray[np.float32]] = {}

    def __call__(self, pictures: Opened) -> Features:
        """The features of these and earlier pictures."""
        import torch

        self._encode = self._encode or _encoder_of(self._config)
        missing = sorted(name for name in pictures if name not in self._known)
        bar, begun = Progress("pictures for the linear probe", len(missing), unit="picture"), time.monotonic()
        for start in range(0, len(missing), _AT_ONCE):
            opened = dict(_decoded(pictures, missing[start : start + _AT_ONCE]))
            with torch.inference_mode():
                features = self._encode([*opened.values()]) if opened else []
            self._known |= {name: row.float().cpu().numpy() for name, row in zip(opened, features, strict=True)}
            done = min(start + _AT_ONCE, len(missing))
            bar.update(done)
            if (expected := (time.monotonic() - begun) / done * len(missing)) > self._seconds:
                raise NoProbeError(f"its pictures would take {format_seconds(expected)} to encode")
        return self._known


def _decoded(pictures: Opened, names: Sequence[str]) -> Iterator[tuple[str, Image]]:
    for name in names:
        with suppress(DataError):
            yield name, pictures[name]()


def _encoder_of(config: ModelConfig) -> Callable[[Sequence[Image]], list[Tensor]]:
    """A function from pictures to the mean ``[V]`` of each one's features, or of a ready-made model's visual tokens."""
    import torch

    from mm_moslora.models.assembly import load_parts
    from mm_moslora.models.batching.padded_batch import picture_inputs
    from mm_moslora.models.precision import dtype_of, resolve_precision
    from mm_moslora.models.vision.vision_tower import load_vision
    from mm_moslora.models.vlm import tower_states
    from mm_moslora.utils import distributed

    if config.vlm is None and config.vision is None:
        raise NoProbeError("the recipe's model has no vision encoder")
    device = distributed.device()
    dtype = dtype_of(resolve_precision("auto"))
    parts = load_parts(config, weights="none" if config.vlm is None else "all", dtype=dtype, device=device)
    processing = parts.image_processing
    assert processing is not None
    if (vision := config.vision) is not None:
        tower, spec = load_vision(vision, device=device)
        tower.eval()  # batch normalisation would mix the pictures of a batch

        def encode(images: Sequence[Image]) -> list[Tensor]:
            tiles = [seen.tensors["pixel_values"].flatten(0, -4) for seen in processing.process(images)]
            states = tower_states(tower, vision.feature_layer, torch.cat(tiles).to(device))[:, spec.prefix :]
            return [part.flatten(0, 1).mean(0) for part in states.split([len(part) for part in tiles])]

        return encode

    model: Any = parts.model.eval()

    def encode_ready_made(images: Sequence[Image]) -> list[Tensor]:
        rows = []
        for image in images:
            (seen,) = processing.process([image])
            tensors = dict(seen.tensors)
            inputs = picture_inputs(model, tensors.pop("pixel_values"), tensors)
            tokens = model.base_model.get_image_features(**inputs, return_dict=True).pooler_output
            rows.append(torch.cat([part.flatten(0, -2) for part in tokens]).mean(0))
        return rows

    return encode_ready_made
