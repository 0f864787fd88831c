"""Alerts: what somebody who is not looking should be told about a run."""

from __future__ import annotations

import math
import statistics
import threading
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass

STALL_FACTOR = 10.0
"""Times the usual gap between two records without one is a stall."""
SHORTEST_STALL = 300.0
"""Seconds; validation and saving take their time."""
WELL_RECORDS = 50
"""Records in a row that must be finite before it is told once more that one is not."""


@dataclass(frozen=True, kw_only=True)
class Alert:
    """One message."""

    title: str
    text: str


class Watch:
    """Looks at every record of metrics, and at the clock between them.

    Args:
        raise_alert: called with an alert; for a stall from another thread.
        clock: seconds, monotonic.
        shortest: seconds without a record that are never a stall.
    """

    def __init__(
        self, raise_alert: Callable[[Alert], None], *, clock: Callable[[], float], shortest: float = SHORTEST_STALL
    ) -> None:
        self._raise, self._clock, self._shortest = raise_alert, clock, shortest
        self._gaps: deque[float] = deque(maxlen=50)
        self._last: float | None = None
        self._step = 0
        self._stalled_told = False
        self._well_since = WELL_RECORDS
        """Records in a row that were finite."""
        self._timer: threading.Timer | None = None

    def see(self, metrics: Mapping[str, float], step: int) -> None:
        """Take a record. Each kind of alert is raised once until the run is well again, and has been for a while."""
        now = self._clock()
        if self._last is not None:
            self._gaps.append(now - self._last)
        self._last, self._step = now, step
        self._stalled_told = False
        bad = sorted(name for name, value in metrics.items() if not math.isfinite(value))
        if bad and self._well_since >= WELL_RECORDS:
            self._raise(Alert(title="Not a number", text=f"Step {step}: {', '.join(bad)} not finite."))
        self._well_since = 0 if bad else self._well_since + 1
        self._arm()

    def stop(self) -> None:
        """No more records come."""
        if self._timer is not None:
            self._timer.cancel()

    @property
    def patience(self) -> float:
        """Seconds without a record that count as a stall."""
        usual = statistics.median(self._gaps) if self._gaps else 0.0
        return max(self._shortest, STALL_FACTOR * usual)

    def _arm(self) -> None:
        self.stop()
        self._timer = threading.Timer(self.patience, self._stalled, [self.patience])
        self._timer.daemon = True
        self._timer.start()

    def _stalled(self, seconds: float) -> None:
        text = f"No metrics since step {self._step}, for {seconds:.0f} s."
        if not self._stalled_told:
            self._stalled_told = True
            self._raise(Alert(title="Stalled", text=text))
