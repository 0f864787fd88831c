"""Watching over the ranks: who is where, who has died, who hangs; stacks of everybody, and an end instead of a wait.

Every rank keeps a small file up to date in the run folder, `heartbeat/rank-00000.json`. When a phase takes longer than
its limit, each rank writes its stacks, reads the others' files, says which rank is behind, silent or dead, and ends the
process, so that the launcher can restart the run.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from mm_moslora import distributed
from mm_moslora.files import discard, replacing

logger = logging.getLogger(__name__)

EXIT_HANG = 70
"""Exit code of a rank that gave up waiting."""
_TORCHRUN_SECONDS = 30
"""How long torchrun may take to end when it is told to."""
_CULPRIT_SECONDS = 4.0  # a rank that fails needs a moment to say so


@dataclass(frozen=True, kw_only=True)
class Beat:
    """What a rank said of itself last."""

    rank: int
    host: str
    pid: int
    step: int
    phase: str
    """What it is doing, or `failed: ...`, or `ended`."""
    age: float
    """Seconds since it said so, by the file system's clock."""
    place: str = ""
    """Where its main thread is, once it has given up; empty when it waits for other ranks there."""
    gave_up: bool = False
    """Whether its own watchdog has ended it, or is about to."""

    @property
    def who(self) -> str:
        """For messages."""
        return f"rank {self.rank} (process {self.pid} on {self.host})"

    def is_dead(self) -> bool:
        """Whether its process is known to be gone; only this machine's processes can be known."""
        if self.host != socket.gethostname() or not Path("/proc/self/stat").exists():
            return False
        try:
            state = Path(f"/proc/{self.pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
        except (OSError, IndexError):
            return True
        return state in "ZX"


class Watchdog:
    """Watches one rank for the length of a `with` block.

    Args:
        folder: the run folder.
    """

    def __init__(self, folder: Path) -> None:
        self.beats, self.stacks = folder / "heartbeat", folder / "stacks"
        self.interval = 1.0
        self._phase, self._step, self._limit, self._since = "start", 0, float("inf"), time.monotonic()
        self._place, self._gave_up = "", False
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        if distributed.is_main():
            for beat in self.beats.glob("rank-*.json"):  # of an earlier start
                discard(beat)
        distributed.barrier()
        self.beats.mkdir(parents=True, exist_ok=True)
        self.stacks.mkdir(parents=True, exist_ok=True)
        self._stacks_path = self.stacks / f"rank-{distributed.rank():05d}.txt"
        self._stacks_file = self._stacks_path.open("w", encoding="utf-8")
        # The thread that the signal reaches, the main one, and not all: a handler holds no lock, and reading the frames
        # of threads that run crashes some processes.
        faulthandler.register(signal.SIGUSR2, file=self._stacks_file, all_threads=False)
        self._say()
        distributed.barrier()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        faulthandler.cancel_dump_traceback_later()
        self._thread.join()
        faulthandler.unregister(signal.SIGUSR2)
        with contextlib.suppress(OSError):
            self._stacks_file.close()
            if self._stacks_path.stat().st_size == 0:
                discard(self._stacks_path)
        self._phase = "ended" if error is None else f"failed: {kind.__name__ if kind else ''}: {error}"[:500]
        self._say()

    def phase(self, what: str, step: int, limit_seconds: float) -> None:
        """Say what comes next, and how long it may take.

        Args:
            what: a word or two.
            step: optimiser steps done.
            limit_seconds: after which this rank gives up.
        """
        with self._lock:
            self._phase, self._step, self._limit, self._since = what, step, limit_seconds, time.monotonic()
        # For a hang that keeps the interpreter's lock, when the thread below cannot run: stacks, then the end.
        if limit_seconds < 1e6:
            faulthandler.dump_traceback_later(limit_seconds + 30, exit=True, file=self._stacks_file)

    def _watch(self) -> None:
        while not self._stop.wait(self.interval):
            self._say()
            if time.monotonic() - self._since > self._limit:
                self._give_up()

    def _say(self) -> None:
        """Write this rank's file; a full disk is no reason to stop, and must not hide why the run ended."""
        with contextlib.suppress(OSError):
            self._write()

    def _write(self) -> None:
        path = self.beats / f"rank-{distributed.rank():05d}.json"
        content = {
            "rank": distributed.rank(), "host": socket.gethostname(), "pid": os.getpid(), "step": self._step,
            "phase": self._phase, "seconds_in_phase": round(time.monotonic() - self._since, 1),
            "place": self._place, "gave_up": self._gave_up,
        }  # fmt: skip
        with replacing(path) as temporary:  # of a name of its own: `verdict` may write beside the thread
            temporary.write_text(json.dumps(content), encoding="utf-8")

    def _give_up(self) -> None:
        faulthandler.dump_traceback(file=self._stacks_file, all_threads=True)
        self._stacks_file.flush()
        self._place, self._gave_up = _own_place(self._phase), True
        self._say()
        self._ask_for_stacks()
        time.sleep(2 * self.interval)  # the others reach their limits, too
        logger.error(
            "No progress for %.0f s at step %d (%s). %s Stacks: %s. The limits are train.step_timeout_minutes and "
            "train.timeout_minutes.",
            time.monotonic() - self._since, self._step, self._phase, self.verdict(), self.stacks,
        )  # fmt: skip
        sys.stderr.flush()
        _release_torchrun()
        os._exit(EXIT_HANG)

    def _ask_for_stacks(self) -> None:
        """Processes of this machine write their stacks when they get SIGUSR2, whatever they are stuck in."""
        for beat in self.read():
            if beat.host == socket.gethostname() and beat.pid != os.getpid() and not beat.is_dead():
                with contextlib.suppress(OSError):
                    os.kill(beat.pid, signal.SIGUSR2)

    def read(self) -> list[Beat]:
        """What all ranks said last. Ages are measured against this rank's own file: no clocks are compared."""
        own = self.beats / f"rank-{distributed.rank():05d}.json"
        self._say()
        found = []
        for path in sorted(self.beats.glob("rank-*.json")):
            try:
                content = json.loads(path.read_text(encoding="utf-8"))
                age = own.stat().st_mtime - path.stat().st_mtime
            except (OSError, ValueError):
                continue
            fields = {key: content[key] for key in ("rank", "host", "pid", "step", "phase", "place", "gave_up")}
            found.append(Beat(**fields, age=max(0.0, age)))
        return found

    def verdict(self) -> str:
        """Which ranks are to blame, as a sentence; waits a moment for ranks that are just failing."""
        deadline = time.monotonic() + _CULPRIT_SECONDS
        while True:
            beats = self.read()
            others = [beat for beat in beats if beat.rank != distributed.rank()]
            failed = [beat for beat in others if beat.phase.startswith("failed: ")]
            culprits = [beat for beat in failed if not _is_consequence(beat.phase)]
            left = [beat for beat in others if beat in failed or beat.gave_up or beat.phase == "ended"]
            dead = [beat for beat in others if beat.is_dead() and beat not in left]
            if culprits or dead or time.monotonic() > deadline:
                break
            time.sleep(0.2)
        parts = [f"{beat.who} died; last seen at step {beat.step} ({beat.phase})" for beat in dead]
        parts += [f"{beat.who} {beat.phase} at step {beat.step}" for beat in culprits]
        parts += [f"{beat.who} does not wait for others: it is in {beat.place}" for beat in beats if beat.place]
        if parts:
            return "; ".join(parts) + "."
        silent = [beat for beat in others if beat.age > 3 * self.interval and beat not in left]
        if silent:
            return "; ".join(
                f"{beat.who} is silent for {beat.age:.0f} s, last seen at step {beat.step} ({beat.phase}): it is "
                "stopped or its machine is gone"
                for beat in silent
            ) + "."  # fmt: skip
        first = max((beat.step for beat in beats), default=0)
        behind = [beat for beat in beats if beat.step < first] or (
            [beat for beat in others if beat.phase != self._phase] if self._phase == "step" else []
        )
        if behind:
            return "; ".join(f"{beat.who} is behind, at step {beat.step} ({beat.phase})" for beat in behind) + "."
        if len(beats) == 1:
            return "There is one rank only."
        return f"All {len(beats)} ranks answer and wait in the same place: suspect the network between their hosts."


def _release_torchrun() -> None:
    """Have torchrun end with its ranks when they run on several hosts and may not be restarted.

    Left alone on a host that is cut off, it waits for the others' store until TCP gives up, a quarter of an hour later.
    Told to end while it waits, it hears so minutes later; then a process that outlives this one kills it.
    """
    several = os.environ.get("GROUP_WORLD_SIZE", "1") != "1"
    restarts, allowed = (os.environ.get(f"TORCHELASTIC_{name}") for name in ("RESTART_COUNT", "MAX_RESTARTS"))
    if several and restarts is not None and restarts == allowed:
        torchrun = os.getppid()
        with contextlib.suppress(OSError):
            os.kill(torchrun, signal.SIGTERM)
            wait = f"for _ in $(seq {5 * _TORCHRUN_SECONDS}); do kill -0 {torchrun} || exit 0; sleep 0.2; done"
            nothing = subprocess.DEVNULL
            subprocess.Popen(
                ["sh", "-c", f"{wait}; kill -KILL {torchrun}"], start_new_session=True, stdin=nothing, stdout=nothing,
                stderr=nothing,
            )  # fmt: skip


def _own_place(phase: str) -> str:
    """Function and line that the main thread is in; empty when it waits for other ranks.

    On a GPU collectives are queued and the host goes on, to wait for its own device wherever it reads a value next: in
    a step, a place says nothing.
    """
    if phase == "step" and distributed.device().type == "cuda":
        return ""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    stack = traceback.extract_stack(frame)
    waits = ("torch/distributed/", "deepspeed/comm/", "mm_moslora/distributed.py")
    if not stack or any(part in entry.filename.replace(os.sep, "/") for entry in stack for part in waits):
        return ""
    return f"{stack[-1].name} ({Path(stack[-1].filename).name}:{stack[-1].lineno})"


def _is_consequence(phase: str) -> bool:
    """Whether a failure only says that another rank is gone."""
    return any(text in phase for text in ("DistributedError", "Connection closed", "Connection reset", "timed out"))
