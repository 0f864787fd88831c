"""One log file per rank: everything that a rank and its libraries write, also outside Python."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from mm_moslora.launch.child_processes import PIPE, STOP_SIGNALS, start
from mm_moslora.utils.files import writing_in_place
from mm_moslora.utils.text_format import whole_number

LOG_FOLDER = "MM_MOSLORA_LOG_DIR"
"""Variable with the folder; `launch --log-dir` sets it for the ranks."""


def keep_rank_log(environment: Mapping[str, str]) -> None:
    """Write this process's output also to `rank-00003.log` in the folder of `MM_MOSLORA_LOG_DIR`, if that is set.

    A restarted rank appends to the file. `tee` outlives the rank, and signals that schedulers send to all processes
    are blocked in it, so no line is lost.
    """
    folder = environment.get(LOG_FOLDER)
    if not folder:
        return
    rank = whole_number(environment, "RANK", 0)
    path = Path(folder) / f"rank-{rank:05d}.log"
    path.parent.mkdir(parents=True, exist_ok=True)
    with writing_in_place(path, append=True) as file:
        now = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        file.write(f"--- {now}: rank {rank} on {socket.gethostname()}, process {os.getpid()}\n")
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
        number = stream.fileno()
        # A program inherits which signals are blocked, so no terminal or scheduler ends it before the rank.
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        try:
            tee = start(["tee", "-a", path], stdin=PIPE, stdout=number, start_new_session=True)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        assert tee.stdin is not None
        os.dup2(tee.stdin.fileno(), number)
        tee.stdin.close()
