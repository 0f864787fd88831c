"""Stopping on request: at once while there is nothing to save, later at the same step on all ranks."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

from mm_moslora.launch.child_processes import REQUESTS_TO_END_UNSAVED, RequestCounter, install_handler, restore_handlers
from mm_moslora.utils.text_format import whole_number

_AGAIN_SECONDS = 30.0
"""Delay before the exception is raised again, where Python or a library swallowed it (in a finaliser, for example)."""


class Stopped(KeyboardInterrupt):
    """A signal arrived before there was anything to save."""


class StopRequest:
    """Within it, the first signal is stored and the third Ctrl-C stops at once; within `at_once` every signal does."""

    def __init__(self) -> None:
        self.received = 0
        """The first signal, 0 for none."""
        self._requests = RequestCounter()
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        signal.setitimer(signal.ITIMER_REAL, 0.0)  # an exception that was swallowed before takes effect here
        self._previous = install_handler(self._remember, unless_ignored=False)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        restore_handlers(self._previous)

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Stop at once on a signal, in phases with nothing to save."""
        # With several ranks the handlers stay unchanged: the launcher ends the other ranks by the same signals after a
        # failure, and a rank that waits in a collective would not react.
        process = os.getpid()

        def leave(number: int, frame: FrameType | None) -> None:
            if os.getpid() != process:  # a data worker that was forked from this process
                os._exit(128 + number)
            self.received = self.received or number
            signal.setitimer(signal.ITIMER_REAL, _AGAIN_SECONDS)
            raise Stopped

        alone = whole_number(os.environ, "WORLD_SIZE", 1, least=1) == 1
        previous = install_handler(leave) if alone else {}
        if previous:
            previous[signal.SIGALRM] = signal.signal(signal.SIGALRM, leave)
        try:
            if previous and self.received:  # it came before these handlers
                raise Stopped
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0.0)
            restore_handlers(previous)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.received = self.received or number
        if self._requests.count(number) >= REQUESTS_TO_END_UNSAVED:
            raise KeyboardInterrupt
