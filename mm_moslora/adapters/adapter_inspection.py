"""The subspace lens: measures of an adapter that do not depend on the coordinates in which it is written.

Shapes: A ``[R, D_in]``, M ``[R, R]``, B ``[D_out, R]``; the update is ``s B M A``.

Rotations P and Q of R dimensions write the same update as ``(Q A, P M Q^T, B P^T)``, and numbers a and b as
``(a A, M / (a b), b B)``. No measure changes with them; `ModuleReport.moved` needs the start in the same coordinates.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mm_moslora.adapters.folder_format import (
    FACTORS_A,
    MIXER_PART,
    PREFIX,
    START_MIXER,
    adapted_path,
    is_factor,
    mixers_in,
)
from mm_moslora.adapters.folders.foreign_formats import AdapterFolder
from mm_moslora.adapters.folders.load_folder import read_folder
from mm_moslora.adapters.layers.adapter_layers import MoSLoRALayer
from mm_moslora.adapters.tree import named_adapter_layers
from mm_moslora.utils.errors import AdapterError

MEASURES = (
    "norm_update", "effective_rank", "stable_rank", "effective_pairs", "orthogonal_distance", "condition", "moved",
)  # fmt: skip
"""Numbers of a `ModuleReport`, as `mixers.json` and, as means, the metrics below `mixer/` name them."""
EQUAL = 1e-6
"""Singular values that differ by less than this share of the largest are equal: their directions are not unique."""


@dataclass(frozen=True, kw_only=True)
class ModuleReport:
    """Measures of one adapted module; None where the start, or the mixer, that a measure needs is not known."""

    path: str
    """Module path."""
    rank: int
    """R."""
    norm_update: float
    """Frobenius norm of ``s B M A``."""
    effective_rank: float
    """exp of the entropy of the update's normalised singular values: R when all are equal, 1 when one is dominant."""
    stable_rank: float
    """Squared Frobenius norm over squared largest singular value of the update."""
    effective_pairs: float
    """exp of the entropy of `pair_energy`: how many pairs of a direction of B and one of A make the update."""
    orthogonal_distance: float | None
    """Distance of M from the nearest multiple of an orthogonal matrix, as a share of M; None: plain LoRA."""
    condition: float | None
    """Largest over smallest singular value of M; infinite for a singular one; None: plain LoRA."""
    moved: float | None
    """``|M - M0| / |M0|``, in the coordinates of training."""
    singular_values: tuple[float, ...]
    """Of ``s B M A``, in falling order, R of them."""
    pair_energy: tuple[tuple[float, ...], ...]
    """Share of the update's energy in every pair of a left singular direction of B (row) and a right one of A (column),
    strongest first. They sum to 1, or are 0 without an update; directions of equal singular values share evenly."""
    mixer: tuple[tuple[float, ...], ...] | None
    """M; None: plain LoRA."""
    mixer_start: tuple[tuple[float, ...], ...] | None
    """M0."""

    def measures(self) -> dict[str, float]:
        """The `MEASURES` that are known."""
        return {name: value for name in MEASURES if (value := getattr(self, name)) is not None}

    def row(self) -> dict[str, Any]:
        """The path, the rank, the known measures, the energies by pairs and the spectrum, for tables and pictures."""
        return {
            "path": self.path,
            "rank": self.rank,
            **self.measures(),
            "pair_energy": self.pair_energy,
            "singular_values": self.singular_values,
        }


