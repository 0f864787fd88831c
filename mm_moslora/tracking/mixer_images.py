"""Mixers for dashboards: heat map and singular values of each, from the rows of `mixers.json`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

_CELL = 6
"""Pixels per entry."""


@dataclass(frozen=True, kw_only=True)
class MixerView:
    """The drawing of one mixer."""

    path: str
    heat_map: Image.Image
    spectrum: list[float]
    """Singular values, largest first."""
    figures: dict[str, float]


def mixer_views(rows: Sequence[Mapping[str, Any]]) -> list[MixerView]:
    """The mixers with stored matrices.

    Args:
        rows: rows of `mixers.json`.
    """
    views = []
    for row in rows:
        if not row.get("after"):
            continue
        matrix = np.asarray(row["after"], dtype=np.float64)
        figures = {key: float(value) for key, value in row.items() if isinstance(value, float)}
        spectrum = np.linalg.svd(matrix, compute_uv=False).tolist()
        views.append(MixerView(path=str(row["path"]), heat_map=_drawn(matrix), spectrum=spectrum, figures=figures))
    return views


def _drawn(matrix: np.ndarray[Any, np.dtype[np.float64]]) -> Image.Image:
    from mm_moslora.reporting.inline_images import heat_map, on_white

    small = on_white(heat_map(matrix.tolist(), float(np.abs(matrix).max())))
    return small.resize((small.width * _CELL, small.height * _CELL), Image.Resampling.NEAREST)
