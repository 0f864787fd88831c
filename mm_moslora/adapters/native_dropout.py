"""Dropout by the kernels of `mm_moslora.native`: numpy's random numbers, drawn and applied in one pass each.

Shapes: ``T`` rows, ``D`` width. A mask is a bit per entry and stays near the core.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import Parameter

from mm_moslora.native import library
from mm_moslora.native.tensors import call
from mm_moslora.native.tensors import fits as kernels_take

STEPS = 2**15
"""Random numbers that decide an entry: 15 bits of its own."""
_TOGETHER = 4
"""Masks that a kernel draws at once; `MASKS` in the source."""


def fits(rows: Tensor) -> bool:
    """Whether the kernels draw for these rows: float32 or bfloat16 on a CPU, and nobody looks at the operators."""
    return type(rows) in (Tensor, Parameter) and kernels_take(rows)


class KeptNatively:
    """Which entries of some rows stay, as bits; see `dropout.Kept`."""

    def __init__(self, bits: NDArray[np.uint8]) -> None:
        self._bits = bits

    def keep(self, rows: Tensor) -> Tensor:
        """A new tensor, ``[T, D]``."""
        rows = rows if rows.stride(1) == 1 else rows.contiguous()
        return self._keep(rows, rows.new_empty(rows.shape))

    def keep_(self, rows: Tensor) -> Tensor:
        """In place."""
        return self._keep(rows, rows)

    def add(self, total: Tensor, rows: Tensor) -> None:
        """Add to `total` what stays of `rows`."""
        assert total.is_contiguous()
        assert rows.is_contiguous()
        call("add_kept", rows, rows.data_ptr(), self._bits.ctypes.data, total.data_ptr(), *rows.shape)

    def _keep(self, rows: Tensor, to: Tensor) -> Tensor:
        assert to.is_contiguous()
        call("keep", rows, rows.data_ptr(), rows.stride(0), self._bits.ctypes.data, to.data_ptr(), *rows.shape)
        return to


def kept_blocks(
    blocks: Iterable[slice], width: int, draws: Sequence[tuple[int, int]]
) -> Iterator[tuple[slice, list[KeptNatively]]]:
    """The masks that `dropout.kept_bits` draws, several side by side.

    Args:
        blocks: of rows, in order; all but the last of a multiple of four.
        width: D.
        draws: of every mask how many of `STEPS` random numbers drop an entry, and the seed of numpy's SFC64.

    Yields:
        Which rows, and which of their entries stay by each mask.
    """
    draw = library()["draw_bits"]
    groups = [_Group(draws[start : start + _TOGETHER]) for start in range(0, len(draws), _TOGETHER)]
    for block in blocks:
        entries = (block.stop - block.start) * width
        yield block, [KeptNatively(bits) for group in groups for bits in group.draw(draw, entries)]


class _Group:
    """Masks that are drawn at once."""

    def __init__(self, draws: Sequence[tuple[int, int]]) -> None:
        self._count = len(draws)
        self._thresholds = np.array([threshold for threshold, _ in draws], dtype=np.int32)
        self._state = np.zeros((4, _TOGETHER if len(draws) > 1 else 1), dtype=np.uint64)
        for place, (_, seed) in enumerate(draws):
            self._state[:, place] = np.random.SFC64(seed).state["state"]["state"]

    def draw(self, kernel: Callable[..., None], entries: int) -> NDArray[np.uint8]:
        """The next bits of every mask, and behind them what the kernels may read."""
        bits = np.empty((self._count, (-(-entries // 32) + 2) * 4), dtype=np.uint8)
        kernel(
            self._state.ctypes.data, self._count, self._thresholds.ctypes.data, bits.ctypes.data, bits.shape[1], entries
        )
        return bits
