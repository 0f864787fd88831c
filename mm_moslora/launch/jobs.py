"""Jobs: independent command lines, run as processes of this machine, on a Ray cluster, or as a SLURM array.

The command of a job, started by hand in the same folder, does the same: it begins where an earlier start ended, and it
does nothing where its output is there. So a job that runs twice, or is tried again on another machine, changes nothing.

`ProcessEngine` and `write_array` here and `ray_engine.py` run them; their results are the files that they write.
"""

from __future__ import annotations

import logging
import os
import re
import shlex
import signal
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Protocol

from mm_moslora.launch.child_processes import Child, kill_tree, python_words, start_tied, terminate
from mm_moslora.launch.topology import accelerators
from mm_moslora.utils.errors import ConfigError, ExitStatus
from mm_moslora.utils.files import replace_text, writing_in_place
from mm_moslora.utils.folder_marks import output_file

logger = logging.getLogger(__name__)

TRIES = 3
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
"""Sums depend on the number of threads, so jobs get what this process has."""
GRACE = 120.0
"""Seconds in which a job that is asked to end may save."""
_SAVED = (0, ExitStatus.STOPPED, 143, -signal.SIGTERM)
"""Exit codes of a job that was asked to end and has lost nothing: done, saved, or ended with all its work stored."""
_ASK_AGAIN, _PAUSE = 1.0, 0.1
"""Seconds between two calls of `jobs` and `stop`, and between two polls of processes."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """A command line with an output."""

    name: str
    """Unique among the jobs of a call."""
    command: tuple[str, ...]
    """What follows `python -m`: `("mm_moslora", "compare", ...)`."""
    log: Path
    """File to which its output is appended."""
    output: Path | None = None
    """File or folder that appears, whole, when the job is done; None: its exit code alone says so."""
    cards: int = 0
    """Accelerators that it has for itself."""
    cores: int = 1
    folder: Path = field(default_factory=Path.cwd)
    """Folder in which the command is started."""

    @property
    def words(self) -> list[str]:
        """The whole command."""
        return python_words("-m", *self.command)


class End(NamedTuple):
    """The end of a job's process."""

    job: Job
    code: int
    """Its exit code."""
    reason: str = ""
    """What else went wrong, such as a lost machine."""

    @property
    def problem(self) -> str:
        """Why the job is not done; empty where it is."""
        log = self.job.log
        if self.reason:
            return f"{self.reason}; see {log}"
        if self.code < 0:
            hint = "; signal 9 often means that the machine ran out of memory" if self.code == -9 else ""
            return f"the process was ended by signal {-self.code}{hint}; see {log}"
        if self.code:
            return f"the process ended with code {self.code}; see {log}"
        missing = self.job.output is not None and not self.job.output.exists()
        return f"the process ended without {self.job.output}; see {log}" if missing else ""


class JobEngine(Protocol):
    """Where jobs run."""

    @property
    def cards(self) -> int:
        """Accelerators in all."""

    def width(self, cards: int) -> int:
        """Jobs with so many cards each that run at the same time."""

    def takes(self, job: Job) -> bool:
        """Whether another job can be handed over now; ConfigError where it will never have the cards."""

    def start(self, job: Job) -> None:
        """Hand a job over."""

    def wait(self, seconds: float) -> list[End]:
        """Wait until jobs end, up to a time limit; returns those that did."""

    def stop(self) -> list[End]:
        """Ask the running jobs to save, wait for them, and drop the others; returns the ends of the former."""


def run_jobs(
    jobs: Callable[[], Iterable[Job]], engine: JobEngine, *, over: Callable[[Job, str], None],
    stop: Callable[[], bool] = lambda: False,
) -> dict[str, str]:  # fmt: skip
    """Run jobs to their end; returns, by name, why some of them failed `TRIES` times. The others go on.

    Args:
        jobs: those known so far; called again when some have ended, and every second.
        over: called with a job that is done or failed, and with the reason of a failure.
        stop: whether to end now; running jobs save, and the same call continues them.
    """
    tries: dict[str, int] = {}
    failed: dict[str, str] = {}
    waiting: list[Job] = []
    running = 0
    try:
        while not stop():
            new = [job for job in jobs() if job.name not in tries]
            tries |= {job.name: 0 for job in new}
            waiting += new
            unstarted: list[End] = []
            while waiting and engine.takes(waiting[0]):
                job = waiting.pop(0)
                running += 1
                try:
                    engine.start(job)
                except (OSError, ConfigError) as error:  # its log or its folder
                    unstarted.append(End(job, 1, f"it did not start: {error}"))
            if not running:
                break
            for end in unstarted or engine.wait(_ASK_AGAIN):
                running -= 1
                problem, name = end.problem, end.job.name
                if problem and stop():  # the signal may have ended the job, too
                    _warn_if_unsaved(end)
                    continue
                tries[name] += 1
                if problem and tries[name] < TRIES:
                    logger.warning("%s: %s. Attempt %d of %d follows.", name, problem, tries[name] + 1, TRIES)
                    waiting.insert(0, end.job)
                    continue
                failed |= {name: problem} if problem else {}
                over(end.job, problem)
    finally:
        for end in engine.stop():
            _warn_if_unsaved(end)
    return failed


def _warn_if_unsaved(end: End) -> None:
    if end.code not in _SAVED:
        why = f"killed, as after {GRACE:g} s" if end.code == -signal.SIGKILL else f"exit code {end.code}"
        logger.warning(
            "%s did not save when it was asked to (%s); see %s. The same command continues it from what it had saved "
            "before.", end.job.name, end.reason or why, end.job.log,
        )  # fmt: skip


