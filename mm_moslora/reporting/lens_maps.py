"""Measures of an adapter's modules as heat maps of kinds by layers, and the table and picture of `mm-moslora adapters
inspect`: these maps, energies by pairs, spectra; see docs/adapters.md."""

from __future__ import annotations

import math
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import chdir, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mm_moslora.utils.errors import AdapterError
from mm_moslora.utils.files import replacing
from mm_moslora.utils.folder_marks import output_file
from mm_moslora.utils.run_paths import writing

MEASURES = {
    "norm_update": "norm",
    "effective_rank": "effective rank",
    "stable_rank": "stable rank",
    "effective_pairs": "pairs",
    "orthogonal_distance": "from orthogonal",
    "condition": "condition",
    "moved": "moved",
}
"""Headings of the measures (`adapters.adapter_inspection.MEASURES`) in `mixers.json` and below `mixer/` in the metrics.

They are stated again because reports need no torch."""
TITLES = {
    "moved": "M moved, as a share of its start",
    "orthogonal_distance": "M from orthogonal",
    "effective_rank": "Effective rank of the update",
}
"""Measures that are drawn."""
_SOFTWARE = "mm_moslora"
_SIGN = re.compile(rb"\x89PNG\r\n\x1a\n.{25}.{4}tEXtSoftware\0%b" % _SOFTWARE.encode(), re.DOTALL)
"""Software that a picture names, which marks it as replaceable."""
MOST_NAMES = 24
"""Layers above which not every one is named."""


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
    """The measures of `TITLES` that are known of any module."""
    kinds, layers = _kinds_and_layers([path for path, _ in modules])
    rows, columns = list(dict.fromkeys(kinds)), sorted(set(layers))
    indices = [(rows.index(kind), columns.index(layer)) for kind, layer in zip(kinds, layers, strict=True)]
    maps = []
    for name, title in TITLES.items():
        cells: list[list[float | None]] = [[None] * len(columns) for _ in rows]
        for (row, column), (_, measures) in zip(indices, modules, strict=True):
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
        for values, part in zip(numbers.setdefault(shape, [set() for _ in path]), path, strict=True):
            values.add(part)
    kinds, layers = [], []
    for shape, path in zip(shapes, parts, strict=True):
        counts = [len(values) > 1 for values in numbers[shape]]
        kinds.append(tuple("*" if counted else part for part, counted in zip(path, counts, strict=True)))
        layers.append(tuple(int(part) for part, counted in zip(path, counts, strict=True) if counted))
    return kinds, layers


def _short(kind: tuple[str, ...], kinds: Sequence[tuple[str, ...]]) -> str:
    words = (n for n in range(1, len(kind)) if kind[-n] != "*" and not kind[-n].isdecimal())
    lengths = (n for n in words if sum(other[-n:] == kind[-n:] for other in kinds) == 1)
    return ".".join(kind[-next(lengths, len(kind)) :])


def measures_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The measures as text, one line a module; - for one that is not known."""
    width = max(len(row["path"]) for row in rows)
    lines = [f"{'module':{width}}  rank  " + "  ".join(f"{head:>8}" for head in MEASURES.values())]
    for row in rows:
        texts = ((f"{row[name]:.3g}" if name in row else "-", max(8, len(head))) for name, head in MEASURES.items())
        lines.append(
            f"{row['path']:{width}}  {row['rank']:4d}  " + "  ".join(f"{text:>{size}}" for text, size in texts)
        )
    return "\n".join(lines)


def draw_lens(rows: Sequence[Mapping[str, Any]], picture: Path, *, most: int = 6) -> Path:
    """Draw modules by depth (`ModuleReport.row`): heat maps of measures, energies by pairs, spectra of the updates."""
    with default_style({}):
        return _draw(rows, picture, most=most)


@contextmanager
def default_style(changes: Any) -> Iterator[None]:
    """matplotlib's default style with changes: everything that is drawn is drawn in it."""
    # On import, matplotlib reads a `matplotlibrc` of the working folder before all others, whatever the environment
    # says. It may be a pipe, and have TeX read other files.
    strange = "matplotlib" not in sys.modules and os.path.lexists("matplotlibrc")
    with chdir(Path(__file__).parent) if strange else nullcontext():
        from matplotlib import rc_context, style
    with style.context("default"), rc_context(changes):
        yield


