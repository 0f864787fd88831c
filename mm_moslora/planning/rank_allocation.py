"""Ranks by module for a next run, shared out by the singular values that a warm-up run has learned.

Shapes: A ``[R, D_in]``, M ``[R, R]``, B ``[D_out, R]``; the update is ``s B M A``.

The values are those of the update: M's own depend on the coordinates of A and B. Every module keeps a rank of 1; the
next direction goes, while parameters are left, to the module that has the largest squared value for each parameter.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from mm_moslora.adapters.adapter_inspection import inspect_adapter
from mm_moslora.adapters.adapter_options import AdapterOptions
from mm_moslora.adapters.folder_format import FACTORS_A, FACTORS_B, PREFIX
from mm_moslora.adapters.folders.load_folder import read_folder
from mm_moslora.adapters.mixer import form_named
from mm_moslora.utils.errors import AdapterError


@dataclass(frozen=True, kw_only=True)
class RankAllocation:
    """Ranks by module, with at most the parameters of one rank for all."""

    rank: int
    """The one rank that they replace."""
    alpha: float
    """Of that rank, with the scaling s of the warm-up."""
    ranks: Mapping[str, int]
    """By module path."""
    parameters: int
    """Of A, B and mixers with these ranks."""
    budget: int
    """With the one rank."""
    power: float
    """s is alpha over this power of the rank."""

    def settings(self) -> dict[str, Any]:
        """Of the recipe's `adapter`: rank and alpha, and those of modules with another rank. All have one s."""
        patterns = {path: own for path, own in self.ranks.items() if own != self.rank}
        alphas = {path: round(self.alpha * (own / self.rank) ** self.power, 6) for path, own in patterns.items()}
        return {"rank": self.rank, "alpha": self.alpha, "rank_pattern": patterns, "alpha_pattern": alphas}


def allocate_ranks(folder: str | Path, *, rank: int | None = None) -> RankAllocation:
    """Share the parameters of one rank out over an adapter's modules.

    Args:
        folder: any adapter folder that `load_adapter` reads, trained with a larger rank.
        rank: the one rank, below that of the folder; None: half of it.

    Raises:
        AdapterError: see `load_adapter`; an adapter with shared factors, frozen factors, or ranks or alphas by
            module; a rank that is not below its own; ranks that the form of its mixers does not take.
    """
    content = read_folder(folder)
    config: AdapterOptions = content.config
    for option in ("shared_factors", "rank_pattern", "alpha_pattern"):
        if getattr(config, option):
            raise AdapterError(
                f"{folder} has {option}. Ranks are shared out over modules that have one rank, one alpha and factors "
                "of their own."
            )
    if config.factor_form == "svd":
        raise AdapterError(f"{folder} has factor_form svd: its A and B do not train, so ranks of them cost nothing.")
    target = config.r // 2 if rank is None else rank
    if not 1 <= target < config.r:
        raise AdapterError(
            f"The rank is {target}, expected 1 to {config.r - 1}: {folder} has learned {config.r} directions a module, "
            "of which the largest are taken. Warm up with twice the rank that you want."
        )
    values = {report.path: report.singular_values for report in inspect_adapter(folder)}
    if odd := next((path for path, own in values.items() if not math.isfinite(sum(own))), None):
        raise AdapterError(f"{odd} of {folder} holds NaN or infinity, so its directions have no order.")
    form = form_named(config.mixer_form)
    widths = {path: sum(factor.numel() // config.r for factor in _outer(content.tensors, path)) for path in values}

    def size(path: str, rank: int) -> int:
        has_mixer = config.mixer_trainable and not config.is_plain(path)
        shapes = form.shapes(rank) if has_mixer else {}
        return rank * widths[path] + sum(math.prod(shape) for shape in shapes.values())

    budget = sum(size(path, target) for path in values)
    ranks = _shared_out(values, size, budget)
    try:
        for own in ranks.values():
            form.check(own)
    except AdapterError as error:
        raise AdapterError(
            f"Modules would get ranks that mixer_form {config.mixer_form!r} does not take: {error} Warm up with dense "
            "mixers."
        ) from error
    power = 0.5 if config.use_rslora else 1.0
    return RankAllocation(
        rank=target, alpha=config.lora_alpha * (target / config.r) ** power, power=power, ranks=ranks, budget=budget,
        parameters=sum(size(path, own) for path, own in ranks.items()),
    )  # fmt: skip


def _outer(tensors: Mapping[str, Tensor], path: str) -> list[Tensor]:
    """A and B of a module."""
    names = (f"{PREFIX}{path}{end}" for end in (*FACTORS_A, *FACTORS_B))
    return [tensors[name] for name in names if name in tensors]


def _shared_out(values: Mapping[str, Sequence[float]], size: Callable[[str, int], int], budget: int) -> dict[str, int]:
    """The rank of every module: see the module's text.

    Args:
        values: singular values in falling order, by module.
        size: parameters of a module with a rank.
        budget: largest sum of them.
    """
    ranks, used = dict.fromkeys(values, 1), sum(size(path, 1) for path in values)

    def next_of(path: str) -> tuple[float, str]:
        more = size(path, ranks[path] + 1) - size(path, ranks[path])
        return -(values[path][ranks[path]] ** 2) / more, path

    waiting = [next_of(path) for path in values if len(values[path]) > 1]
    heapq.heapify(waiting)
    while waiting:
        _, path = heapq.heappop(waiting)
        more = size(path, ranks[path] + 1) - size(path, ranks[path])
        if used + more > budget:
            continue
        ranks[path], used = ranks[path] + 1, used + more
        if ranks[path] < len(values[path]):
            heapq.heappush(waiting, next_of(path))
    return ranks
