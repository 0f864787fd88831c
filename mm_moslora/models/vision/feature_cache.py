"""Features of pictures, kept by key in memory and on disk.

On disk are those of a frozen vision tower, one file per picture, shared by all runs and ranks that use the tower.
An entry is named by what the tower was shown (the prepared pixels, so picture and processing count) and lies in a
folder named by the tower (weights, configuration, layers, dtype). It is written aside and renamed, so any number of
processes may share a folder, and read as a memory map. An entry that is not what was written is encoded again and
counted.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from mm_moslora.utils.files import replacing

logger = logging.getLogger(__name__)

FORMAT = 1
"""Part of a tower's name; a change of what is stored makes new folders."""
_FEATURES, _CHECKSUM = "features", "xxh3_128"
MEMORY_BYTES = 2**30
"""Of features in memory; 576 tokens of width 4096 take 4.7 MB in bf16."""
_KEPT_FREE = 2**30
"""Bytes that stay free on the disk: checkpoints need room more than a cache."""


@dataclass(kw_only=True)
class StoreCounts:
    """What became of the pictures asked for since the store was opened, in this process."""

    read: int = 0
    """Found on disk."""
    encoded: int = 0
    """Not there; the tower ran."""
    written: int = 0
    """Encoded and kept."""
    damaged: int = 0
    """There, but not what was written; encoded again."""
    unwritten: int = 0
    """Encoded and not kept: the limit is reached, or the disk is full."""

    @property
    def hit_share(self) -> float:
        """Pictures that were found on disk, out of all asked for."""
        return self.read / max(1, self.read + self.encoded)

    def __str__(self) -> str:
        """For people."""
        return ", ".join(f"{getattr(self, item.name):,} {item.name}" for item in fields(self))


