"""Heartbeats of a run's ranks: `heartbeat/rank-00000.json` in the run folder, readable on any host."""

from __future__ import annotations

import socket
import time
from dataclasses import dataclass
from pathlib import Path

from mm_moslora.utils.untrusted_data import parse_object
from mm_moslora.utils.untrusted_files import read_text_below

FOLDER = "heartbeat"
FAILED = "failed: "
"""Prefix of the phase of a rank that failed; the kind of error and its message follow."""
ENDED = "ended"
FAILING = "failing"
"""Phase of a rank that has an error of its own, and sends it to its trackers before it ends."""
_LOST = ("Connection", "gloo", "NCCL", "Timed out", "timed out", "peer", "DistributedError", "DistNetworkError")


def means_lost(text: str) -> bool:
    """Whether an error only reports the loss of another rank."""
    return any(part in text for part in _LOST)


@dataclass(frozen=True, kw_only=True)
class Heartbeat:
    """The last heartbeat of a rank."""

    rank: int
    host: str
    pid: int
    step: int
    phase: str
    """Its current phase, or `failed: ...`, or `ended`."""
    age: float
    """Seconds since the heartbeat."""
    written: float = 0.0
    """Time of the heartbeat by the file system's clock."""
    started: int | None = None
    """Start of its process, see `process_start`; None: not known."""
    place: str = ""
    """Position of its main thread after it gave up; empty when it waits for other ranks there."""
    gave_up: bool = False
    """Whether its own watchdog has ended it, or is about to."""
    stood_still: float = 0.0
    """Seconds in its current phase during which the process did not run."""

    @property
    def who(self) -> str:
        """Rank, process and host, as messages name them."""
        return f"rank {self.rank} (process {self.pid} on {self.host})"

    @property
    def failure(self) -> str | None:
        """Kind and message of its own failure; None for an error that only reports the loss of another rank."""
        message = self.phase.removeprefix(FAILED)
        return None if message == self.phase or means_lost(message) else message

    @property
    def is_over(self) -> bool:
        """Whether it recorded its end."""
        return self.gave_up or self.phase == ENDED or self.phase.startswith(FAILED)

    def is_here(self) -> bool:
        """Whether its process can be checked on this machine."""
        return self.host == socket.gethostname() and Path("/proc/self/stat").exists()

    def is_dead(self) -> bool:
        """Whether its process is known to have ended; only processes of this machine can be checked."""
        return self.is_here() and not is_running(self.pid, started=self.started)


def process_start(pid: int) -> int | None:
    """Start of a process of this machine, in ticks since the boot, which no set clock changes; None: it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        return None if fields[0] in "ZX" else int(fields[19])
    except (OSError, IndexError, ValueError):
        return None


def is_running(pid: int, *, started: int | None = None) -> bool:
    """Whether a process runs on this machine; `started`: its `process_start`, since ids are reused; None: any."""
    start = process_start(pid)
    return start is not None and started in (None, start)


def read_heartbeats(folder: Path, *, now: float | None = None, name: str = "rank-*.json") -> list[Heartbeat]:
    """The last heartbeats, in order of rank; other files are skipped. `now` is by the file system's clock."""
    now = time.time() if now is None else now
    beats = []
    for path in sorted(folder.glob(name)):
        try:
            content = parse_object(read_text_below(folder, path.name) or "")
            written = path.stat().st_mtime
            beats.append(
                Heartbeat(
                    rank=int(content["rank"]), host=str(content["host"]), pid=int(content["pid"]),
                    step=int(content["step"]), phase=str(content["phase"]), place=str(content.get("place", "")),
                    gave_up=bool(content.get("gave_up")), stood_still=float(content.get("stood_still", 0.0)),
                    started=None if (started := content.get("started")) is None else int(started),
                    written=written, age=max(0.0, now - written),
                )
            )  # fmt: skip
        except (OSError, ValueError, TypeError, KeyError):
            continue
    return beats
