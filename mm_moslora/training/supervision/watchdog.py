"""Watchdog over the ranks: positions, deaths and hangs. It writes stacks, names who is to blame and ends the run."""

from __future__ import annotations

import contextlib
import faulthandler
import json
import logging
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import torch

from mm_moslora.launch import heartbeat
from mm_moslora.launch.child_processes import start
from mm_moslora.launch.heartbeat import Heartbeat, means_lost
from mm_moslora.training.supervision.run_folder import record_failure
from mm_moslora.utils import distributed
from mm_moslora.utils.errors import DistributedError, ExitStatus, MoSLoRAError, TrainingError
from mm_moslora.utils.files import discard, make_subfolder, replacing, writing_in_place
from mm_moslora.utils.redaction import redact_text

logger = logging.getLogger(__name__)

_TORCHRUN_SECONDS = 30
"""Seconds for torchrun to end after SIGTERM."""
_KILL_LATER = 'exec >&- 2>&-; for _ in $(seq "$2"); do kill -0 "$1" || exit 0; sleep 0.2; done; kill -KILL "$1"'
"""A script for sh; its arguments are a process id and a number of fifths of a second."""
_STANDSTILL = 10
"""Multiple of the heartbeat interval: a longer gap means that the process did not run."""
_CULPRIT_SECONDS = 4.0  # a failing rank needs a moment to write its heartbeat
_GONE_SECONDS = 5.0
"""Seconds that a rank may be gone, and between two readings of the other heartbeats. On gloo, ranks that wait for it
mostly fail by themselves, with a more specific error; on NCCL they would wait for the timeout of a collective."""


class Blame(NamedTuple):
    """One or more sentences, and the ranks to blame; none where they are not known."""

    text: str
    ranks: tuple[int, ...] = ()

    def __str__(self) -> str:
        return self.text


