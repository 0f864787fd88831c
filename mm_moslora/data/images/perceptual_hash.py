"""Perceptual hashes of pictures: find files of the same picture that differ in size, format or quality."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np
from PIL import Image

DISTANCE = 3
"""Bits of 64 that may differ. Of two hashes this close, at least one of four bands of 16 bits is equal."""
COLOUR_DISTANCE = 16
"""Largest difference of mean colours (per channel, of 255); needed because flat pictures have equal gradients."""
_BANDS = 4


class Fingerprint(NamedTuple):
    """The perceptual hash and mean colour of a picture."""

    gradient: int
    """64 bits: whether grey grows to the right, in 8 x 8 cells."""
    colour: tuple[int, int, int]
    """Mean red, green and blue."""


class Match(NamedTuple):
    """Two pictures with similar fingerprints."""

    first: str
    second: str


def fingerprint(image: Image.Image) -> Fingerprint:
    """The fingerprint of an RGB picture."""
    grey = np.asarray(image.convert("L").resize((9, 8), Image.Resampling.BOX), dtype=np.int16)
    bits = np.packbits(grey[:, 1:] > grey[:, :-1])
    mean = image.resize((1, 1), Image.Resampling.BOX).getpixel((0, 0))
    assert isinstance(mean, tuple)
    return Fingerprint(int.from_bytes(bits.tobytes(), "big"), (int(mean[0]), int(mean[1]), int(mean[2])))


def matches(first: Mapping[str, Fingerprint], second: Mapping[str, Fingerprint]) -> list[Match]:
    """Pictures of the first set that look like one of the second set, each with its nearest match."""
    table: dict[tuple[int, int], list[str]] = defaultdict(list)
    for name, mark in second.items():
        for band in _bands(mark.gradient):
            table[band].append(name)
    pairs = []
    for name, mark in first.items():
        near = {other for band in _bands(mark.gradient) for other in table.get(band, ())}
        alike = [other for other in near if _alike(mark, second[other])]
        ranked = sorted(((mark.gradient ^ second[other].gradient).bit_count(), other) for other in alike)
        if ranked:
            pairs.append(Match(name, ranked[0][1]))
    return pairs


def _bands(gradient: int) -> Iterable[tuple[int, int]]:
    return ((band, gradient >> (16 * band) & 0xFFFF) for band in range(_BANDS))


def _alike(one: Fingerprint, other: Fingerprint) -> bool:
    near = max(abs(a - b) for a, b in zip(one.colour, other.colour, strict=True)) <= COLOUR_DISTANCE
    return near and (one.gradient ^ other.gradient).bit_count() <= DISTANCE
