"""Measures of a run's adapter: its start, records for the trackers, and `mixers.json` for the report."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from mm_moslora.adapters.adapter_inspection import ModuleReport, layer_report, summary
from mm_moslora.adapters.layers.adapter_layers import MoSLoRALayer
from mm_moslora.adapters.tree import named_adapter_layers
from mm_moslora.tracking import Trackers
from mm_moslora.training.supervision.run_faults import only_measuring
from mm_moslora.utils import distributed
from mm_moslora.utils.errors import AdapterError
from mm_moslora.utils.files import replace_json

SHOWN = 12
"""Modules whose matrices are stored; further ones have their measures only."""
RUN_ADAPTER = "default"
"""Name of the adapter of a run in its model."""
LARGEST = 64
"""Side above which a matrix's picture is downsampled."""


MIXERS = ".lora_mixer"
"""Part of the names of mixers' parameters."""
ADAPTERS = ".lora_"
"""Part of the names of A's, M's and B's parameters."""


@torch.no_grad()
def keep_initial_mixers(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Take the mixers of this moment as the initial ones, which checkpoints and measures refer to."""
    for path, layer in named_adapter_layers(model):
        if layer.holds(RUN_ADAPTER):
            layer.keep_initial_mixer(RUN_ADAPTER, _mixer(state, path, layer))


def _factors(
    model: nn.Module, state: Mapping[str, Tensor]
) -> Iterator[tuple[str, MoSLoRALayer, str, tuple[Tensor, Tensor | None, Tensor]]]:
    """Path, layer, adapter, and whole A ``[R, D_in]``, M ``[R, R]``, B ``[D_out, R]``, of a state or as frozen."""
    # Of the adapter of the run alone; a trainer of preferences has a frozen copy of the start beside it.
    for path, layer in named_adapter_layers(model):
        for name in filter(layer.holds, [RUN_ADAPTER]):
            own = dict(zip("AB", layer.outer_factors(name), strict=True))
            A, B = (
                _whole(state, factor, f"{path}.lora_{side}.{name}.weight", f"{path}.lora_embedding_{side}.{name}")
                for side, factor in own.items()
            )
            yield path, layer, name, (A.cpu(), _mixer(state, path, layer), B.cpu())


def _mixer(state: Mapping[str, Tensor], path: str, layer: MoSLoRALayer) -> Tensor | None:
    M = layer.mixer(RUN_ADAPTER)
    return None if M is None else _whole(state, M, f"{path}{MIXERS}.{RUN_ADAPTER}.weight").cpu().float()


def _whole(state: Mapping[str, Tensor], own: Tensor, *names: str) -> Tensor:
    """A tensor of the state under one of its names; one that a layer holds and does not train, as it is."""
    full = next((state[name] for name in names if name in state), None)
    if full is None and own.requires_grad:
        raise AdapterError(f"The state to measure lacks {' and '.join(names)}, which trains.")
    return own if full is None else full


@torch.no_grad()
def adapter_reports(model: nn.Module, state: Mapping[str, Tensor]) -> list[ModuleReport]:
    """A report per adapted module; `state` has full fp32 values by name, since live weights may be shards."""
    return [layer_report(path, layer, name, A, M, B) for path, layer, name, (A, M, B) in _factors(model, state)]


def adapter_metrics(reports: Sequence[ModuleReport]) -> dict[str, float]:
    """Finite means over the adapted modules for a tracker, under `mixer/...`; empty without adapters."""
    return {name: value for name, value in (summary(reports) if reports else {}).items() if math.isfinite(value)}


def write_mixers(path: Path, reports: Sequence[ModuleReport]) -> None:
    """Write `mixers.json` where the model has adapters."""
    chosen = set(range(0, len(reports), max(1, len(reports) // SHOWN))[:SHOWN])
    rows: list[dict[str, object]] = []
    for index, report in enumerate(reports):
        measures = {name: value for name, value in report.measures().items() if math.isfinite(value)}
        row: dict[str, object] = {"path": report.path, "rank": report.rank, **measures}
        if index in chosen and math.isfinite(report.norm_update):
            matrices = {"before": report.mixer_start, "after": report.mixer, "pairs": report.pair_energy}
            row |= {name: _picture(matrix) for name, matrix in matrices.items() if matrix is not None}
        rows.append(row)
    if rows:
        replace_json(path, rows)


def _picture(matrix: Sequence[Sequence[float]]) -> list[list[float]]:
    cells = torch.tensor(matrix)
    if max(cells.shape) > LARGEST:
        cells = torch.nn.functional.adaptive_avg_pool2d(cells[None], LARGEST)[0]
    return [[float(f"{value:.4g}") for value in row] for row in cells.tolist()]


def log_adapter(
    model: nn.Module, state: Mapping[str, Tensor], trackers: Trackers, step: int, *, file: Path | None = None,
    metrics: bool = True,
) -> None:  # fmt: skip
    """Log the measures of an adapter, on rank 0; without `metrics`, the means of the step are logged already."""
    if not distributed.is_main():
        return
    with only_measuring("The adapter"):
        reports = adapter_reports(model, state)
        if metrics and (means := adapter_metrics(reports)):
            trackers.log(means, step)
        if file is not None:
            write_mixers(file, reports)
