"""The safetensors files of a model's folder, read in blocks of rows."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mm_moslora.adapters.folder_format import DIFFUSERS_WEIGHTS, OWN_WEIGHTS, START_WEIGHTS, STOCK_WEIGHTS, read_json
from mm_moslora.utils.errors import AdapterError

BLOCK = 2**20
"""Numbers of a tensor that are computed with at once: 4 MiB in float32."""
_INDEX = ".safetensors.index.json"
_OF_ADAPTERS = {DIFFUSERS_WEIGHTS, OWN_WEIGHTS, START_WEIGHTS, STOCK_WEIGHTS}


class WeightFiles:
    """Names and shapes of a model's tensors, and their values block by block.

    Raises:
        AdapterError: no safetensors; a shard that is missing, truncated or besides the index; a name twice.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._files: dict[str, str] = {}
        index, names = _files_of(folder)
        for name in names:
            try:
                with safe_open(folder / name, framework="pt") as file:
                    held = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
            except (SafetensorError, OSError) as error:
                raise AdapterError(f"{folder / name} is damaged or truncated ({error}). Copy it again.") from error
            if twice := held.keys() & self.shapes.keys():
                raise AdapterError(f"{folder} holds {min(twice)!r} twice, in {name} and before. Delete the wrong file.")
            self.shapes |= held
            self._files |= dict.fromkeys(held, name)
            for key in index and held:
                if index.get(key) != name:
                    raise AdapterError(f"{folder / name} holds {key!r}, which the index of {folder} does not say.")
        if lost := index.keys() - self.shapes.keys():
            raise AdapterError(f"The index of {folder} names {min(lost)!r}, which {index[min(lost)]} lacks.")

    def blocks(self, name: str) -> Iterator[tuple[int, Tensor]]:
        """First row and values of each block of rows; a number without rows is one block."""
        shape = self.shapes[name]
        # Opened for each tensor: pages of a file that stays open count as memory of the process.
        with safe_open(self.folder / self._files[name], framework="pt") as file:
            if not shape:
                yield 0, file.get_tensor(name)
                return
            rows = max(1, BLOCK // max(1, math.prod(shape[1:])))
            part: Any = file.get_slice(name)
            for start in range(0, shape[0], rows):
                yield start, part[start : start + rows]

    def twin(self, name: str, others: Iterable[str]) -> str | None:
        """Another tensor with the same values, as that of tied weights."""
        for other in sorted(others):
            if self.shapes[other] == self.shapes[name] and len(self.shapes[name]) > 1:
                pairs = zip(self.blocks(name), self.blocks(other), strict=True)
                if all(torch.equal(mine, theirs) for (_, mine), (_, theirs) in pairs):
                    return other
        return None


def _files_of(folder: Path) -> tuple[dict[str, str], list[str]]:
    """The index, tensor -> file (empty without one), and the files."""
    if not folder.is_dir():
        raise AdapterError(f"{folder} is no folder; expected that of a model, with its safetensors files.")
    names = {path.name for path in folder.glob("*.safetensors")} - _OF_ADAPTERS
    indices = sorted(folder.glob(f"*{_INDEX}"))
    if len(indices) > 1 or (indices and indices[0].name.replace(_INDEX, ".safetensors") in names):
        raise AdapterError(f"{folder} holds one model in shards and one beside it. Delete the one that is not meant.")
    if indices:
        index = read_json(indices[0]).get("weight_map")
        if not isinstance(index, dict) or not index or not set(index.values()) <= names:
            raise AdapterError(f"{indices[0]} names files that {folder} lacks. Copy the whole folder.")
        return index, sorted(set(index.values()))
    if not names:
        raise AdapterError(f"{folder} holds no weights as safetensors; pickles (.bin) are not read.")
    return {}, sorted(names)
