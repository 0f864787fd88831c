"""Alerts about a run: values that are not finite, and stalls."""

from __future__ import annotations

import math
import statistics
import threading
from collections import deque
from collections.abc import Callable, Mapping

STALL_FACTOR = 10.0
"""Multiple of the usual gap between two records; a longer gap is a stall."""
SHORTEST_STALL = 300.0
"""Minimum of a stall, seconds, since validation and saving take time."""
WELL_RECORDS = 50
"""Consecutive finite records after which a new alert about a non-finite value may be raised."""


class Watch:
    """Checks every record of metrics, and the time between records.

    Args:
        raise_alert: called with the title and the text of an alert; for a stall, from another thread.
        clock: seconds, monotonic.
        shortest: gaps shorter than this are never a stall, seconds.
    """

    def __init__(
        self, raise_alert: Callable[[str, str], object], *, clock: Callable[[], float], shortest: float = SHORTEST_STALL
    ) -> None:
        self._raise, self._clock, self._shortest = raise_alert, clock, shortest
        self._gaps: deque[float] = deque(maxlen=50)
        self._last: float | None = None
        self._step = 0
        self._stall_reported = False
        self._well_since = WELL_RECORDS
        """Consecutive finite records."""
        self._timer: threading.Timer | None = None

    def process(self, metrics: Mapping[str, float], step: int) -> None:
        """Check a record. Each kind of alert is raised once until the run has been healthy again for a while."""
        now = self._clock()
        if self._last is not None:
            self._gaps.append(now - self._last)
        self._last, self._step = now, step
        self._stall_reported = False
        bad = sorted(name for name, value in metrics.items() if not math.isfinite(value))
        if bad and self._well_since >= WELL_RECORDS:
            self._raise("Not a number", f"Step {step}: {', '.join(bad)} not finite.")
        self._well_since = 0 if bad else self._well_since + 1
        self._arm()

    def stop(self) -> None:
        """Stop checking."""
        if self._timer is not None:
            self._timer.cancel()

    @property
    def patience(self) -> float:
        """Gap that counts as a stall, seconds."""
        usual = statistics.median(self._gaps) if self._gaps else 0.0
        return max(self._shortest, STALL_FACTOR * usual)

    def _arm(self) -> None:
        self.stop()
        self._timer = threading.Timer(self.patience, self._stalled, [self.patience])
        self._timer.daemon = True
        self._timer.start()

    def _stalled(self, seconds: float) -> None:
        if not self._stall_reported:
            self._stall_reported = True
            self._raise("Stalled", f"No metrics since step {self._step}, for {seconds:.0f} s.")
