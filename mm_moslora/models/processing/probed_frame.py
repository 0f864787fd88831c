"""Finds where the pixels of a picture go in any image processing, by looking: no class of processors is known here.

Four pictures of one size are processed: dark, light, and two with a ramp from dark to light, across and down. Dark
and light give the range of every output value, and show padding, where they agree. The ramps then give the place in
the file that every value sees. Where outputs are patches in a list, their places in the picture stay unknown, so such a
processing is accepted only where it shows the whole picture.

Shapes: ``H x W`` pixels of the file, ``t`` tiles, ``h x w`` pixels of a tile.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mm_moslora.batch import PictureFrame
from mm_moslora.utils.errors import ModelError

Pixels = NDArray[np.float64]
_SNAP = 0.25
"""Pixels of the model within which an edge is taken for a whole pixel."""
_TOP, _PERIODS = 254, 8
"""Level at the end of a ramp, and how often the rounding goes through all its points."""
_WHOLE = 0.06
"""Share of a side that may be missing from what patches show of it: half a patch column of a small picture."""


def probed_frame(size: tuple[int, int], process: Callable[[Image.Image], Pixels]) -> PictureFrame | None:
    """Where the pixels of a picture of this width and height go; None: the whole picture is seen, in patches.

    Args:
        process: gives the pixels ``[..., 3, h, w]`` of tiles, or patches in any other shape.

    Raises:
        ModelError: part of the picture is missing from the patches.
    """
    black, white, *ramps = (process(image) for image in _pictures(*size))
    span = np.abs(white - black)
    visible = span > 0.5 * span.max()
    with np.errstate(divide="ignore", invalid="ignore"):
        across, down = (np.where(visible, (ramp - black) / (white - black), np.nan) for ramp in ramps)
    if black.ndim >= 4 and black.shape[-3] == 3:
        return _of_tiles(size, across, down)
    ends = [value for ramp in (across, down) for value in (np.nanmin(ramp), 1 - np.nanmax(ramp))]
    if max(ends) > _WHOLE:
        raise ModelError(
            f"The image processor shows a part of a picture of {size[0]} x {size[1]} pixels, in patches whose places "
            "are unknown, so boxes cannot be placed. Switch its cropping off, or write the coordinates into the texts."
        )
    return None


def _pictures(width: int, height: int) -> list[Image.Image]:
    plain = [Image.new("RGB", (width, height), (level,) * 3) for level in (0, _TOP)]
    planes = (_ramp(width, height), _ramp(height, width).T)
    return [*plain, *(Image.fromarray(np.ascontiguousarray(plane)).convert("RGB") for plane in planes)]


def _ramp(columns: int, rows: int) -> NDArray[np.uint8]:
    """Levels that rise along the columns; rows are rounded at different points, so that their mean is exact."""
    exact = (np.arange(columns) + 0.5) / columns * _TOP
    rounding = (np.arange(rows) + 0.5) * _PERIODS / rows % 1
    return np.floor(exact[None, :] + rounding[:, None]).astype(np.uint8)


def _of_tiles(size: tuple[int, int], across: Pixels, down: Pixels) -> PictureFrame:
    """The frame of the tile that shows most of the picture: whole pictures come beside tiles of them."""
    height, width = across.shape[-2:]
    tiles = list(zip(across.reshape(-1, 3, height, width)[:, 0], down.reshape(-1, 3, height, width)[:, 0], strict=True))

    def shown(tile: tuple[Pixels, Pixels]) -> float:
        return float(np.prod([np.nanmax(ramp) - np.nanmin(ramp) if np.isfinite(ramp).any() else 0 for ramp in tile]))

    across, down = max(tiles, key=shown)
    (x, wide), (y, high) = _edges(across, size[0]), _edges(down.T, size[1])
    return PictureFrame(width=width, height=height, scale=(wide / size[0], high / size[1]), offset=(x, y))


def _edges(ramp: Pixels, side: int) -> tuple[float, float]:
    """Start and length of the whole side of the file along the columns of a tile, in its pixels."""
    columns = np.flatnonzero(np.isfinite(ramp).any(axis=0))
    values = np.nanmean(ramp[:, columns], axis=0)
    margin = min(int(len(columns) * max(0.1, 2.5 / side)), (len(columns) - 2) // 2)  # resampling bends the ends
    inner = slice(margin, len(columns) - margin)
    slope, start = np.polyfit(columns[inner] + 0.5, values[inner], 1)
    edge, length = -start / slope, 1 / slope
    whole = round(edge), round(edge + length)
    close = max(abs(whole[0] - edge), abs(whole[1] - edge - length)) < _SNAP
    return (float(whole[0]), float(whole[1] - whole[0])) if close else (float(edge), float(length))
