"""Stopping on request: a signal sets a flag, the loop tells all ranks at the same step, they save and leave."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopRequest:
    """Catches SIGTERM, SIGINT and SIGUSR1 for the length of a `with` block. The second signal stops at once."""

    def __init__(self) -> None:
        self.received = 0
        self._previous: dict[int, object] = {}

    def __enter__(self) -> StopRequest:
        try:
            for number in _SIGNALS:
                self._previous[number] = signal.signal(number, self._remember)
        except ValueError:  # not the main thread: the embedding program handles signals
            self._previous.clear()
        return self

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self.received:
            raise KeyboardInterrupt
        self.received = number

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