def _draw(rows: Sequence[Mapping[str, Any]], picture: Path, *, most: int) -> Path:
    from matplotlib.figure import Figure

    maps = heat_maps([(row["path"], row) for row in rows])
    tall = math.ceil(len(maps) / 2) * (0.9 + 0.2 * len(maps[0].rows))
    figure = Figure(figsize=(11, tall + 4.6), layout="constrained")
    formats = figure.canvas.get_supported_filetypes()
    ending = picture.suffix.removeprefix(".").lower()
    if ending not in formats:
        raise AdapterError(f"{picture} ends in {ending!r}, expected one of {', '.join(sorted(formats))}.")
    parts: Any = figure.subfigures(3, 1, height_ratios=[tall, 2.0, 2.6])
    above, middle, below = parts
    _draw_maps(above, maps)
    named = zip(module_names([row["path"] for row in rows]), rows, strict=True)
    _draw_pairs(middle, sorted(named, key=lambda item: -item[1]["norm_update"])[:most], most)
    _draw_spectra(below.subplots(), rows)
    output_file(picture, sign=_SIGN if ending == "png" else None)
    with writing(picture):
        picture.parent.mkdir(parents=True, exist_ok=True)
        with replacing(picture) as part:
            figure.savefig(part, format=ending, dpi=120, metadata={"Software": _SOFTWARE} if ending == "png" else None)
    return picture


def _draw_maps(figure: Any, maps: Sequence[HeatMap]) -> None:
    from matplotlib.ticker import MaxNLocator

    axes = list(figure.subplots(math.ceil(len(maps) / 2), 2, squeeze=False).flat)
    for axis in axes[len(maps) :]:
        axis.set_axis_off()
    for axis, item in zip(axes, maps, strict=False):
        cells = [[math.nan if cell is None else cell for cell in line] for line in item.cells]
        figure.colorbar(axis.imshow(cells, cmap="viridis", vmin=0, aspect="auto"), ax=axis, pad=0.02)
        axis.set_title(item.title, fontsize=9)
        axis.set_yticks(range(len(item.rows)), item.rows, fontsize=7)
        axis.tick_params(axis="x", labelsize=7)
        if len(item.columns) > MOST_NAMES:
            axis.xaxis.set_major_locator(MaxNLocator(MOST_NAMES, integer=True))
        else:
            long = any(len(name) > 2 for name in item.columns)
            axis.set_xticks(range(len(item.columns)), item.columns, rotation=90 if long else 0)


def _draw_pairs(figure: Any, named: Sequence[tuple[str, Mapping[str, Any]]], most: int) -> None:
    from matplotlib.colors import PowerNorm

    axes = list(figure.subplots(1, most, squeeze=False).flat)
    for axis in axes:
        axis.set_axis_off()
    for axis, (name, row) in zip(axes, named, strict=False):
        axis.imshow(row["pair_energy"], cmap="viridis", norm=PowerNorm(0.5, vmin=0))
        axis.set_title(re.sub(r"(.{12,}?\.)", r"\1\n", name), fontsize=6)
    title = "Energy by pairs in the largest updates: directions of B downwards, of A to the right, strongest first"
    figure.suptitle(title, fontsize=9)


def _draw_spectra(axis: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    for index, row in enumerate(rows):
        shade = 0.15 + 0.7 * index / max(1, len(rows) - 1)
        values = row["singular_values"]
        axis.plot(range(1, len(values) + 1), values, color=str(1 - shade), linewidth=0.8)
    axis.set_xlabel("index")
    axis.set_ylabel("singular value of s B M A")
    axis.set_title("Updates, shallow (light) to deep (dark)", fontsize=9)
