"""Statistics of an adapter: sizes, ranks and the shape of its mixers.

Shapes: A ``[R, D_in]``, M ``[R, R]``, B ``[D_out, R]``; the update is ``s B M A``. Its singular values are found from
R x R matrices (QR of A and B), never from a ``[D_out, D_in]`` one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mm_moslora.adapters.folder_format import FACTORS_A, PREFIX, adapted_path
from mm_moslora.adapters.folders.folder_tensors import mixer_matrices
from mm_moslora.adapters.folders.load_folder import read_folder
from mm_moslora.adapters.tree import named_adapter_layers
from mm_moslora.utils.errors import AdapterError
from mm_moslora.utils.files import output_file
from mm_moslora.utils.run_paths import writing

_SIGN = b"mm_moslora"
"""Software that a picture names, which marks it as replaceable."""


@dataclass(frozen=True, kw_only=True)
class ModuleReport:
    """Statistics of one adapted module."""

    path: str
    """Module path."""
    rank: int
    """R."""
    norm_A: float  # noqa: N815
    """Frobenius norm of A."""
    norm_B: float  # noqa: N815
    """Frobenius norm of B."""
    norm_update: float
    """Frobenius norm of ``s B M A``."""
    effective_rank: float
    """exp of the entropy of the update's normalised singular values: R when all are equal, 1 when one is dominant."""
    identity_distance: float
    """``|M - I| / |I|``; 0 for plain LoRA."""
    orthogonal_distance: float
    """``|M - Q| / |Q|`` with Q the nearest orthogonal matrix; 0 for an orthogonal mixer."""
    condition: float
    """Largest over smallest singular value of M; infinite for a singular one."""
    crossed_energy: float
    """Share of the update's energy in pairs (B_j, A_i) of different subspaces; 0 for a diagonal mixer."""
    singular_values: tuple[float, ...]
    """Of ``s B M A``, in falling order, R of them."""
    mixer: tuple[tuple[float, ...], ...]
    """M."""


def inspect_adapter(folder: str | Path) -> list[ModuleReport]:
    """Read an adapter folder and describe every module.

    Args:
        folder: any folder that `load_adapter` reads; no model is needed.

    Raises:
        AdapterError: see `load_adapter`; no factor in the folder.
    """
    content = read_folder(folder)
    mixers = mixer_matrices(content.tensors, mixer_form=content.config.mixer_form)
    reports = []
    for name, A in content.tensors.items():
        path = adapted_path(name)
        if path is None:
            continue
        suffix = next(suffix for suffix in FACTORS_A if name.endswith(suffix))
        B = content.tensors[f"{PREFIX}{path}{suffix.replace('_A', '_B')}"]
        scaling = content.config.scaling_for(path.partition(".base_layer.")[0])
        reports.append(describe(path, A, mixers.get(f"{PREFIX}{path}"), B, scaling))
    if not reports:
        raise AdapterError(f"{folder} holds no factors to inspect.")
    return sorted(reports, key=lambda report: _natural(report.path))


@torch.no_grad()
def inspect_model(model: nn.Module, *, adapter_name: str = "default") -> list[ModuleReport]:
    """Describe every adapted module of a live model, for a tracker during training.

    Args:
        model: PEFT model, or the base model with adapters inside; not sharded.
        adapter_name: the adapter.

    Raises:
        AdapterError: no such adapter.
    """
    reports = []
    for path, layer in named_adapter_layers(model):
        if layer.holds(adapter_name):
            factors = layer.factors(adapter_name)
            M = None if factors.M is None else factors.M.cpu()
            reports.append(describe(path, factors.A.cpu(), M, factors.B.cpu(), factors.scaling))
    if not reports:
        raise AdapterError(f"The model has no adapter {adapter_name!r} to inspect.")
    return sorted(reports, key=lambda report: _natural(report.path))


def inspection(folder: str | Path, *, picture: str | Path | None = None) -> str:
    """The text of `mm-moslora adapters inspect FOLDER`; writes the picture on the way.

    Args:
        folder: see `inspect_adapter`.
        picture: see `draw`; None writes none.
    """
    reports = inspect_adapter(folder)
    lines = [table(reports), ""]
    lines += [f"{name:28} {value:.4g}" for name, value in summary(reports).items()]
    if picture is not None:
        lines.append(f"picture: {draw(reports, picture)}")
    return "\n".join(lines)