def tower_hash(tower: PreTrainedModel, layers: int | list[int]) -> str:
    """A name for a tower's features: its weights, configuration and layers.

    Args:
        tower: whole on this process (before ZeRO-3 cuts it up).
        layers: hidden states that are kept.
    """
    digest = xxhash.xxh3_128()
    config = {k: v for k, v in tower.config.to_dict().items() if k not in ("_name_or_path", "transformers_version")}
    digest.update(json.dumps([FORMAT, type(tower).__name__, config, layers], sort_keys=True, default=str).encode())
    for name, value in sorted(tower.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(_bytes(value))
    return digest.hexdigest()


def pixel_hash(pixels: Tensor) -> str:
    """A name for a prepared picture.

    Args:
        pixels: ``[3, H, W]`` as the tower gets them, on the CPU.
    """
    return xxhash.xxh3_128_hexdigest(_bytes(pixels))


def _bytes(tensor: Tensor) -> Any:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data


def _size_of(file: Path) -> int:
    """Bytes of a file, none where another process has just taken it away."""
    try:
        return file.stat().st_size
    except FileNotFoundError:
        return 0


class FeatureStore:
    """The features of one tower.

    Args:
        folder: of all towers.
        tower: from `tower_hash`.
        limit_gib: size of this tower's folder beyond which nothing is added; 0: none but the disk's.
        writers: processes that add to it at the same time.
    """

    def __init__(self, folder: Path, tower: str, *, limit_gib: float = 0.0, writers: int = 1) -> None:
        self.folder = folder / tower
        self.folder.mkdir(parents=True, exist_ok=True)
        self.counts = StoreCounts()
        self._writers = writers
        self._limit = limit_gib * 2**30
        self._size = sum(map(_size_of, self.folder.glob("*/*.safetensors"))) if self._limit else 0
        self._full = False

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.safetensors"

    def read(self, key: str) -> Tensor | None:
        """The features of a picture, on the CPU; None where they are not there or damaged.

        Args:
            key: from `pixel_hash`.
        """
        path = self._path(key)
        if not path.exists():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                value: Tensor = file.get_tensor(_FEATURES)
                checksum = (file.metadata() or {}).get(_CHECKSUM)
        except (OSError, RuntimeError, SafetensorError, KeyError, ValueError) as error:
            # Another process may have taken it away; torch, which maps the file, tells so in words alone.
            if not isinstance(error, FileNotFoundError) and "No such file" not in str(error):
                self._damaged(path, str(error))
            return None
        if xxhash.xxh3_128_hexdigest(_bytes(value)) != checksum:
            self._damaged(path, "its checksum differs")
            return None
        self.counts.read += 1
        return value

    def _damaged(self, path: Path, why: str) -> None:
        self.counts.damaged += 1
        logger.warning("The cached features in %s are damaged (%s); the picture is encoded again.", path, why)

    def write(self, key: str, value: Tensor) -> None:
        """Keep the features of a picture that was encoded, if there is room.

        Args:
            key: from `pixel_hash`.
            value: the features.
        """
        self.counts.encoded += 1
        path = self._path(key)
        kept = value.detach().cpu().contiguous()
        size = kept.numel() * kept.element_size()
        if self._full or not self._has_room(size):
            self.counts.unwritten += 1
            return
        try:
            path.parent.mkdir(exist_ok=True)
            with replacing(path) as aside:
                save_file({_FEATURES: kept}, aside, metadata={_CHECKSUM: xxhash.xxh3_128_hexdigest(_bytes(kept))})
        except (OSError, SafetensorError) as error:
            self._stop(f"writing fails: {error}")
            self.counts.unwritten += 1
            return
        self._size += size * self._writers
        self.counts.written += 1

    def _has_room(self, size: int) -> bool:
        if self._limit and self._size + size > self._limit:
            self._stop(f"it has reached its limit of {self._limit / 2**30:g} GiB")
        elif self.counts.written % 64 == 0 and shutil.disk_usage(self.folder).free < size + _KEPT_FREE:
            self._stop("less than 1 GiB is free on its disk")
        return not self._full

    def _stop(self, why: str) -> None:
        self._full = True
        logger.warning("Nothing more is added to the feature cache %s: %s. What it holds is used.", self.folder, why)


class FeatureCache:
    """Features by key: in memory, where the least recently used go first, and on disk where a store is given.

    Args:
        memory_bytes: beyond which features in memory go; 0: none stay.
        store: reads and keeps what is not in memory.
    """

    def __init__(self, *, memory_bytes: float = MEMORY_BYTES, store: FeatureStore | None = None) -> None:
        self.store = store
        self.hits = self.misses = 0
        self._memory_bytes, self._used = memory_bytes, 0
        self._features: OrderedDict[str, Tensor] = OrderedDict()

    def __contains__(self, key: object) -> bool:
        """Whether the features of a key are in memory."""
        return key in self._features

    def get_many(
        self,
        keys: Sequence[str],
        encode: Callable[[Sequence[int]], Sequence[Tensor]],
        *,
        device: torch.device | None = None,
    ) -> list[Tensor]:
        """Features of all keys.

        Args:
            keys: wanted; one may occur several times.
            encode: given the places in `keys` of features that are missing, returns these. It is called once, with an
                empty list if need be: ranks may have to agree about it.
            device: where features from disk go.
        """
        places: dict[str, int] = {}
        for place, key in enumerate(keys):
            places.setdefault(key, place)
        found = {key: self._features[key] for key in places if key in self._features}
        if self.store is not None:
            for key in places:
                if key not in found and (value := self.store.read(key)) is not None:
                    found[key] = value.to(device=device, non_blocking=True)
        missing = [key for key in places if key not in found]
        self.misses += len(missing)
        self.hits += len(keys) - len(missing)
        for key, value in zip(missing, encode([places[key] for key in missing]), strict=True):
            found[key] = value
            if self.store is not None:
                self.store.write(key, value)
        self._remember(found)
        return [found[key] for key in keys]

    def forget(self, keys: Iterable[str] | None = None) -> None:
        """Take features out of memory.

        Args:
            keys: whose; None: all.
        """
        for key in list(self._features if keys is None else keys):
            if (value := self._features.pop(key, None)) is not None:
                self._used -= value.nbytes

    def _remember(self, found: Mapping[str, Tensor]) -> None:
        self.forget(found)  # they go to the end
        self._features.update(found)
        self._used += sum(value.nbytes for value in found.values())
        while self._used > self._memory_bytes:
            self.forget([next(iter(self._features))])
