"""The picture of `mm-moslora adapters inspect --picture`: measures by module and layer, energies by pairs, spectra."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mm_moslora.reporting.lens_maps import HeatMap, heat_maps, module_names
from mm_moslora.utils.errors import AdapterError
from mm_moslora.utils.files import output_file
from mm_moslora.utils.run_paths import writing

_SOFTWARE = "mm_moslora"
_SIGN = re.compile(rb"\x89PNG\r\n\x1a\n.{25}.{4}tEXtSoftware\0%b" % _SOFTWARE.encode(), re.DOTALL)
"""Software that a picture names, which marks it as replaceable."""
MOST_NAMES = 24
"""Layers above which not every one is named."""


def draw_lens(rows: Sequence[Mapping[str, Any]], picture: Path, *, most: int) -> Path:
    """Write the picture; see `mm_moslora.adapters.adapter_inspection.draw`.

    Args:
        rows: modules by depth, each with `path`, known measures, `pair_energy` and `singular_values`.
        picture: file to write.
        most: draw the energies of so many modules, those of the largest updates.

    Raises:
        AdapterError: an ending that is no format.
        OSError: the file cannot be written.
    """
    from matplotlib import style

    with style.context("default"):  # a `matplotlibrc` of the working folder could have TeX read other files
        return _draw(rows, picture, most=most)


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
        figure.savefig(picture, dpi=120, metadata={"Software": _SOFTWARE} if ending == "png" else None)
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
