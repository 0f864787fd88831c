"""What the processes of the pool's test do; a module of its own, so that they import next to nothing."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from mm_moslora.compare.pool import Slot


def work(item: str, slot: Slot) -> None:
    """Die by signal 9 when told so, else leave a word."""
    if item == "dies":
        os.kill(os.getpid(), signal.SIGKILL)
    Path(item).write_text("lived")
