"""Waiting for other processes and threads: for what they do, with a limit that only a fault reaches."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from typing import TypeVar

Value = TypeVar("Value")


def wait_until(
    condition: Callable[[], Value],
    what: str | Callable[[], object] = "",
    *,
    process: subprocess.Popen | None = None,
    seconds: float = 180.0,
    pause: float = 0.02,
) -> Value:
    """Wait for a condition; gives its value.

    Args:
        condition: asked again and again.
        what: the error's words, or a function that gives them: a log, say.
        process: the one that is to bring it about: its end ends the waiting.
        seconds: the limit.
        pause: seconds between two questions.
    """
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        if process is not None and process.poll() is not None:
            if value := condition():  # its last deed
                return value
            raise AssertionError(f"The process ended with {process.returncode}: {_words(what)}")
        if time.monotonic() > deadline:
            raise AssertionError(f"Not within {seconds:g} s: {_words(what)}")
        time.sleep(pause)
    return value


def stays(condition: Callable[[], object], seconds: float) -> None:
    """Fail when a condition ceases to hold within a time: for what must not happen and leaves no other sign."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        assert condition(), "it changed"
        time.sleep(0.02)


def _words(what: str | Callable[[], object]) -> str:
    return what if isinstance(what, str) else str(what())[-3000:]
