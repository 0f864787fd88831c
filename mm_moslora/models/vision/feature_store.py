"""Features of a frozen vision tower on disk, one file per picture, for all runs and ranks that use the tower.

A hash of the prepared pixels names the entry; a hash of the tower (weights, configuration, layers, dtype) names its
folder. An entry is written aside and renamed, so any number of processes may share a folder. A damaged one is logged,
and the picture is encoded again.
"""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from mm_moslora.utils.files import replacing
from mm_moslora.utils.identity import quick_hash_of

logger = logging.getLogger(__name__)

FORMAT = 1
"""Part of a tower's hash: another format gets other folders."""
_FEATURES, _CHECKSUM = "features", "xxh3_128"
SHARED_GIB = 10.0
"""Largest size of a tower's folder that no recipe asks for."""
_KEPT_FREE = 2**30
"""Bytes that stay free on the disk, for checkpoints."""


@dataclass(kw_only=True)
class StoreCounts:
    """Counts of the pictures requested from a store in this process."""

    read: int = 0
    """Found on disk."""
    encoded: int = 0
    """Not found; the tower ran."""
    written: int = 0
    """Encoded and stored."""

    @property
    def hit_share(self) -> float:
        """Share of the requested pictures that were found on disk."""
        return self.read / max(1, self.read + self.encoded)


def tower_hash(tower: PreTrainedModel, layers: int | list[int]) -> str:
    """A hash of what a tower's features depend on: weights, whole on this process, configuration and layers."""
    config = {k: v for k, v in tower.config.to_dict().items() if k not in ("_name_or_path", "transformers_version")}
    about = json.dumps([FORMAT, type(tower).__name__, config, layers], sort_keys=True, default=str)
    weights = sorted(tower.state_dict().items())
    named = ((f"{name} {value.dtype} {tuple(value.shape)}".encode(), bytes_of(value)) for name, value in weights)
    return quick_hash_of(chain([about.encode()], chain.from_iterable(named)))


def bytes_of(tensor: Tensor) -> memoryview:
    """A tensor's bytes, in the order of its elements."""
    # A tensor without dimensions cannot be viewed as bytes.
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def tensor_hash(tensor: Tensor) -> str:
    """A hash of a tensor's bytes, such as of a prepared picture ``[3, H, W]``."""
    return quick_hash_of([bytes_of(tensor)])


def _size_of(file: Path) -> int:
    """Bytes of a file, 0 where another process has just deleted it."""
    try:
        return file.stat().st_size
    except FileNotFoundError:
        return 0


class FeatureStore:
    """The features of one tower on disk, of at most `limit_gib` (0: no limit) among so many `writers`.

    Of runs at one time each may exceed the limit by what it writes between two looks: 64 pictures, or a sixteenth.
    """

    def __init__(self, folder: Path, tower: str, *, limit_gib: float = 0.0, writers: int = 1) -> None:
        self.folder = folder / tower
        self.folder.mkdir(parents=True, exist_ok=True)
        self.counts = StoreCounts()
        self._writers = writers
        self._limit = limit_gib * 2**30
        self._size = self._next_look = 0
        self._full = False

    @classmethod
    def of(cls, model: PreTrainedModel, folder: Path) -> FeatureStore:
        """The store of a model's vision tower, whole on this process, of at most `SHARED_GIB`."""
        return cls(
            folder, tower_hash(model.model.vision_tower, model.config.vision_feature_layer), limit_gib=SHARED_GIB
        )

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.safetensors"

    def read(self, key: str) -> Tensor | None:
        """The features of a picture, on the CPU; None where they are missing or damaged."""
        path = self._path(key)
        if not path.exists():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                value: Tensor = file.get_tensor(_FEATURES)
                checksum = (file.metadata() or {}).get(_CHECKSUM)
        except (OSError, RuntimeError, SafetensorError, KeyError, ValueError) as error:
            # Another process may have deleted it; torch, which maps the file, raises a RuntimeError then.
            if not isinstance(error, FileNotFoundError) and "No such file" not in str(error):
                self._damaged(path, str(error))
            return None
        if tensor_hash(value) != checksum:
            self._damaged(path, "its checksum differs")
            return None
        self.counts.read += 1
        return value

    def _damaged(self, path: Path, why: str) -> None:
        logger.warning("The cached features in %s are damaged (%s); the picture is encoded again.", path, why)

    def write(self, key: str, value: Tensor) -> None:
        """Store the features of a picture, if there is room."""
        self.counts.encoded += 1
        path = self._path(key)
        features = value.detach().cpu().contiguous()
        size = features.numel() * features.element_size()
        if self._full or not self._has_room(size):
            return
        try:
            path.parent.mkdir(exist_ok=True)
            with replacing(path) as aside:
                save_file({_FEATURES: features}, aside, metadata={_CHECKSUM: tensor_hash(features)})
        except (OSError, SafetensorError) as error:
            self._stop(f"writing fails: {error}")
            return
        self._size += size * self._writers  # as if every writer adds as much, until they are counted
        self.counts.written += 1

    def _has_room(self, size: int) -> bool:
        # Looked up once in 64 pictures: at 4.7 MB each they are 0.3 GB, less than what stays free.
        looks = self.counts.written % 64 == 0
        if self._limit and self.counts.written >= self._next_look:  # other runs may write, too
            sizes = [*map(_size_of, self.folder.glob("*/*.safetensors"))]
            self._size, self._next_look = sum(sizes), self.counts.written + max(64, len(sizes) // 16)
        if self._limit and self._size + size > self._limit:
            self._stop(f"it has reached its limit of {self._limit / 2**30:g} GiB")
        elif looks and shutil.disk_usage(self.folder).free < size + _KEPT_FREE:
            self._stop("less than 1 GiB is free on its disk")
        return not self._full

    def _stop(self, why: str) -> None:
        self._full = True
        logger.warning("Nothing more is added to the feature cache %s: %s. What it holds is used.", self.folder, why)
