"""Measures of an adapter's modules as heat maps of kinds by layers; see docs/subspace_lens.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

MEASURES = {
    "norm_update": "norm",
    "effective_rank": "effective rank",
    "stable_rank": "stable rank",
    "effective_pairs": "pairs",
    "orthogonal_distance": "from orthogonal",
    "condition": "condition",
    "moved": "moved",
    "reshaped": "reshaped",
    "row_angle": "rows °",
    "column_angle": "columns °",
}
"""Measures in `mixers.json` and, as means, under `mixer/` in the metrics, with their headings."""
TITLES = {
    "moved": "M moved, as a share of its start",
    "orthogonal_distance": "M from orthogonal",
    "row_angle": "Row space turned, degrees",
    "effective_rank": "Effective rank of the update",
}
"""Measures that are drawn."""


@dataclass(frozen=True, kw_only=True)
class HeatMap:
    """One measure of all modules."""

    title: str
    rows: list[str]
    """Kinds of modules, by the shortest end of their paths that tells them apart; layer numbers are stars."""
    columns: list[str]
    """Layer numbers of the paths, in order; empty text for a path without one. A number that all modules of a kind have
    (`to_out.0`) is part of its name."""
    cells: list[list[float | None]]
    """By row and column; None where there is no module, or the measure is not known."""


def heat_maps(modules: Sequence[tuple[str, Mapping[str, Any]]]) -> list[HeatMap]:
    """The measures of `TITLES` that are known of any module.

    Args:
        modules: paths, such as `model.layers.3.self_attn.q_proj`, with their measures.
    """
    kinds, layers = _kinds_and_layers([path for path, _ in modules])
    rows, columns = list(dict.fromkeys(kinds)), sorted(set(layers))
    places = [(rows.index(kind), columns.index(layer)) for kind, layer in zip(kinds, layers, strict=True)]
    maps = []
    for name, title in TITLES.items():
        cells: list[list[float | None]] = [[None] * len(columns) for _ in rows]
        for (row, column), (_, measures) in zip(places, modules, strict=True):
            cells[row][column] = measures.get(name)
        if any(cell is not None for line in cells for cell in line):
            names = [".".join(map(str, layer)) for layer in columns]
            maps.append(HeatMap(title=title, rows=[_short(kind, rows) for kind in rows], columns=names, cells=cells))
    return maps


def module_names(paths: Sequence[str]) -> list[str]:
    """The layer and the kind of each of all paths, as `heat_maps` names them: `3 q_proj`."""
    kinds, layers = _kinds_and_layers(paths)
    rows = list(dict.fromkeys(kinds))
    return [
        f"{'.'.join(map(str, layer))} {_short(kind, rows)}".strip() for kind, layer in zip(kinds, layers, strict=True)
    ]


def _kinds_and_layers(paths: Sequence[str]) -> tuple[list[tuple[str, ...]], list[tuple[int, ...]]]:
    """The parts of each path with stars for its layer numbers, and these numbers."""
    parts = [path.split(".") for path in paths]
    shapes = [tuple("*" if part.isdecimal() else part for part in path) for path in parts]
    numbers: dict[tuple[str, ...], list[set[str]]] = {}
    for shape, path in zip(shapes, parts, strict=True):
        for found, part in zip(numbers.setdefault(shape, [set() for _ in path]), path, strict=True):
            found.add(part)
    kinds, layers = [], []
    for shape, path in zip(shapes, parts, strict=True):
        counts = [len(found) > 1 for found in numbers[shape]]
        kinds.append(tuple("*" if counted else part for part, counted in zip(path, counts, strict=True)))
        layers.append(tuple(int(part) for part, counted in zip(path, counts, strict=True) if counted))
    return kinds, layers


def _short(kind: tuple[str, ...], kinds: Sequence[tuple[str, ...]]) -> str:
    words = (n for n in range(1, len(kind)) if kind[-n] != "*" and not kind[-n].isdecimal())
    lengths = (n for n in words if sum(other[-n:] == kind[-n:] for other in kinds) == 1)
    return ".".join(kind[-next(lengths, len(kind)) :])
