"""Work of a vision tower: patches, pairs of patches with attention between them, and rows of the projector.

It is read from a step's batch: tiles for models that split pictures, patch grids for models of any resolution.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from mm_moslora.batch import Batch
from mm_moslora.models.pretrained_vlm import PICTURE, side_of, tower_path

_BEFORE_PATCHES = frozenset({"class_embedding", "cls_token", "register_tokens"})
"""Parameters of tokens that towers put before the first patch."""


@dataclass(frozen=True, kw_only=True)
class VisionWork:
    """Work for one picture or several."""

    patches: float = 0.0
    """Prefixes included."""
    pairs: float = 0.0
    """Pairs of patches with attention between them, times the tower's width, summed over its layers."""
    tokens: float = 0.0
    """Rows of the projector; the decoder may get fewer of them, and newline tokens in between."""

    def __add__(self, other: VisionWork) -> VisionWork:
        return VisionWork(**{item.name: getattr(self, item.name) + getattr(other, item.name) for item in fields(self)})

    def times(self, factor: float) -> VisionWork:
        """The work of several such pictures."""
        return VisionWork(**{item.name: factor * getattr(self, item.name) for item in fields(self)})


class TowerShape:
    """The dimensions of a tower that decide the work per picture; `entry`: input width of the projector, 0 without
    one."""

    def __init__(self, model: PreTrainedModel, *, entry: int) -> None:
        tower: Any = model.get_submodule(tower_path(model))
        config: Any = tower.config
        self.model, self.config = model.config, config
        self.patch = side_of(config, "patch_size") or 16
        self.layers = int(getattr(config, "num_hidden_layers", 0) or getattr(config, "depth", 0))
        self.width = int(getattr(config, "embed_dim", 0) or config.hidden_size)
        self.prefix = _prefix(tower)
        selected = getattr(model.config, "vision_feature_layer", None)
        joined = len(selected) if isinstance(selected, list) else 1
        self.patches_per_row = max(1.0, entry / (self.width * joined))

    def of_picture(self) -> VisionWork:
        """One picture, by the configuration: one tile of the tower's size, or of `PICTURE` where it has none."""
        if getattr(self.model, "vision_grid", 0):
            return self._assembled()
        side = side_of(self.config, "image_size")
        width, height = (side, side) if side else PICTURE
        return self.of_tile(height, width)

    def of_tile(self, height: int, width: int) -> VisionWork:
        """One tile, by its size in pixels."""
        patches = (height // self.patch) * (width // self.patch)
        return self._all_pairs(patches + self.prefix, tokens=patches / self.patches_per_row)

    def of_batch(self, batch: Batch) -> VisionWork:
        """The pictures of a micro-batch, on any device."""
        host = batch.on_host
        if not host.images:
            return VisionWork()
        if getattr(self.model, "vision_grid", 0):
            return self._assembled().times(host.images)
        names = ("image_grid_thw", "video_grid_thw")
        if grids := [host.image_inputs[name] for name in names if name in host.image_inputs]:
            return self._of_grids(torch.cat(grids))
        assert host.pixel_values is not None
        pixels = host.pixel_values
        if pixels.ndim < 4:  # patches without known grid sizes
            mean = pixels.shape[:-1].numel() / max(1, host.images)
            return self._all_pairs(mean, tokens=mean / self.patches_per_row).times(host.images)
        tiles = pixels.flatten(0, -4)
        # All-zero tiles of pictures with several are padding and do not count.
        count = int(tiles[:, :, 0].flatten(1).any(dim=1).sum()) if pixels.ndim > 4 else len(tiles)
        return self.of_tile(*pixels.shape[-2:]).times(count)

    def tokens(self, patches: float, tiles: int) -> float:
        """Rows of the projector from patches, prefix tokens included, of several tiles."""
        if getattr(self.model, "vision_grid", 0):
            return tiles * self._assembled().tokens
        return (patches - tiles * self.prefix) / self.patches_per_row

    def _all_pairs(self, patches: float, *, tokens: float) -> VisionWork:
        return VisionWork(patches=patches, pairs=patches**2 * self.width * self.layers, tokens=tokens)

    def _assembled(self) -> VisionWork:
        """This project's towers report their patches, whatever their training resolution was."""
        patches = int(self.model.vision_grid) ** 2 + int(self.model.vision_prefix)
        return self._all_pairs(patches, tokens=float(self.model.image_seq_length))

    def _of_grids(self, grids: Tensor) -> VisionWork:
        """Grids ``[N, 3]`` of frames, rows and columns of patches; most layers of Qwen2.5-VL use windowed attention."""
        merged = int(getattr(self.config, "spatial_merge_size", 1))
        whole, side = self.layers, 0
        if (everywhere := getattr(self.config, "fullatt_block_indexes", None)) is not None:
            whole, side = len(everywhere), self.config.window_size // self.patch // merged
        work = VisionWork()
        for frames, rows, columns in grids.tolist():
            patches = rows * columns
            pairs = whole * patches**2
            if side:
                squares = _squares(rows // merged, side) * _squares(columns // merged, side)
                pairs += (self.layers - whole) * merged**4 * squares
            work += VisionWork(
                patches=frames * patches, pairs=frames * pairs * self.width,
                tokens=frames * patches / self.patches_per_row,
            )  # fmt: skip
        return work


def _squares(length: int, side: int) -> int:
    """The sum of squared window lengths when a length is cut into windows."""
    return length // side * side**2 + (length % side) ** 2


def _prefix(tower: Any) -> int:
    """Tokens of a tower before the first patch."""
    tokens = 0
    for name, parameter in tower.named_parameters():
        if name.rpartition(".")[2] in _BEFORE_PATCHES:
            shape = getattr(parameter, "ds_shape", parameter.shape)  # under ZeRO-3, `shape` is that of the shard
            tokens += math.prod(shape) // shape[-1]
    return tokens