def inspect_adapter(folder: str | Path, *, against: str | Path | None = None) -> list[ModuleReport]:
    """Read an adapter folder and describe every module.

    Args:
        against: another adapter folder to take for the start, such as that of an earlier checkpoint or of another seed;
            None: the start that the folder keeps.

    Raises:
        AdapterError: see `load_adapter`; no factor in the folder.
    """
    content = read_folder(folder)
    mixers = mixers_in(content.tensors)
    other = None if against is None else read_folder(against)
    reports = []
    for name, A in content.tensors.items():
        path = adapted_path(name)
        if path is None:
            continue
        suffix = next(suffix for suffix in FACTORS_A if name.endswith(suffix))
        B = content.tensors[f"{name.removesuffix(suffix)}{suffix.replace('_A', '_B')}"]
        kept = content.initial_mixers.get(f"{PREFIX}{path}{START_MIXER}")
        initial = kept if other is None else _mixer_in(other, name)
        M, scaling = mixers.get(f"{PREFIX}{path}"), content.config.scaling_for(path)
        reports.append(describe(path, A, M, B, scaling, initial=initial))
    if not reports:
        raise AdapterError(f"{folder} holds no factors to inspect.")
    return sorted(reports, key=lambda report: _natural(report.path))


def trained_parameters(folder: str | Path) -> int:
    """How many numbers of A, B and mixers train in an adapter."""
    content = read_folder(folder)
    frozen = not content.config.mixer_trainable
    return sum(
        tensor.numel()
        for name, tensor in content.tensors.items()
        if is_factor(name) and not (frozen and MIXER_PART in name)
    )


def _mixer_in(folder: AdapterFolder, name_of_A: str) -> Tensor | None:
    """M of a module of another adapter, the identity in plain LoRA; None: it does not adapt the module."""
    if name_of_A not in folder.tensors:
        return None
    identity = torch.eye(len(folder.tensors[name_of_A]))
    return mixers_in(folder.tensors).get(f"{PREFIX}{adapted_path(name_of_A)}", identity)


@torch.no_grad()
def inspect_model(model: nn.Module, *, adapter_name: str = "default") -> list[ModuleReport]:
    """Describe every adapted module of a live model, for a tracker during training.

    Args:
        model: PEFT model, or the base model with adapters inside; not sharded.

    Raises:
        AdapterError: no such adapter.
    """
    reports = []
    for path, layer in named_adapter_layers(model):
        if layer.holds(adapter_name):
            own = layer.factors(adapter_name)
            M = None if own.M is None else own.M.cpu()
            reports.append(layer_report(path, layer, adapter_name, own.A.cpu(), M, own.B.cpu()))
    if not reports:
        raise AdapterError(f"The model has no adapter {adapter_name!r} to inspect.")
    return sorted(reports, key=lambda report: _natural(report.path))


@torch.no_grad()
def layer_report(
    path: str, layer: MoSLoRALayer, adapter_name: str, A: Tensor, M: Tensor | None, B: Tensor
) -> ModuleReport:
    """The report of one adapted layer from its whole factors; the layer supplies the scaling and the initial mixer."""
    return describe(path, A, M, B, layer.scaling[adapter_name], initial=layer.initial_mixers.get(adapter_name))


def why_unknown(reports: Sequence[ModuleReport], *, against_other: bool) -> str | None:
    """Why `moved` is missing from the reports of a folder; None: it is not."""
    lost = sum(report.moved is None for report in reports)
    if against_other and lost:
        return f"{lost} modules have no mixer, are not in the other adapter, or have another rank or NaN there."
    if lost == len(reports):
        return "start not kept: the folder does not tell how the adapter began, so moved is -."
    return None


