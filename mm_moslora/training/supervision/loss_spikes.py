"""Detection of loss spikes."""

from __future__ import annotations

import math
from collections import deque

SPIKE = 6.0
"""Standard deviations above the mean from which a loss counts as a spike."""
_WINDOW, _LEAST = 128, 16


class SpikeScore:
    """Standard deviations by which a loss exceeds the mean of the last 128 finite ones; 0 until there are 16."""

    def __init__(self) -> None:
        self._losses: deque[float] = deque(maxlen=_WINDOW)

    @property
    def count(self) -> int:
        """Number of earlier losses in the window."""
        return len(self._losses)

    def update(self, loss: float) -> float:
        """Score a loss, then add it to the window; a loss that is not finite scores infinity and is not added."""
        if not math.isfinite(loss):
            return math.inf
        score = 0.0
        if len(self._losses) >= _LEAST:
            mean = sum(self._losses) / len(self._losses)
            deviation = math.sqrt(sum((value - mean) ** 2 for value in self._losses) / len(self._losses))
            # Losses on a plateau hardly vary; a change of a thousandth of the mean is not a spike.
            score = (loss - mean) / max(deviation, 1e-3 * abs(mean), 1e-12)
        self._losses.append(loss)
        return score