class Watchdog:
    """Watches one rank inside a `with` block; its files are in the run folder."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.beats, self.stacks = folder, folder / heartbeat.FOLDER, folder / "stacks"
        self.interval = 1.0
        self._phase, self._step, self._limit, self._since = "start", 0, float("inf"), time.monotonic()
        self._place, self._gave_up, self._stood_still, self._ran = "", False, 0.0, time.monotonic()
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        try:
            self._enter()
        except BaseException:
            self._stop.set()
            raise
        return self

    def _enter(self) -> None:
        if distributed.is_main():
            make_subfolder(self.beats)
            for beat in self.beats.glob("rank-*.json"):  # of an earlier start
                discard(beat)
            self._begin()  # before waiting for the others, so that readers see an active run
        distributed.barrier()
        make_subfolder(self.beats)
        make_subfolder(self.stacks)
        self._stacks_path = self.stacks / f"rank-{distributed.rank():05d}.txt"
        self._stacks_file = writing_in_place(self._stacks_path)
        # Only the stack of the main thread is written, which receives the signal: a handler holds no lock, and reading
        # the frames of running threads crashes some processes.
        faulthandler.register(signal.SIGUSR2, file=self._stacks_file, all_threads=False)
        if not distributed.is_main():
            self._begin()
        distributed.barrier()

    def _begin(self) -> None:
        self._ran = time.monotonic()
        self._say()
        self._thread.start()

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
        self._phase = heartbeat.ENDED
        if error is not None:
            reason = redact_text(f"{kind.__name__ if kind else ''}: {error}")
            self._phase = f"{heartbeat.FAILED}{reason}"[:500]
        self._say()

    def phase(self, what: str, step: int, limit_seconds: float) -> None:
        """Set the next phase, in one or two words, and the time after which this rank gives up."""
        with self._lock:
            self._phase, self._step, self._limit, self._since = what, step, limit_seconds, time.monotonic()
            if what != heartbeat.FAILING:  # the error may come from the standstill
                self._stood_still = 0.0
        # For a hang that holds the GIL, when the watchdog thread cannot run: write stacks, then exit.
        if limit_seconds < 1e6:
            faulthandler.dump_traceback_later(limit_seconds + 30, exit=True, file=self._stacks_file)

    def _watch(self) -> None:
        looked = time.monotonic()
        while not self._stop.wait(self.interval):
            self._note_standstill()
            self._say()
            with self._lock:
                waited, limit = time.monotonic() - self._since, self._limit
            if waited > limit:
                self._give_up(
                    f"No progress for {waited:.0f} s at step {self._step} ({self._phase}).",
                    hint=" The limits are train.step_timeout_minutes and train.timeout_minutes.",
                )
            elif self._phase != heartbeat.FAILING and time.monotonic() - looked > _GONE_SECONDS:
                looked = time.monotonic()
                if self._misses_a_rank():
                    self._give_up("The other ranks cannot be reached.")

    def _misses_a_rank(self) -> bool:
        """Whether another rank has been gone for a while: rank 0 checks all, the others check rank 0."""
        # A rank that waits for another's address in a new group would wait for the timeout of a collective.
        beats = self.read() if distributed.is_main() else self.read(name="rank-00000.json")
        return any(
            beat.age > _GONE_SECONDS
            and (beat.failure is not None or beat.gave_up or (beat.is_dead() and not beat.is_over))
            for beat in beats
            if beat.rank != distributed.rank()
        )

    def _say(self) -> None:
        """Write this rank's file. A full disk must neither stop the run nor hide why it ended."""
        with contextlib.suppress(OSError):
            self._write()

    def _note_standstill(self) -> None:
        """Discount time in which this process did not run, because it was stopped or the machine slept."""
        with self._lock:
            now = time.monotonic()
            gap, self._ran = now - self._ran, now
            if gap > _STANDSTILL * self.interval:
                self._stood_still += gap
                self._since += gap

    def _write(self) -> None:
        path = self.beats / f"rank-{distributed.rank():05d}.json"
        content = {
            "rank": distributed.rank(), "host": socket.gethostname(), "pid": os.getpid(),
            "started": heartbeat.process_start(os.getpid()), "step": self._step, "phase": self._phase,
            "seconds_in_phase": round(time.monotonic() - self._since, 1),
            "place": self._place, "gave_up": self._gave_up, "stood_still": round(self._stood_still, 1),
        }  # fmt: skip
        with replacing(path) as temporary:  # under a unique name: `verdict` may write at the same time as the thread
            temporary.write_text(json.dumps(content), encoding="utf-8")

    def _give_up(self, why: str, *, hint: str = "") -> None:
        faulthandler.dump_traceback(file=self._stacks_file, all_threads=True)
        self._stacks_file.flush()
        self._place, self._gave_up = _blocking_line(self._phase), True
        self._say()
        self._ask_for_stacks()
        time.sleep(2 * self.interval)  # time for the others to reach their limits
        blame = self.verdict()
        record_failure(self.folder, f"{why} {blame}", ranks=blame.ranks)
        logger.error("%s %s Stacks: %s.%s", why, blame, self.stacks, hint)
        sys.stderr.flush()
        release_torchrun()
        os._exit(ExitStatus.HANG)

    def _ask_for_stacks(self) -> None:
        """Send SIGUSR2 to the ranks of this machine; their handlers write stacks even during a hang."""
        # Its default action ends a process, and anybody may have written the files: only siblings that handle it get
        # it.
        for beat in self.read():
            if beat.pid != os.getpid() and beat.rank < distributed.world_size() and _is_sibling(beat):
                with contextlib.suppress(OSError):
                    os.kill(beat.pid, signal.SIGUSR2)

    def read(self, *, name: str = "rank-*.json") -> list[Heartbeat]:
        """The ranks' last heartbeats. Ages are relative to this rank's own file, so clocks need not agree."""
        own = self.beats / f"rank-{distributed.rank():05d}.json"
        self._say()
        try:
            now = own.stat().st_mtime
        except OSError:
            return []
        return heartbeat.read_heartbeats(self.beats, now=now, name=name)

    def verdict(self) -> Blame:
        """The ranks to blame; waits a moment for ranks that are about to fail."""
        if self._thread.ident is None:  # the files in the folder are of an earlier start
            return _without_heartbeat(set(range(distributed.world_size())) - {distributed.rank()})
        self._note_standstill()
        deadline = time.monotonic() + _CULPRIT_SECONDS
        while True:
            beats = self.read()
            others = [beat for beat in beats if beat.rank != distributed.rank()]
            dead = [beat for beat in others if not beat.is_over and beat.is_dead()]
            if dead or any(beat.failure for beat in others) or time.monotonic() > deadline:
                break
            time.sleep(0.2)
        blame = [(beat, f"{beat.who} died; last seen at step {beat.step} ({beat.phase})") for beat in dead]
        blame += [(beat, f"{beat.who} {beat.phase} at step {beat.step}") for beat in others if beat.failure]
        blame += [(beat, f"{beat.who} does not wait for others: it is in {beat.place}") for beat in beats if beat.place]
        blame += [
            (beat, f"{beat.who} did not run for {beat.stood_still:.0f} s: it was stopped, or its machine slept")
            for beat in beats if beat.stood_still
        ]  # fmt: skip
        blame = blame or self._behind(beats, others)
        if blame:
            text = "; ".join(text for _, text in blame)
            return Blame(text=f"{text}.", ranks=tuple(dict.fromkeys(beat.rank for beat, _ in blame)))
        if missing := set(range(distributed.world_size())) - {beat.rank for beat in beats}:
            return _without_heartbeat(missing)
        if len(beats) == 1:
            return Blame(text="There is one rank only.")
        return Blame(
            text=f"All {len(beats)} ranks answer and wait in the same place: suspect the network between their hosts."
        )

    @contextmanager
    def blaming(self) -> Iterator[None]:
        """Turn the failure of a collective after the loss of a rank or of a data worker into an error that names it."""
        try:
            yield
        except RuntimeError as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            if reason.startswith("DataLoader worker"):
                raise TrainingError(
                    f"A process that prepares examples died ({reason}). The usual cause is too little memory or, in a "
                    "container, /dev/shm. Give more, lower data.workers, or set it to 0 for a thread. The same command "
                    "resumes from the last checkpoint."
                ) from error
            lost = isinstance(error, torch.distributed.DistError) or means_lost(str(error))
            if distributed.world_size() == 1 or isinstance(error, MoSLoRAError) or not lost:
                raise
            blame = self.verdict()
            raise DistributedError(
                f"The other ranks cannot be reached. {blame} ({reason[:200]})", ranks=blame.ranks
            ) from error

    def _behind(self, beats: list[Heartbeat], others: list[Heartbeat]) -> list[tuple[Heartbeat, str]]:
        """Ranks that are silent, behind the others, or have given up."""
        silent = [beat for beat in others if beat.age > 3 * self.interval and not beat.is_over]
        if silent:
            return [
                (beat, f"{beat.who} is silent for {beat.age:.0f} s, last seen at step {beat.step} ({beat.phase}): it "
                 "is stopped or its machine is gone")
                for beat in silent
            ]  # fmt: skip
        first = max((beat.step for beat in beats), default=0)
        behind = [beat for beat in beats if beat.step < first] or (
            [beat for beat in others if beat.phase != self._phase] if self._phase == "step" else []
        )
        return [(beat, f"{beat.who} is behind, at step {beat.step} ({beat.phase})") for beat in behind]


