"""End a benchmark when its parent process has ended, so that it does not disturb other measurements."""

from __future__ import annotations

import os
import signal
import threading
import time


def end_with_parent(*, seconds: float = 1.0) -> None:
    """End this process when its parent has ended, except under nohup.

    Args:
        seconds: interval between checks.
    """
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
        return
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(seconds)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
