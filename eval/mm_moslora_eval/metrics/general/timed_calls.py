"""Comparisons that may take for ever, or all memory, in a process of their own with a time limit.

A process that takes too long is ended, and the next answer gets a new one.
"""

from __future__ import annotations

import json
import os
import select
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from mm_moslora.launch.child_processes import PIPE, Child, child_environment, python_words, start
from mm_moslora.utils.errors import MissingRequirementError
from mm_moslora.utils.untrusted_data import StrictJsonError, parse_object

SECONDS = 10.0
"""Time for one answer."""
TABLE_SECONDS = 60.0
"""Time for the tables of one answer; two of the largest size take most of it."""
FIRST_SECONDS = 120.0
"""Time in which a process imports what a comparison needs, before its first answer."""
_MOST_REPLY = 2**20
_MISSING = MissingRequirementError.__name__


def name_of(compare: Callable[..., float]) -> str:
    """The name by which both processes know a comparison: `module:function`."""
    return f"{compare.__module__}:{compare.__name__}"


class TimedProcess:
    """A process that makes comparisons one after the other; safe in threads."""

    def __init__(self) -> None:
        self._child: Child | None = None
        self._ready: set[str] = set()
        self._lock = threading.Lock()

    def value(self, compare: Callable[..., float], *, seconds: float = SECONDS, **arguments: Any) -> float:
        """The result of a comparison, see `result`, that is a number."""
        return float(self.result(compare, seconds=seconds, **arguments))

    def result(self, compare: Callable[..., Any], *, seconds: float = SECONDS, **arguments: Any) -> Any:
        """The result of a comparison, as plain data; its module has its first call in `FIRST_CALLS`."""
        comparison = name_of(compare)
        with self._lock:
            try:
                child = self._started(comparison)
                reply = self._asked(child, {"comparison": comparison, **arguments}, seconds)
            except BaseException:
                self._end()
                raise
        if "error" in reply:
            kind, _, message = str(reply["error"]).partition(": ")
            raise MissingRequirementError(message) if kind == _MISSING else RuntimeError(str(reply["error"]))
        return reply["value"]

    def _started(self, comparison: str) -> Child:
        child = self._child
        if child is None or child.poll() is not None:
            self._end()
            words = python_words("-m", "mm_moslora_eval.metrics.general.timed_process")
            environment = child_environment({"OMP_NUM_THREADS": "1"})
            child = self._child = start(words, stdin=PIPE, stdout=PIPE, env=environment)
        if comparison not in self._ready:
            try:
                self._asked(child, {"comparison": comparison}, FIRST_SECONDS)
            except TimeoutError as error:
                raise RuntimeError(f"the process that compares answers is not ready: {error}") from error
            self._ready.add(comparison)
        return child

    def _asked(self, child: Child, question: dict[str, Any], seconds: float) -> dict[str, object]:
        assert child.stdin is not None
        child.stdin.write(json.dumps(question).encode() + b"\n")
        child.stdin.flush()
        return self._reply(child, seconds)

    @staticmethod
    def _reply(child: Child, seconds: float) -> dict[str, object]:
        assert child.stdout is not None
        data, place = b"", child.stdout.fileno()
        while not data.endswith(b"\n"):
            if not select.select([place], [], [], seconds)[0]:
                raise TimeoutError(f"the comparison took more than {seconds:g} seconds")
            more = os.read(place, _MOST_REPLY)
            if not more:
                raise RuntimeError("the process that compares answers ended; it may need more memory than it has")
            data += more
        try:
            return parse_object(data)
        except StrictJsonError as error:
            raise RuntimeError(f"the reply of the process that compares answers {error}") from error

    def _end(self) -> None:
        child, self._child = self._child, None
        self._ready.clear()
        if child is not None:
            child.kill()
            child.wait()
            for stream in (child.stdin, child.stdout):
                if stream is not None:
                    with suppress(OSError):
                        stream.close()

    def close(self) -> None:
        """End the process."""
        with self._lock:
            self._end()


PROCESS = TimedProcess()
"""The one of this process; its own ends with it, at the end of its input."""
