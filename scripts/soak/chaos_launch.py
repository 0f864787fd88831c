"""The two ways in which `chaos.py` starts a run: forked ranks that have imported everything, and the launcher."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from parts import Ranks

QUIET = {"name": "none", "rank": -1, "step": 0, "seconds": 0.0, "size": 0}


class Started:
    """A run that was started."""

    def __init__(self, run: Path, world: int) -> None:
        self.run, self.world = run, world
        self.since = time.time()

    @property
    def pids(self) -> list[int]:
        """Processes of the ranks, as far as they are known."""
        raise NotImplementedError

    def step(self) -> int:
        """Steps done, -1 before training."""
        raise NotImplementedError

    def phase(self) -> str:
        """What rank 0 is doing."""
        raise NotImplementedError

    def _beats(self) -> list[dict[str, Any]]:
        """What all ranks of this start said last; empty until each has said something."""
        found = []
        for rank in range(self.world):
            path = self.run / "heartbeat" / f"rank-{rank:05d}.json"
            with contextlib.suppress(OSError, ValueError):
                if path.stat().st_mtime >= self.since:
                    found.append(json.loads(path.read_text()))
        return found if len(found) == self.world else []

    def met(self) -> bool:
        """Whether all ranks have found each other."""
        return bool(self._beats())

    def alive(self) -> bool:
        """Whether any of its processes runs."""
        return any(running(pid) for pid in self.pids)

    def tell(self, number: int, ranks: Sequence[int]) -> None:
        """Send a signal to some ranks."""
        pids = self.pids
        for rank in ranks:
            if rank < len(pids):
                send(pids[rank], number)

    def ask(self, number: int, ranks: Sequence[int]) -> None:
        """Send a signal that asks for an end, to whom a scheduler sends it."""
        self.tell(number, ranks)

    def wait(self, limit: float) -> list[int] | None:
        """Exit codes of all processes, None where one still runs at the limit; it is killed then."""
        raise NotImplementedError

    def said(self) -> str:
        """Its output."""
        raise NotImplementedError

    def wait_for(self, condition: Callable[[], bool], limit: float) -> bool:
        """Whether something happens before the run ends and within a limit."""
        deadline = time.monotonic() + limit
        while time.monotonic() < deadline:
            if condition():
                return True
            if not self.alive():
                return condition()
            time.sleep(0.003)
        return False


class Forked(Started):
    """Ranks that are forked from a process that has imported all."""

    def __init__(
        self, ranks: Ranks, recipe: Path, run: Path, *, notes: Path, world: int, fault: dict[str, Any] | None
    ) -> None:
        super().__init__(run, world)
        self.ranks, self.notes = ranks, notes
        told = QUIET | (fault or {}) | {"notes": str(notes)}
        self.group = ranks.start(["chaos_ranks:train", json.dumps(told), str(recipe)], ranks=world)

    @property
    def pids(self) -> list[int]:
        """See `Started`."""
        return self.group.pids

    def _note(self) -> tuple[int, str]:
        with contextlib.suppress(OSError, ValueError):
            step, _, phase = Path(f"{self.notes}.0").read_text().partition(" ")
            return int(step), phase.strip()
        return -1, "start"

    def step(self) -> int:
        """See `Started`."""
        return self._note()[0]

    def phase(self) -> str:
        """See `Started`."""
        return self._note()[1]

    def was_hit(self) -> bool:
        """Whether the fault inside has come."""
        return Path(f"{self.notes}.hit").exists()

    def wait(self, limit: float) -> list[int] | None:
        """See `Started`."""
        try:
            return self.ranks.finish(self.group, limit=limit).codes
        except AssertionError:
            return None

    def said(self) -> str:
        """See `Started`."""
        return self.group.outputs


class Launched(Started):
    """A run under `mm-moslora launch`."""

    def __init__(self, python: Path, recipe: Path, run: Path, *, log: Path, world: int) -> None:
        super().__init__(run, world)
        self.log = log
        environment = os.environ | {"NPROC": str(world), "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "20"}
        words = [str(python), "-m", "mm_moslora", "launch", str(recipe)]
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                words, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )

    @property
    def pids(self) -> list[int]:
        """See `Started`."""
        return [int(beat["pid"]) for beat in self._beats()]

    def alive(self) -> bool:
        """See `Started`."""
        return self.process.poll() is None

    def step(self) -> int:
        """See `Started`."""
        beats = self._beats()
        return int(beats[0]["step"]) if beats and not beats[0]["phase"].startswith(("start", "fail")) else -1

    def phase(self) -> str:
        """See `Started`."""
        beats = self._beats()
        return str(beats[0]["phase"]).partition(":")[0] if beats else "start"

    def ask(self, number: int, ranks: Sequence[int]) -> None:
        """To the launcher."""
        send(self.process.pid, number)

    def wait(self, limit: float) -> list[int] | None:
        """See `Started`; the code of the launcher."""
        pids = self.pids
        try:
            return [self.process.wait(timeout=limit)]
        except subprocess.TimeoutExpired:
            for pid in pids:
                send(pid, signal.SIGKILL)
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            return None

    def said(self) -> str:
        """See `Started`."""
        return self.log.read_text(errors="replace")


def send(pid: int, number: int) -> None:
    """Send a signal to a process, if it is there."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def running(pid: int) -> bool:
    """Whether a process has not ended."""
    return Path(f"/proc/{pid}/exe").exists()


if __name__ == "__main__":
    print(f"{__doc__}\nA part of chaos.py; there is nothing to run.")