@torch.no_grad()
def describe(path: str, A: Tensor, M: Tensor | None, B: Tensor, scaling: float) -> ModuleReport:
    """Describe one module's factors.

    Args:
        path: its name in the report.
        A: ``[R, D_in]``, or a convolution's.
        M: ``[R, R]``, None for the identity.
        B: ``[D_out, R]``, or a convolution's.
        scaling: s.
    """
    A, B = A.double().flatten(1), B.double().flatten(1)
    rank = len(A)
    identity = torch.eye(rank, dtype=torch.float64)
    mixer = identity if M is None else M.double()
    # B = Qb Rb and A^T = Qa Ra: the update has the singular values of s Rb M Ra^T.
    core = torch.linalg.qr(B).R @ mixer @ torch.linalg.qr(A.T).R.T
    singular = torch.linalg.svdvals(scaling * core)
    singular = torch.cat([singular, singular.new_zeros(max(0, rank - len(singular)))])[:rank]
    U, S, Vh = torch.linalg.svd(mixer)
    energy = (B.norm(dim=0)[:, None] * mixer * A.norm(dim=1)[None, :]).square()
    share = energy / energy.sum().clamp_min(torch.finfo(torch.float64).tiny)
    size = math.sqrt(rank)
    return ModuleReport(
        path=path,
        rank=rank,
        norm_A=float(A.norm()),
        norm_B=float(B.norm()),
        norm_update=float(singular.norm()),
        effective_rank=_effective_rank(singular),
        identity_distance=float((mixer - identity).norm()) / size,
        orthogonal_distance=float((mixer - U @ Vh).norm()) / size,
        condition=float(S[0] / S[-1]) if S[-1] > 1e-12 * S[0] else math.inf,
        crossed_energy=float(share.sum() - share.diagonal().sum()),
        singular_values=tuple(singular.tolist()),
        mixer=tuple(tuple(row) for row in mixer.tolist()),
    )


def table(reports: Sequence[ModuleReport]) -> str:
    """The figures as text, one line a module."""
    width = max(len(report.path) for report in reports)
    head = f"{'module':{width}}  rank     |A|     |B|  |update|  eff.rank  |M-I|  |M-Q|     cond  crossed"
    lines = [head]
    lines.extend(
        f"{report.path:{width}}  {report.rank:4d} {report.norm_A:7.3g} {report.norm_B:7.3g} "
        f"{report.norm_update:9.3g}  {report.effective_rank:8.2f} {report.identity_distance:6.3f} "
        f"{report.orthogonal_distance:6.3f} {report.condition:8.3g}  {report.crossed_energy:6.1%}"
        for report in reports
    )
    return "\n".join(lines)


def summary(reports: Sequence[ModuleReport]) -> dict[str, float]:
    """Means over the modules, under names for a tracker (`mixer/...`)."""
    keys = ("norm_update", "effective_rank", "identity_distance", "orthogonal_distance", "crossed_energy")
    means = {f"mixer/{key}": sum(getattr(report, key) for report in reports) / len(reports) for key in keys}
    return means | {"mixer/condition_max": max(report.condition for report in reports)}


def draw(reports: Sequence[ModuleReport], picture: str | Path, *, most: int = 24) -> Path:
    """Write a picture: a heat map of every mixer, and the singular values of the updates by depth.

    Args:
        reports: what to draw.
        picture: file to write; the ending chooses the format (.png, .svg, .pdf).
        most: draw at most so many mixers, evenly chosen over the depth.

    Raises:
        AdapterError: an ending that is no format.
        OSError: the file cannot be written.
    """
    from matplotlib.figure import Figure

    target = Path(picture)
    step = max(1, math.ceil(len(reports) / most))
    chosen = list(reports)[::step]
    columns = min(6, len(chosen))
    rows = math.ceil(len(chosen) / columns)
    figure = Figure(figsize=(2.2 * columns, 2.3 * rows + 3.2), layout="constrained")
    formats = figure.canvas.get_supported_filetypes()
    ending = target.suffix.removeprefix(".").lower()
    if ending not in formats:
        raise AdapterError(f"{target} ends in {ending!r}, expected one of {', '.join(sorted(formats))}.")
    parts: Any = figure.subfigures(2, 1, height_ratios=[2.3 * rows, 3.2])
    above, below = parts
    axes: Any = above.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    for axis, report in zip(axes.flat, chosen, strict=False):
        largest = max(abs(value) for row in report.mixer for value in row) or 1.0
        axis.imshow(report.mixer, cmap="RdBu_r", vmin=-largest, vmax=largest)
        axis.set_title(_short(report.path), fontsize=7)
    above.suptitle("Mixers M (blue negative, red positive)", fontsize=9)
    curves = below.subplots()
    for index, report in enumerate(reports):
        shade = 0.15 + 0.7 * index / max(1, len(reports) - 1)
        curves.plot(range(1, report.rank + 1), report.singular_values, color=str(1 - shade), linewidth=0.8)
    curves.set_xlabel("index")
    curves.set_ylabel("singular value of s B M A")
    curves.set_title("Updates, shallow (light) to deep (dark)", fontsize=9)
    output_file(target, sign=_SIGN if ending == "png" else None)
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(target, dpi=120, metadata={"Software": _SIGN.decode()} if ending == "png" else None)
    return target


def _effective_rank(singular: Tensor) -> float:
    total = singular.sum()
    if total <= 0:
        return 0.0
    shares = singular / total
    return float(torch.exp(-(shares * shares.clamp_min(1e-300).log()).sum()))


def _natural(path: str) -> tuple[tuple[int, int | str], ...]:
    return tuple((0, int(part)) if part.isdigit() else (1, part) for part in path.split("."))


def _short(path: str) -> str:
    parts = path.split(".")
    numbers = [part for part in parts if part.isdigit()]
    return f"{numbers[0]} {parts[-1]}" if numbers else parts[-1]
