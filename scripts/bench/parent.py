"""A benchmark that nobody waits for any more takes time from those that somebody does."""

from __future__ import annotations

import os
import signal
import threading
import time


def end_with_parent(*, seconds: float = 1.0) -> None:
    """End this process when the one that started it has gone; under nohup it stays.

    Args:
        seconds: between two looks.
    """
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
        return
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(seconds)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
