"""8-bit RGB of pictures in other modes than RGB, 8-bit grey and a palette; `record_picture` has the rules."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms

_STRIP = 2**20
"""Approximate pixels of one strip when transparency is composited."""


def rgb_of_mode(image: Image.Image) -> Image.Image:
    """An opened picture of any mode as RGB."""
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return _scaled(image)
    if image.mode == "LAB":
        convert = ImageCms.buildTransform(ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB"), "LAB", "RGB")
        converted = ImageCms.applyTransform(image, convert)
        assert converted is not None
        return converted
    if image.mode == "La":  # alpha premultiplied
        image = image.convert("LA")
    if image.mode in ("RGBA", "RGBa", "LA", "PA") or "transparency" in image.info:
        return _on_white(image)
    return image.convert("RGB")


def _on_white(image: Image.Image) -> Image.Image:
    """RGB of a picture with transparency, strip by strip.

    Compositing makes several copies and holds the GIL: 40 million pixels at once take 440 MiB and most of a second.
    """
    made = Image.new("RGB", image.size)
    rows = max(1, _STRIP // image.width)
    for top in range(0, image.height, rows):
        box = (0, top, image.width, min(image.height, top + rows))
        layer = image.crop(box).convert("RGBA")
        white = Image.new("RGBA", layer.size, (255, 255, 255, 255))
        made.paste(Image.alpha_composite(white, layer).convert("RGB"), box)
    return made


def _scaled(image: Image.Image) -> Image.Image:
    """8-bit RGB of a grey picture of more than 8 bits, by the rules of this module. NaN becomes black."""
    exact = np.float64 if image.mode == "I" else np.float32
    values: NDArray[np.floating[Any]] = np.asarray(image).astype(exact)
    finite = np.isfinite(values)
    low, high = 0.0, 0.0
    if finite.any():
        low, high = float(values.min(where=finite, initial=np.inf)), float(values.max(where=finite, initial=-np.inf))
    tops: tuple[float, ...] = (65535,) if image.mode.startswith("I;16") else (255, 65535)
    if image.mode == "F":
        tops = (1, *tops)
    scale = next((top for top in tops if low >= 0 and high <= top), None)
    if scale is not None:
        low, high = 0.0, float(scale)
    with np.errstate(all="ignore"):  # in place: a wide picture may take half a gigabyte
        values -= low
        values /= max(high - low, 1e-12)
    np.nan_to_num(values, copy=False, nan=0.0, posinf=1.0, neginf=0.0)
    np.clip(values, 0, 1, out=values)
    values *= 255
    return Image.fromarray(np.rint(values, out=values).astype(np.uint8)).convert("RGB")