def cards_per_job(wanted: int | None, engine: JobEngine, *, option: str) -> int:
    """Accelerators of each job: those asked for, else one where the engine has any."""
    if wanted is not None and wanted < 1:
        raise ConfigError(f"{option} is {wanted}, expected 1 or more.")
    if (wanted or 1) > max(1, engine.cards):
        raise ConfigError(f"{option} is {wanted}, but there are {engine.cards} accelerators. Give at most that many.")
    return (wanted or 1) if engine.cards else 0


class ProcessEngine:
    """Processes of this machine, `parallel` at the same time; None: as many as the accelerators allow, one on a CPU."""

    def __init__(self, *, parallel: int | None = None) -> None:
        if parallel is not None and parallel < 1:
            raise ConfigError(f"--parallel is {parallel}, expected 1 or more.")
        visible, count = os.environ.get("CUDA_VISIBLE_DEVICES", ""), accelerators()
        self._cards = visible.split(",")[:count] if visible else [str(index) for index in range(count)]
        self._parallel = parallel or max(1, len(self._cards))
        self._free = list(self._cards)
        self._busy: list[tuple[Job, Sequence[str], Child]] = []

    @property
    def cards(self) -> int:
        """Accelerators of this machine."""
        return len(self._cards)

    def width(self, cards: int) -> int:
        """Jobs with so many cards each that run at the same time."""
        return min(self._parallel, self.cards // cards) if cards else self._parallel

    def takes(self, job: Job) -> bool:
        """Whether another job can be handed over now; ConfigError where it will never have the cards."""
        if job.cards > self.cards:
            raise ConfigError(
                f"A job needs {job.cards} accelerators, but there are {self.cards} here. Give at most that many."
            )
        return len(self._busy) < self._parallel and job.cards <= len(self._free)

    def start(self, job: Job) -> None:
        """Start a job's process; it has its accelerators before it imports anything."""
        cards = self._free[: job.cards]
        self._busy.append((job, cards, start_process(job, {"CUDA_VISIBLE_DEVICES": ",".join(cards)} if cards else {})))
        self._free = self._free[job.cards :]

    def wait(self, seconds: float) -> list[End]:
        """Wait until processes end, up to a time limit; returns those that did."""
        deadline = time.monotonic() + seconds
        while not (over := [one for one in self._busy if one[2].poll() is not None]) and time.monotonic() < deadline:
            time.sleep(_PAUSE)
        self._busy = [one for one in self._busy if one not in over]
        self._free += [card for _, cards, _ in over for card in cards]
        return [End(job, close(child)) for job, _, child in over]

    def stop(self) -> list[End]:
        """Ask every job to save and exit; after `GRACE` seconds it is killed."""
        for _, _, child in self._busy:
            terminate(child.pid)
        deadline = time.monotonic() + GRACE
        ends: list[End] = []
        while self._busy and time.monotonic() < deadline:
            ends += self.wait(_PAUSE)
        for _, _, child in self._busy:
            kill_tree(child.pid)
        while self._busy:
            ends += self.wait(_PAUSE)
        return ends


def start_process(job: Job, changes: dict[str, str]) -> Child:
    """Start a job's process on this machine, which ends with this process; its log is created with its folder."""
    job.log.parent.mkdir(parents=True, exist_ok=True)
    with writing_in_place(job.log, append=True) as log:
        return start_tied(job.words, changes, stdout=log, stderr=log, cwd=job.folder)


def close(child: Child) -> int:
    """The exit code of a process that has ended."""
    if child.stdin is not None:
        with suppress(BrokenPipeError):
            child.stdin.close()
    return child.wait()


_HEAD = """\
#!/bin/bash
# {count} jobs of mm-moslora, one in each element. An element that runs twice changes nothing.
# What your cluster wants goes before the file: sbatch --partition=gpu --gpus-per-node=1 --time=8:00:00 FILE
#SBATCH --job-name=mm-moslora
#SBATCH --array=0-{last}
#SBATCH --nodes=1 --ntasks=1 --cpus-per-task={cores}
{cards}#SBATCH --output=/dev/null
#SBATCH --requeue
#SBATCH --signal=B:TERM@120
export PYTHONSAFEPATH=1
case "$SLURM_ARRAY_TASK_ID" in
"""
_SIGN = re.compile(re.sub(r"\\\{\w+\\\}", r"(\\d+|#SBATCH --gpus-per-node=\\d+\n)?", re.escape(_HEAD)).encode())
"""The whole head: a script with lines of a user in it is not replaced."""


def write_array(file: Path, jobs: Sequence[Job]) -> None:
    """Write a batch script with an element per job, in their order; cards and cores are those of the greatest."""
    if not jobs:
        raise ConfigError("No job is left for a SLURM array.")
    cards = max(job.cards for job in jobs)
    head = _HEAD.format(
        count=len(jobs), last=len(jobs) - 1, cores=max(job.cores for job in jobs),
        cards=f"#SBATCH --gpus-per-node={cards}\n" if cards else "",
    )  # fmt: skip
    output_file(file, sign=_SIGN)
    replace_text(file, head + "".join(f"{index}) {_element(job)};;\n" for index, job in enumerate(jobs)) + "esac\n")


def _element(job: Job) -> str:
    """The commands of an element: output into the log, and the job in place of the shell, so that it gets signals."""
    log = job.folder / job.log  # the array may be submitted from any folder
    log_folder, folder, log_file = (shlex.quote(str(path)) for path in (log.parent, job.folder, log))
    words = shlex.join(["env", *(f"{name}={os.environ[name]}" for name in THREADS if name in os.environ), *job.words])
    return f"mkdir -p {log_folder} && {{ cd {folder} && exec {words}; }} >>{log_file} 2>&1 </dev/null"
