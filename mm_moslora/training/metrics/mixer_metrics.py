"""Mixer matrices before and after training with statistics, as JSON for the report.

Shapes: a mixer is ``[R, R]``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from mm_moslora.adapters.adapter_inspection import describe, summary
from mm_moslora.adapters.layers.adapter_layers import MoSLoRALayer
from mm_moslora.adapters.layers.factor_modules import Mixer
from mm_moslora.adapters.tree import named_adapter_layers
from mm_moslora.utils.files import replace_json

SHOWN = 12
"""Mixers stored in full; further ones have statistics only."""
LARGEST = 64
"""Side above which a mixer's picture is downsampled."""


MIXERS = ".lora_mixer"
"""Part of the names of mixers' parameters."""


@torch.no_grad()
def mixer_matrices(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The mixers that train as ``[R, R]``, by module path; none of those that depend on their input.

    Args:
        model: the model with its adapters.
        state: parameter name to full fp32 value.
    """
    whole = {name.removeprefix("model."): value.float() for name, value in state.items() if MIXERS in name}
    return {
        path: _matrix(path, layer, name, whole).clone()
        for path, layer in named_adapter_layers(model)
        for name, mixer in layer.lora_mixer.items()
        if cast(Mixer, mixer).form.fixed and any(key.startswith(f"{path}{MIXERS}.{name}.") for key in whole)
    }


def _matrix(path: str, layer: MoSLoRALayer, name: str, whole: Mapping[str, Tensor]) -> Tensor:
    """M of one adapter, of the values of a state and, where it has none, of the layer's own."""
    own = layer.mixer_tensors(name)
    tensors = {part: whole.get(f"{path}{MIXERS}.{name}.{part}", tensor) for part, tensor in own.items()}
    return cast(Mixer, layer.lora_mixer[name]).form.matrix(tensors)


def mixer_figures(matrix: Tensor) -> dict[str, float]:
    """Distance from identity and from the nearest orthogonal matrix, condition number, effective rank.

    Distances are Frobenius norms divided by ``sqrt(R)``; the effective rank is the participation ratio of the squared
    singular values.
    """
    rank = matrix.shape[0]
    u, s, v = torch.linalg.svd(matrix.double())
    energy = s.square()
    return {
        "distance_from_identity": float((matrix.double() - torch.eye(rank).double()).norm() / rank**0.5),
        "distance_from_orthogonal": float((matrix.double() - u @ v).norm() / rank**0.5),
        "condition": float(s[0] / s[-1].clamp_min(1e-30)),
        "effective_rank": float(energy.sum().square() / energy.square().sum().clamp_min(1e-30)),
    }


@torch.no_grad()
def adapter_metrics(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, float]:
    """Means over the adapted modules for a tracker, under `mixer/...`; see `adapter_inspection.summary`.

    Args:
        model: the model with its adapters; it supplies the parameters that do not train.
        state: parameter name to full fp32 value, from `Engine.trainable_state`, since live weights may be shards.

    Returns:
        Finite numbers only (a rank-deficient mixer has no condition number); empty without adapters.
    """
    whole = {name.removeprefix("model."): value for name, value in state.items()}
    reports = []
    for path, layer in named_adapter_layers(model):
        for name in layer.adapter_names():
            if name in layer.lora_mixer and not cast(Mixer, layer.lora_mixer[name]).form.fixed:
                continue
            own_A, own_B = layer.outer_factors(name)
            inside = {
                key.removeprefix(f"{path}.").partition(".")[0]: value
                for key, value in whole.items()
                if key.startswith(f"{path}.lora_") and f".{name}" in key
            }
            A = inside.get("lora_A", inside.get("lora_embedding_A", own_A))
            B = inside.get("lora_B", inside.get("lora_embedding_B", own_B))
            M = _matrix(path, layer, name, whole).cpu() if name in layer.lora_mixer else None
            reports.append(describe(path, A.cpu(), M, B.cpu(), layer.scaling[name]))
    found = summary(reports) if reports else {}
    return {name: value for name, value in found.items() if math.isfinite(value)}


def write_mixers(path: Path, *, before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> list[dict[str, object]]:
    """Write `mixers.json` where the model has mixers; returns its content.

    Args:
        path: the file.
        before: mixers at step 0.
        after: mixers at the end.
    """
    chosen = set(list(after)[:: max(1, len(after) // SHOWN)][:SHOWN])
    rows: list[dict[str, object]] = []
    for name, matrix in after.items():
        moved = float((matrix - before[name]).norm() / before[name].norm().clamp_min(1e-30))
        row: dict[str, object] = {"path": name, "rank": matrix.shape[0], **mixer_figures(matrix), "moved": moved}
        if name in chosen:
            row["after"] = _picture(matrix)
            row["before"] = _picture(before[name])
        rows.append(row)
    if rows:
        replace_json(path, rows)
    return rows


def _picture(matrix: Tensor) -> list[list[float]]:
    if matrix.shape[0] > LARGEST:
        matrix = torch.nn.functional.adaptive_avg_pool2d(matrix[None], LARGEST)[0]
    return [[round(value, 4) for value in row] for row in matrix.tolist()]
