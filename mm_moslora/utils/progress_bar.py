"""Progress output: a bar with an ETA on a terminal, an occasional line elsewhere, nothing on other ranks."""

from __future__ import annotations

import logging
import sys
import time
from types import TracebackType

from tqdm import tqdm

from mm_moslora.utils import distributed
from mm_moslora.utils.text_format import format_seconds

logger = logging.getLogger(__name__)


class Progress:
    """Progress of a counted task.

    Args:
        initial: units that were done before (a resumed run).
        every: seconds between lines without a terminal.
    """

    def __init__(self, what: str, total: int, *, unit: str = "step", initial: int = 0, every: float = 15.0) -> None:
        self.what, self.total, self.unit, self.every = what, total, unit, every
        self.done, self.initial = initial, initial
        self.started = self.last_line = time.monotonic()
        self.warm: tuple[int, float] | None = None
        """Units and time after the first new ones, which include warm-up."""
        self.said_all = False
        self.bar = None
        if distributed.is_main() and sys.stderr.isatty():
            self.bar = tqdm(total=total, initial=initial, desc=what, unit=unit, dynamic_ncols=True, leave=True)

    def update(self, done: int, note: str = "") -> None:
        """Update the number of finished units."""
        if self.bar is not None:
            self.bar.set_postfix_str(note, refresh=False)
            self.bar.update(done - self.done)
        self.done = done
        now = time.monotonic()
        finished = done >= self.total
        due = (not self.said_all) if finished else now - self.last_line >= self.every
        self.said_all = finished
        if self.bar is None and distributed.is_main() and due:
            self.last_line = now
            logger.info("%s: %s", self.what, self.line(note))
        if self.warm is None and done > self.initial:
            self.warm = done, now

    def of(self, done: int, total: int) -> None:
        """Update the number of finished units together with the total, where the total was not known before."""
        if self.total != total:
            self.total, self.warm = total, None
            if self.bar is not None:
                self.bar.reset(total)
        self.update(done)
        if done >= total and self.bar is not None:
            self.bar.close()

    def line(self, note: str = "") -> str:
        """The state in one line, with the remaining time where the pace is known."""
        now = time.monotonic()
        parts = [f"{self.done}/{self.total} {self.unit}s"]
        if self.warm is not None and self.warm[0] < self.done < self.total:
            pace = (now - self.warm[1]) / (self.done - self.warm[0])
            parts.append(f"{format_seconds(pace * (self.total - self.done))} left")
        else:
            parts.append(format_seconds(now - self.started))
        return ", ".join([*parts, *([note] if note else [])])

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar is not None:
            self.bar.close()
