"""The faults of `chaos.py`: how each is done, and what is promised to happen then."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import signal
import time
from collections import defaultdict
from pathlib import Path
from typing import Any, Protocol

from chaos_launch import Forked, Started

LIMIT = 90.0
"""Seconds within which something must happen: a step, or the end of all ranks that nobody holds up."""
IMPATIENT = {"step_timeout_minutes": 0.1, "timeout_minutes": 0.4}
"""Limits for faults that a watchdog has to end."""
WENT_ON, SAVED, ENDED, REFUSED = "went on", "saved and stopped", "ended", "refused until a checkpoint was restored"
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)

KINDS: dict[str, str] = {
    "SIGKILL of one rank": "kill_one",
    "SIGKILL of all ranks": "kill_all",
    "SIGSTOP of one rank for ever": "stop",
    "SIGSTOP and SIGCONT of one rank": "pause",
    "suspension of all ranks (SIGTSTP, SIGSTOP, SIGCONT)": "suspend",
    "SIGTERM, SIGINT, SIGUSR1 or SIGHUP": "ask",
    "flipped bit": "flip",
    "truncated file": "truncate",
    "disk full": "fill",
    "data that vanishes and returns": "vanish",
    "memory of one rank used up": "memory",
    "writes of one rank refused (RLIMIT_FSIZE)": "file size",
    "NaN in one rank's loss or gradient": "nan",
    "clock of one rank jumps by an hour": "clock",
}
OUTSIDE_ONLY = tuple(list(KINDS)[:10])
"""Those that need nothing inside of a rank."""


class Chain(Protocol):
    """The run that is hit."""

    rng: random.Random
    world: int
    """Number of ranks."""
    run: Path
    cache: Path
    disk: Path
    """The folder around the run."""
    parts: dict[str, Path]
    launched: bool
    """Whether `mm-moslora launch` starts it."""
    excused: set[int]
    """Steps whose line of metrics.jsonl was damaged."""

    def start(self, fault: dict[str, Any] | None = None, **train: Any) -> Started:
        """Give the same command again."""


class Trial:
    """One fault in a chain.

    Args:
        chain: the run that is hit.
        kind: one of `KINDS`.
        aim: the step from which on it comes, unless it comes earlier, while the run starts.
    """

    def __init__(self, chain: Chain, kind: str, *, aim: int) -> None:
        self.chain, self.kind, self.aim, self.rng = chain, kind, aim, chain.rng
        self.victim = self.rng.randrange(chain.world)
        self.size = self.rng.randrange(10**6)
        self.all = range(chain.world)
        self.moment, self.wrong, self.detail = "", "", ""

    def hit(self) -> dict[str, Any] | None:
        """Start the run, do the fault, see how the run takes it, and end it; None: the run was over before."""
        ended = getattr(self, "_" + KINDS[self.kind].replace(" ", "_"))()
        if ended is None:
            return None
        return {"ended": ended, "moment": self.moment, "detail": self.detail, "wrong": self.wrong}

    # How a fault comes, and how a run ends

    def _start(self, **train: Any) -> Started:
        return self.chain.start(**train)

    def _await_moment(self, started: Started) -> bool:
        """Wait for a random moment; False where the run is over before."""
        where = self.rng.choices(("start", "step", "save", "validation", "writing"), (3, 5, 2, 2, 2))[0]
        if where == "start":
            time.sleep(self.rng.random() * 2.5)
        else:
            run = self.chain.run
            after = max(self.aim, 0) + self.rng.randrange(3)
            writing = {"writing": lambda: any(run.glob(".tmp-checkpoint-*"))}.get(where)
            reached = writing or {"step": lambda: True}.get(where) or (lambda: started.phase() == where)
            started.wait_for(lambda: started.step() >= after, LIMIT)
            started.wait_for(reached, 3)
            time.sleep(self.rng.random() * (0.15 if where == "step" else 0.02))
        writing_now = " while a checkpoint is written" if any(self.chain.run.glob(".tmp-checkpoint-*")) else ""
        self.moment = f"{started.phase()}{writing_now}"
        if started.alive():
            return True
        codes = started.wait(30)
        if codes is None or any(codes):  # nothing was done to it yet
            self.wrong = f"ended before the fault: {codes} {started.said()[-1500:]}"
            return True
        return False

    def _goes_on(self, started: Started) -> bool:
        """Whether another step is taken, or the run finishes."""
        now = started.step()
        return started.wait_for(lambda: started.step() > now, LIMIT) or not started.alive()

    def _end(self, started: Started) -> None:
        """End a run that goes on."""
        if self.rng.random() < 0.6:
            started.ask(signal.SIGTERM, self.all)
        else:
            started.tell(signal.SIGKILL, self.all)
        if started.wait(LIMIT) is None:
            self.wrong = self.wrong or f"does not end when it is told to: {started.said()[-1500:]}"

    def _settle(self, started: Started, *, may_end: bool = True) -> str:
        """See whether a run goes on after a fault; one that neither steps nor ends is wrong."""
        on = self._goes_on(started)
        if started.alive() and not on:
            self.wrong = f"hangs: {started.said()[-1500:]}"
            started.tell(signal.SIGKILL, self.all)
        elif started.alive():
            self._end(started)
            return WENT_ON
        codes = started.wait(LIMIT)
        if codes is not None and not any(codes):
            return WENT_ON
        self.detail = f"{codes} {last_line(started.said())}"
        if not may_end:
            self.wrong = self.wrong or f"ended: {codes} {started.said()[-1500:]}"
        return ENDED

    def _must_end(self, started: Started) -> str:
        codes = started.wait(LIMIT)
        self.detail = f"{codes} {last_line(started.said())}"
        if codes is None:
            self.wrong = f"some ranks do not end: {started.said()[-1500:]}"
        elif not any(codes):
            self.wrong = "ended as if nothing had happened"
        return ENDED

    # From outside

    def _kill_one(self) -> str | None:
        return self._kill([self.victim])

    def _kill_all(self) -> str | None:
        return self._kill(list(self.all))

    def _kill(self, ranks: list[int]) -> str | None:
        started = self._start()
        if not self._await_moment(started):
            return None
        started.wait_for(lambda: bool(started.pids), LIMIT)
        met = started.met()
        started.tell(signal.SIGKILL, ranks)
        self._end_lone_ranks(started, met=met)
        return self._must_end(started)

    def _end_lone_ranks(self, started: Started, *, met: bool) -> None:
        """End ranks that look for one that is gone before they met, as a launcher does; they cannot know it."""
        if not met and not wait_until(lambda: not started.alive(), 20):
            started.tell(signal.SIGKILL, self.all)

    def _stop(self) -> str | None:
        """The others end by their watchdog, name the rank, and it is killed, or woken and ends by itself."""
        started = self._start(**IMPATIENT)
        if not self._await_moment(started):
            return None
        started.wait_for(lambda: bool(started.pids), LIMIT)
        pids, trains = started.pids, started.step() >= 0
        started.tell(signal.SIGSTOP, [self.victim])
        others = [pid for rank, pid in enumerate(pids) if rank != self.victim]
        if not wait_until(lambda: not any(map(is_running, others)), LIMIT):
            self.wrong = f"ranks wait for the stopped one for ever: {started.said()[-1500:]}"
        with contextlib.suppress(OSError, ValueError):
            state = json.loads((self.chain.run / "state.json").read_text())
            if trains and (state["state"], state.get("ranks")) != ("failed", [self.victim]):
                self.wrong = self.wrong or f"rank {self.victim} is not blamed: {state}"
        started.tell(self.rng.choice((signal.SIGKILL, signal.SIGCONT)), [self.victim])
        return self._must_end(started)

    def _pause(self) -> str | None:
        started = self._start()
        if not self._await_moment(started):
            return None
        started.wait_for(lambda: bool(started.pids), LIMIT)
        started.tell(signal.SIGSTOP, [self.victim])
        time.sleep(self.rng.random() * 4)
        started.tell(signal.SIGCONT, [self.victim])
        return self._settle(started, may_end=False)

    def _suspend(self) -> str | None:
        """As `scontrol suspend` and `resume` do; for up to twice the limit of a step."""
        started = self._start(step_timeout_minutes=0.1)
        if not self._await_moment(started):
            return None
        started.wait_for(lambda: bool(started.pids), LIMIT)
        started.tell(signal.SIGTSTP, self.all)
        time.sleep(0.2)
        started.tell(signal.SIGSTOP, self.all)
        time.sleep(self.rng.choice((1.0, 12.0)))
        started.tell(signal.SIGCONT, self.all)
        return self._settle(started, may_end=False)

    def _ask(self) -> str | None:
        number = self.rng.choice(STOP_SIGNALS)
        started = self._start()
        if not self._await_moment(started):
            return None
        started.wait_for(lambda: bool(started.pids), LIMIT)
        trains, met = started.step() >= 0, started.met()
        ranks = self.rng.choice(([self.victim], list(self.all)))
        self.detail = f"{number.name} to {ranks}"
        started.ask(number, ranks)
        self._end_lone_ranks(started, met=met)
        codes = started.wait(LIMIT)
        saved = codes == [75] if self.chain.launched else codes == [0] * self.chain.world
        if codes is None or (trains and not saved):
            self.wrong = f"{number.name} to {ranks}: {codes} {started.said()[-1500:]}"
        return SAVED if saved else ENDED

    def _flip(self) -> str | None:
        return self._damage(flip=True)

    def _truncate(self) -> str | None:
        return self._damage(flip=False)

    def _damage(self, *, flip: bool) -> str | None:
        """Of a file of the run or of its caches, while it runs or between two starts; then the run goes on."""
        if live := self.rng.random() < 0.4 or not self.chain.run.exists():
            started = self._start()
            if not self._await_moment(started):
                return None
            # A file that a rank has mapped into its memory must not be cut: the system ends the rank (SIGBUS).
            self._spoil(flip=flip, roots=[self.chain.run])
            self._settle(started, may_end=False)
        else:
            self.moment = "between two starts"
            self._spoil(flip=flip, roots=[self.chain.run, self.chain.cache])
        spoiled, self.detail = self.spoiled, f"{'live ' if live else ''}{self.detail}"
        started = self._start()
        if started.wait_for(lambda: started.step() >= 0, LIMIT) and self._goes_on(started) and started.alive():
            self._end(started)
            return WENT_ON
        codes = started.wait(LIMIT)
        if codes is not None and not any(codes):
            return WENT_ON
        said = started.said()
        if "checkpoints in" in said and "damaged" in said and spoiled is not None:
            path, content = spoiled
            path.write_bytes(content)
            return REFUSED
        self.wrong = f"refused after {self.detail}: {codes} {said[-2000:]}"
        return REFUSED

    def _spoil(self, *, flip: bool, roots: list[Path]) -> None:
        """One bit, or the end, of a file of a random sort."""
        self.spoiled: tuple[Path, bytes] | None = None
        sorts: dict[str, list[Path]] = defaultdict(list)
        for root in roots:
            for path in root.rglob("*"):
                with contextlib.suppress(OSError):
                    if path.is_file() and not path.is_symlink() and path.stat().st_size:
                        sorts[sort_of(path, root)].append(path)
        if not sorts:
            return
        path = self.rng.choice(sorted(sorts[self.rng.choice(sorted(sorts))]))
        with contextlib.suppress(OSError):
            content = path.read_bytes()
            offset = self.rng.randrange(len(content))
            self.spoiled = path, content
            with path.open("r+b") as stream:
                if flip:
                    stream.seek(offset)
                    stream.write(bytes([content[offset] ^ 1 << self.rng.randrange(8)]))
                else:
                    stream.truncate(offset)
            if path.name == "metrics.jsonl":
                self._excuse(content, offset, flip=flip)
            self.detail = sort_of(path, next(root for root in roots if root in path.parents))

    def _excuse(self, content: bytes, offset: int, *, flip: bool) -> None:
        """Steps whose lines a flipped bit touches, or that a cut removes: their records are lost."""
        start = content.rfind(b"\n", 0, offset) + 1
        end = content.find(b"\n", offset + 1) if flip else len(content)
        if flip and content[offset : offset + 1] == b"\n":
            start = content.rfind(b"\n", 0, max(0, offset)) + 1
        lost = content[start : len(content) if end < 0 else end]
        self.chain.excused |= {int(step) for step in re.findall(rb'"step": (\d+)', lost)}

    def _fill(self) -> str | None:
        """The small disk of the run, for a while."""
        started = self._start()
        if not self._await_moment(started):
            return None
        ballast = self.chain.disk / "ballast"
        with ballast.open("wb", buffering=0) as stream, contextlib.suppress(OSError):
            while True:
                stream.write(bytes(1 << 12))
        left = self.rng.choice((0, 0, 1 << 12, 1 << 15, 1 << 18))
        os.truncate(ballast, max(0, ballast.stat().st_size - left))
        deadline = time.monotonic() + self.rng.uniform(0.3, 5)
        while time.monotonic() < deadline and started.alive():
            time.sleep(0.02)
        ballast.unlink()
        self.detail = f"{left} bytes free"
        return self._settle(started)

    def _vanish(self) -> str | None:
        """A picture, all pictures, the records, the held-out records, or a model: gone for a while."""
        parts = self.chain.parts
        picture = self.rng.choice(sorted(parts["images"].iterdir()))
        path = self.rng.choice(
            (picture, picture, parts["images"], parts["records"], parts["held_out"], parts["vision"])
        )
        away = path.with_name(f"{path.name}.away")
        before = self.rng.random() < 0.2
        if before:
            path.rename(away)
        started = self._start()
        if not before:
            if not self._await_moment(started):
                return None
            path.rename(away)
        self.moment = self.moment or "before the start"
        deadline = time.monotonic() + self.rng.uniform(0.5, 4)
        while time.monotonic() < deadline and started.alive():
            time.sleep(0.02)
        away.rename(path)
        self.detail = path.name
        told, self.detail = self.detail, ""
        ended = self._settle(started)
        self.detail = f"{told} {self.detail}"
        return ended

    # Inside of a rank

    def _inside(self, *, early: bool = True, **train: Any) -> Started | None:
        """Start a run with a fault inside, and wait until it has come."""
        start = early and self.rng.random() < 0.25
        step = -1 if start else self.aim + self.rng.randrange(3)
        fault = {
            "name": KINDS[self.kind], "rank": self.victim, "step": step, "size": self.size,
            "seconds": self.rng.random() * (3 if start else 0.3),
        }  # fmt: skip
        started = self.chain.start(fault, **train)
        assert isinstance(started, Forked)
        if not started.wait_for(started.was_hit, LIMIT) and (codes := started.wait(30)) != [0] * self.chain.world:
            self.wrong = f"ended before the fault: {codes} {started.said()[-1500:]}"
        self.moment = started.phase()
        return started if started.was_hit() or self.wrong else None

    def _memory(self) -> str | None:
        started = self._inside()
        return None if started is None else self._settle(started)

    def _file_size(self) -> str | None:
        started = self._inside()
        return None if started is None else self._settle(started)

    def _clock(self) -> str | None:
        started = self._inside()
        if started is None:
            return None
        time.sleep(self.rng.random() * 2)
        return self._settle(started, may_end=False)

    def _nan(self) -> str | None:
        """The step is skipped everywhere. The run is killed before it saves, since a skipped step is none of the
        undisturbed run."""
        started = self._inside(early=False, save_every=0, validate_every=0)
        if started is None:
            return None
        skipped = started.wait_for(lambda: skipped_steps(self.chain.run) > 0, 30)
        if self.size % 3 == 0:
            ended = self._must_end(started)
            if "DivergedError" not in started.said():
                self.wrong = self.wrong or f"did not end as diverged: {self.detail}"
            return ended
        started.tell(signal.SIGKILL, self.all)
        started.wait(LIMIT)
        if not skipped:
            self.wrong = self.wrong or f"no step was skipped: {started.said()[-1500:]}"
        return WENT_ON


def skipped_steps(run: Path) -> int:
    """Steps that were skipped, by the last record of a run."""
    with contextlib.suppress(OSError):
        return int(([0, *re.findall(r'"skipped_steps": (\d+)', (run / "metrics.jsonl").read_text())])[-1])
    return 0


def sort_of(path: Path, root: Path) -> str:
    """The name of a file without numbers and hashes; files of one kind have the same."""
    name = path.relative_to(root).as_posix()
    name = re.sub(r"events\.out\..*", "events.out", name)
    return re.sub(r"[0-9a-f]{12,}", "HASH", re.sub(r"checkpoint-\d+", "checkpoint", name)).replace("HASH/HASH/", "")


def wait_until(condition: Any, limit: float) -> bool:
    """Whether something happens within a limit."""
    deadline = time.monotonic() + limit
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def is_running(pid: int) -> bool:
    """Whether a process has not ended."""
    return Path(f"/proc/{pid}/exe").exists()


def last_line(text: str) -> str:
    """The last line that says something."""
    lines = [line for line in text.splitlines() if "Error" in line] or text.splitlines() or [""]
    return lines[-1][:200]


if __name__ == "__main__":
    print(f"{__doc__}\nA part of chaos.py; there is nothing to run.")