def _without_heartbeat(missing: set[int]) -> Blame:
    """Ranks without a heartbeat; at least one of them is to blame."""
    names = ", ".join(f"rank {rank}" for rank in sorted(missing)[:8])
    text = f"No heartbeat came from {names}{', ...' if len(missing) > 8 else ''}: see the output there."
    return Blame(text=text, ranks=tuple(missing) if len(missing) == 1 else ())


def release_torchrun() -> None:
    """Make torchrun end with its ranks when they run on several hosts and no restart is left."""
    # On a host that is cut off, torchrun would wait for the rendezvous store until TCP times out after 15 minutes.
    # While it waits, it handles SIGTERM minutes late, so a process that outlives this one kills it.
    several = os.environ.get("GROUP_WORLD_SIZE", "1") != "1"
    restarts, allowed = (os.environ.get(f"TORCHELASTIC_{name}") for name in ("RESTART_COUNT", "MAX_RESTARTS"))
    if several and restarts is not None and restarts == allowed:
        torchrun = os.getppid()
        with contextlib.suppress(OSError):
            os.kill(torchrun, signal.SIGTERM)
            start(["sh", "-c", _KILL_LATER, "sh", str(torchrun), str(5 * _TORCHRUN_SECONDS)], start_new_session=True)


def _is_sibling(beat: Heartbeat) -> bool:
    """Whether a process of this machine has this one's parent, and handles SIGUSR2."""
    try:
        lines = Path(f"/proc/{beat.pid}/status").read_text(encoding="utf-8").splitlines()
        status = dict(line.split(":", 1) for line in lines)
        handled = int(status["SigCgt"], 16) >> (signal.SIGUSR2 - 1) & 1
        return beat.is_here() and bool(handled) and int(status["PPid"]) == os.getppid()
    except (OSError, ValueError, KeyError):
        return False


def _blocking_line(phase: str) -> str:
    """Function and line of the main thread; empty when it waits for other ranks."""
    # On a GPU the host waits where it reads a value, so its line in a step tells nothing; nor does one in autograd's
    # own code, where torch's data-parallel wrapper waits.
    if phase == "step" and distributed.device().type == "cuda":
        return ""
    stack = traceback.extract_stack(sys._current_frames().get(threading.main_thread().ident or 0))
    waits = ("torch/distributed/", "deepspeed/comm/", "mm_moslora/utils/distributed.py")
    if not stack or stack[-1].filename.endswith("torch/autograd/graph.py"):
        return ""
    if any(part in entry.filename.replace(os.sep, "/") for entry in stack for part in waits):
        return ""
    return f"{stack[-1].name} ({Path(stack[-1].filename).name}:{stack[-1].lineno})"