@torch.no_grad()
def describe(
    path: str, A: Tensor, M: Tensor | None, B: Tensor, scaling: float, *, initial: Tensor | None = None
) -> ModuleReport:
    """Describe one module's factors; every measure is NaN where one of them is not finite.

    Args:
        A: ``[R, D_in]``, or a convolution's.
        M: ``[R, R]``, None for the identity.
        B: ``[D_out, R]``, or a convolution's.
        scaling: s.
        initial: M as training began; one of another rank, of zeros or with NaN is not known.
    """
    A, B, rank = A.double().flatten(1), B.double().flatten(1), len(A)
    mixer = torch.eye(rank, dtype=torch.float64) if M is None else M.double()
    if not all(bool(factor.isfinite().all()) for factor in (A, mixer, B)):
        A, mixer, B, initial = torch.zeros_like(A), torch.zeros_like(mixer), torch.zeros_like(B), None
        scaling = math.nan
    # B = U S V^T and A^T = U S V^T: the update is U_B (S_B V_B^T M V_A S_A) U_A^T times s.
    (S_A, V_A), (S_B, V_B) = _svd(A.T), _svd(B)
    core = S_B[:, None] * V_B @ mixer @ V_A.T * S_A
    values = torch.linalg.svdvals(core) * abs(scaling)
    values = torch.cat([values, values.new_zeros(max(0, rank - len(values)))])[:rank]
    pairs = _averaging(S_B) @ (_shares(core.square()) + 0 * scaling) @ _averaging(S_A)
    of_mixer = torch.linalg.svdvals(mixer) + 0 * scaling
    first = None
    if M is not None and initial is not None and initial.shape == M.shape and initial.isfinite().all():
        first = initial.double() if initial.any() else None
    return ModuleReport(
        path=path,
        rank=rank,
        norm_update=float(values.norm()),
        effective_rank=_effective(_shares(values)),
        stable_rank=float(values.square().sum() / values[0].square()) if values[0] != 0 else 0.0,
        effective_pairs=_effective(pairs),
        orthogonal_distance=None if M is None else _sine(float(of_mixer.sum()), rank**0.5 * float(of_mixer.norm())),
        condition=None if M is None else _condition(of_mixer),
        moved=None if first is None else float((mixer - first).norm() / first.norm()),
        singular_values=tuple(values.tolist()),
        pair_energy=_rows(pairs),
        mixer=None if M is None else _rows(M),
        mixer_start=None if first is None else _rows(first),
    )


def _svd(factor: Tensor) -> tuple[Tensor, Tensor]:
    """S ``[K]`` and V^T ``[K, R]`` of a tall factor ``[D, R]``, K the smaller of D and R."""
    _, S, Vh = torch.linalg.svd(torch.linalg.qr(factor, mode="r").R, full_matrices=False)
    return S, Vh


def _sine(product: float, lengths: float) -> float:
    """The sine of an angle whose cosine is a quotient; 0 for a quotient of zeros."""
    return math.sqrt(max(1 - (product / lengths) ** 2, 0.0)) if lengths else 0.0 * lengths


def _condition(values: Tensor) -> float:
    return float(values[0] / values[-1]) if not values[-1] <= 1e-12 * values[0] else math.inf


def _rows(matrix: Tensor) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(row) for row in matrix.tolist())


def _shares(values: Tensor) -> Tensor:
    return values / values.sum().clamp_min(torch.finfo(values.dtype).tiny)


def _effective(shares: Tensor) -> float:
    """exp of the entropy of shares that sum to 1; 0 where all are zero."""
    if (shares == 0).all():
        return 0.0
    return float(torch.exp(-(shares * shares.clamp_min(1e-300).log()).sum()))


def _averaging(values: Tensor) -> Tensor:
    """The matrix ``[K, K]`` that averages over directions of equal singular values."""
    steps = (values[:-1] - values[1:]) > EQUAL * values[0]
    group = torch.cat([steps.new_zeros(1), steps]).cumsum(0)
    same = (group[:, None] == group[None, :]).to(values.dtype)
    return same / same.sum(0)


def summary(reports: Sequence[ModuleReport]) -> dict[str, float]:
    """Means over the modules that have a measure, under names for a tracker (`mixer/...`)."""
    values = {name: [v for report in reports if (v := getattr(report, name)) is not None] for name in MEASURES}
    condition = values.pop("condition")
    means = {f"mixer/{name}": sum(numbers) / len(numbers) for name, numbers in values.items() if numbers}
    return means | ({"mixer/condition_max": max(condition)} if condition else {})


def _natural(path: str) -> tuple[tuple[int, int | str], ...]:
    return tuple((0, int(part)) if part.isdigit() else (1, part) for part in path.split("."))
