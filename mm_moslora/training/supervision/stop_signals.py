"""Stopping on request. While there is nothing to save a signal ends the program at once; later it sets a flag, the loop
tells all ranks at the same step, they save and leave.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

from mm_moslora.launch.launcher import REQUESTS_TO_END_UNSAVED, RequestCounter

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
_AGAIN_SECONDS = 30.0
"""What was raised where Python or a library swallows it (in a finaliser, say) is raised once more after these."""


class Stopped(KeyboardInterrupt):
    """A signal came while there was nothing to save."""


class StopRequest:
    """Hears SIGTERM, SIGINT and SIGUSR1.

    In a `with` block of it the first signal is remembered, and the third Ctrl-C stops at once (KeyboardInterrupt); see
    `mm_moslora.launch.launcher.RequestCounter`. In one of `at_once`, around it, every signal stops at once (Stopped).
    """

    def __init__(self) -> None:
        self.received = 0
        """The first signal, 0 for none."""
        self._requests = RequestCounter()
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        signal.setitimer(signal.ITIMER_REAL, 0.0)  # what was swallowed before is obeyed here
        self._previous = _heard_by(self._remember)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _put_back(self._previous)

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """For programs that have nothing to save, yet or any more.

        One rank of several keeps what it has: its launcher ends it by the same signals when another rank has failed,
        which is no request, and one that waits for others in a collective would not hear them.
        """
        process = os.getpid()

        def leave(number: int, frame: FrameType | None) -> None:
            if os.getpid() != process:  # a process that prepares data, forked from this one
                os._exit(128 + number)
            self.received = self.received or number
            signal.setitimer(signal.ITIMER_REAL, _AGAIN_SECONDS)
            raise Stopped

        alone = int(os.environ.get("WORLD_SIZE", "1")) == 1
        previous = _heard_by(leave, unless_ignored=True) if alone else {}
        if previous:
            previous[signal.SIGALRM] = signal.signal(signal.SIGALRM, leave)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0.0)
            _put_back(previous)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.received = self.received or number
        if self._requests.count(number) >= REQUESTS_TO_END_UNSAVED:
            raise KeyboardInterrupt


def _heard_by(handler: Callable[[int, FrameType | None], None], *, unless_ignored: bool = False) -> dict[int, Any]:
    """Give the signals to a handler; returns what had them."""
    numbers = [n for n in _SIGNALS if not (unless_ignored and signal.getsignal(n) == signal.SIG_IGN)]
    try:
        return {number: signal.signal(number, handler) for number in numbers}
    except ValueError:  # not the main thread: the embedding program handles signals
        return {}


def _put_back(previous: dict[int, Any]) -> None:
    for number, handler in previous.items():
        signal.signal(number, handler)
