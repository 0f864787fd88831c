"""What an adapter folder keeps of the start of training: the mixers, and Gram matrices of A and B with their start.

::

    base_model.model.PATH.lora_start.weight          the mixer at the start
    base_model.model.PATH.lora_start.rows.cross      A A0^T [R, R], float64, where A0 is known
    base_model.model.PATH.lora_start.rows.start      A0 A0^T
    base_model.model.PATH.lora_start.columns.*       the same of B^T, where B does not start at zero

These are a few KiB per module. They change no output: a folder without them, or with a damaged file, loads.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mm_moslora.adapters.folder_format import (
    FACTORS_A,
    FACTORS_B,
    OWN_WEIGHTS,
    PREFIX,
    START_MIXER,
    START_PART,
    START_WEIGHTS,
    read_manifest,
    read_tensors,
)
from mm_moslora.adapters.layers.adapter_layers import MoSLoRALayer, Start
from mm_moslora.adapters.tree import named_adapter_layers
from mm_moslora.utils.errors import AdapterError
from mm_moslora.utils.identity import sha256_of

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Overlap:
    """Products of the rows of a factor with those of its start, or of another adapter's factor."""

    cross: Tensor
    """``F F0^T`` ``[R, R0]``, float64."""
    start: Tensor
    """``F0 F0^T`` ``[R0, R0]``."""

    @classmethod
    def of(cls, factor: Tensor, start: Tensor | None) -> Overlap | None:
        """Of two factors ``[R, D]`` and ``[R0, D]``; None without a start, for one of zero, NaN or another width."""
        if start is None or start.shape[1:] != factor.shape[1:] or not start.any() or not start.isfinite().all():
            return None
        old = start.double()
        return cls(cross=factor.double() @ old.T, start=old @ old.T)


@dataclass(frozen=True, kw_only=True)
class ModuleStart:
    """The start of one module, as far as it is known."""

    M: Tensor | None = None
    """``[R, R]``."""
    rows: Overlap | None = None
    """Of A."""
    columns: Overlap | None = None
    """Of B^T; None also where B starts at zero."""

    @classmethod
    def of(cls, layer: MoSLoRALayer, adapter_name: str, A: Tensor, B: Tensor) -> ModuleStart:
        """From the start that a layer holds."""
        start = layer.starts.get(adapter_name, Start())
        return cls(M=start.mixer if adapter_name in layer.lora_mixer else None, **_overlaps(start, A, B))

    @classmethod
    def read(cls, stored: Mapping[str, Tensor], path: str, rank: int) -> ModuleStart:
        """From the tensors of a folder; parts of another shape, and NaN, are not known."""

        def part(name: str) -> Tensor | None:
            tensor = stored.get(f"{PREFIX}{path}{START_PART}{name}")
            fits = tensor is not None and tensor.shape == (rank, rank) and bool(tensor.isfinite().all())
            return tensor if fits else None

        def overlap(side: str) -> Overlap | None:
            cross, start = (part(f"{side}.{name}") for name in ("cross", "start"))
            return None if cross is None or start is None else Overlap(cross=cross.double(), start=start.double())

        return cls(M=part("weight"), rows=overlap("rows"), columns=overlap("columns"))


def _overlaps(start: Start, A: Tensor, B: Tensor) -> dict[str, Overlap | None]:
    """Of A and of B^T with their starts; the factors of convolutions are taken as matrices."""
    old_B = None if start.B is None else start.B.flatten(1).T
    rows = Overlap.of(A.flatten(1), None if start.A is None else start.A.flatten(1))
    return {"rows": rows, "columns": Overlap.of(B.flatten(1).T, old_B)}


def starts_of(model: nn.Module, adapter_name: str) -> dict[str, Start]:
    """The start of an adapter's modules, by module path, as far as it is known."""
    return {
        path: layer.starts[adapter_name] for path, layer in named_adapter_layers(model) if adapter_name in layer.starts
    }


@torch.no_grad()
def start_tensors(starts: Mapping[str, Start], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a folder keeps, by its names in the file."""
    stored: dict[str, Tensor] = {}
    for path, start in starts.items():
        name = f"{PREFIX}{path}"
        if start.mixer is not None:
            stored[f"{name}{START_MIXER}"] = start.mixer
        A, B = (
            next((tensors[name + end].flatten(1) for end in ends if name + end in tensors), None)
            for ends in (FACTORS_A, FACTORS_B)
        )
        if A is None or B is None:
            continue
        for side, overlap in _overlaps(start, A, B).items():
            if overlap is not None:
                stored[f"{name}{START_PART}{side}.cross"] = overlap.cross
                stored[f"{name}{START_PART}{side}.start"] = overlap.start
    return stored


@torch.no_grad()
def set_starts(
    model: nn.Module,
    adapter_name: str,
    stored: Mapping[str, Tensor],
    tensors: Callable[[], Mapping[str, Tensor]],
    *,
    starts: Mapping[str, Start],
) -> None:
    """Give the layers of an adapter the start that a folder keeps; those that it does not know have none."""
    mixers = mixer_starts(stored)
    again: dict[str, Tensor] = {}
    if stored and any(start.A is not None or start.B is not None for start in starts.values()):
        again = start_tensors(starts, tensors())

    def same(path: str, side: str) -> bool:
        names = (f"{PREFIX}{path}{START_PART}{side}.{part}" for part in ("cross", "start"))
        return all(name in again and name in stored and _close(again[name], stored[name]) for name in names)

    for path, layer in named_adapter_layers(model):
        if layer.holds(adapter_name):
            start = starts.get(path, Start())
            layer.keep_start(adapter_name, mixers.get(path))
            A = start.A if same(path, "rows") else None
            B = start.B if same(path, "columns") else None
            if A is not None or B is not None:
                layer.starts[adapter_name] = Start(mixer=layer.starts.get(adapter_name, Start()).mixer, A=A, B=B)


def restore_start(model: nn.Module, folder: Path, *, adapter_name: str = "default") -> None:
    """Go on from the start that a checkpoint's adapter folder keeps; see `set_starts`."""
    if stored := read_start(folder, read_manifest(folder)):
        set_starts(
            model, adapter_name, stored, lambda: read_tensors(folder / OWN_WEIGHTS),
            starts=starts_of(model, adapter_name),
        )  # fmt: skip


def _close(actual: Tensor, expected: Tensor) -> bool:
    return actual.shape == expected.shape and bool((actual - expected).norm() <= 1e-5 * expected.norm())


def mixer_starts(stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The mixers at the start, by module path."""
    names = [name for name in stored if name.endswith(START_MIXER)]
    return {name.removeprefix(PREFIX).removesuffix(START_MIXER): stored[name] for name in names}


def read_start(root: Path, manifest: Mapping[str, Any]) -> dict[str, Tensor]:
    """What a folder keeps of the start; empty where it keeps nothing, or its file is not the one it was saved with."""
    path, digest = root / START_WEIGHTS, manifest.get("start")
    if digest is None or not path.is_file():
        return {}
    try:
        if sha256_of(path) == digest:
            return read_tensors(path)
    except (AdapterError, OSError) as error:
        logger.info("%s", error)
    logger.warning("%s is damaged or of another adapter, so the start of training is not known.", path)
    return {}
