"""A SLURM job, as its batch script sees it: starting the step of the ranks, asking it to stop, and requeueing the job.

SLURM signals the tasks of a step when a job is cancelled or preempted. Before the time limit it signals only the batch
script, by the signal in `--signal=B:USR1@SECONDS`. On SIGTERM `srun` kills its step, so `scancel` signals the step
instead.
"""

from __future__ import annotations

import contextlib
import logging
import os
import random
import re
import shutil
import signal
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mm_moslora.launch.child_processes import output_of, terminate
from mm_moslora.utils.errors import ConfigError
from mm_moslora.utils.run_paths import checkpoints
from mm_moslora.utils.text_format import whole_number

logger = logging.getLogger(__name__)

WARNING = signal.SIGUSR1
"""Signal of `--signal=B:USR1@SECONDS` before the time limit; only after this signal a job is requeued."""
_ATTEMPTS = 6
_PAUSE = 10.0
"""Seconds between two attempts. All attempts end well before a time limit that is announced 300 seconds earlier."""
_PATIENCE = 30.0
"""Timeout of one SLURM command, seconds."""
_NO_STEP = 0xFFFF_0000
"""From this number on, a step is not one of srun: it is the batch script, or the shell of salloc."""
_TASKS = re.compile(r"SLURM_(NTASKS\w*|NPROCS|TASKS_PER_NODE|CPUS_PER_TASK|TRES_PER_TASK)")
"""Variables of a job's tasks, which srun would take for those of a step."""
_CHANGES_NODES = re.compile(r"-[NnwxrF]\S*|--(nodes|ntasks|ntasks-per-\w+|nodelist|nodefile|exclude|relative)(=.*)?")
"""Options of srun that choose nodes or tasks."""


@dataclass(frozen=True, kw_only=True)
class SlurmJob:
    """The job of this process."""

    number: int
    """Its SLURM_JOB_ID."""
    name: str
    """Its name for SLURM's commands, which take the number that one element of an array has for the whole array."""
    nodes: int
    """Number of its nodes."""
    node_list: str
    """Names of its nodes, as `scontrol show hostnames` takes them."""
    restarts: int
    """Number of its restarts."""
    cpus_per_node: int | None = None
    """CPUs of the job's tasks on each node; older versions of srun do not inherit them from the job."""
    gpus_on_node: int | None = None
    """GPUs of the job on this node."""
    tasks_of_step: int = 0
    """Tasks of the step that this process belongs to; 0: it is in no step, as a batch script is."""

    @classmethod
    def current(cls, environment: Mapping[str, str]) -> SlurmJob | None:
        """The job in an environment such as `os.environ`; None outside a job, or where srun is missing."""
        if not environment.get("SLURM_JOB_ID") or not shutil.which("srun"):
            return None
        gpus, name = environment.get("SLURM_GPUS_ON_NODE", ""), environment["SLURM_JOB_ID"]
        if environment.get("SLURM_ARRAY_JOB_ID") == name:
            name += f"_{environment.get('SLURM_ARRAY_TASK_ID')}"
        return cls(
            number=whole_number(environment, "SLURM_JOB_ID", 0),
            name=name,
            nodes=whole_number(environment, "SLURM_JOB_NUM_NODES", 1, least=1),
            node_list=environment.get("SLURM_JOB_NODELIST", ""),
            restarts=whole_number(environment, "SLURM_RESTART_COUNT", 0),
            cpus_per_node=_cpus(environment),
            gpus_on_node=int(gpus) if gpus.isdecimal() and int(gpus) else None,
            tasks_of_step=step_tasks(environment),
        )

    @property
    def step_name(self) -> str:
        """The unique name of the step that this process starts."""
        return f"mm-moslora-{os.getpid()}"

    def srun(self) -> list[str]:
        """The srun prefix that runs a command once on every node."""
        if self.tasks_of_step > 1:
            raise ConfigError(
                f"mm-moslora launch runs in a step of {self.tasks_of_step} tasks, and each would start all ranks. "
                "Call it once: in the batch script without srun, or in a step of one task (srun --ntasks=1 --pty bash)."
            )
        words = ["srun", f"--nodes={self.nodes}", f"--ntasks={self.nodes}", "--ntasks-per-node=1"]
        words += ["--kill-on-bad-exit=1", f"--job-name={self.step_name}"]
        words += ["--overlap"] if self.tasks_of_step else []  # else it would wait for the CPUs of its own step
        return words + ([f"--cpus-per-task={self.cpus_per_node}"] if self.cpus_per_node else [])

    def rendezvous(self) -> list[str]:
        """torchrun's rendezvous options; no two launches of a job share a port or an id."""
        nodes = _answer("scontrol", "show", "hostnames", self.node_list)
        if not nodes:
            raise ConfigError(f"scontrol names no host for SLURM_JOB_NODELIST {self.node_list!r}; see the line above.")
        draw = random.SystemRandom()
        port = draw.randrange(20000, 30000)  # below the ephemeral ports of Linux
        name = f"{self.number}-{self.restarts}-{os.getpid()}-{draw.getrandbits(32):08x}"
        return [
            "--nnodes", str(self.nodes), "--rdzv_backend", "c10d", "--rdzv_id", name,
            "--rdzv_endpoint", f"{nodes.split()[0]}:{port}",
        ]  # fmt: skip

    def terminate_step(self, srun: int) -> None:
        """Ask the ranks to save and exit; where no step has started yet, end `srun`."""
        if not _tried(lambda: self._signal_step(srun)):
            logger.error(
                "SLURM does not answer, so the step of job %d was not asked to save. SLURM signals it at the time "
                "limit.", self.number,
            )  # fmt: skip

    def requeue(self) -> bool:
        """Requeue the job, whereupon SLURM ends this process; returns whether SLURM accepted."""
        return _tried(lambda: _answer("scontrol", "requeue", self.name) is not None)

    def _signal_step(self, srun: int) -> bool:
        state = _squeue("--jobs", self.name, "--format", "%T")
        if state is not None and state.strip() == "COMPLETING":
            return True  # cancelled: SLURM has signalled the step, and torchrun gives up on a second signal
        steps = _squeue("--steps", "--jobs", self.name, "--format", "%i %j")
        if state is None or steps is None:
            return False
        named = [line.split(maxsplit=1) for line in steps.splitlines()]
        step = next((words[0] for words in named if words[1:] == [self.step_name]), None)
        if step is not None:
            return _answer("scancel", "--signal=TERM", step) is not None
        terminate(srun)
        return True


def _cpus(environment: Mapping[str, str]) -> int | None:
    """CPUs of all tasks of a node: the one task of a step gets them all."""
    each = whole_number(environment, "SLURM_CPUS_PER_TASK", 0)
    tasks = re.match(r"\d+", environment.get("SLURM_TASKS_PER_NODE", ""))
    return each * max(1, int(tasks[0]) if tasks else 1) or None


def step_tasks(environment: Mapping[str, str]) -> int:
    """Tasks of srun's step that a process is in; 0 in a batch script, a shell of salloc, and outside a job."""
    if whole_number(environment, "SLURM_STEP_ID", _NO_STEP, most=2**32 - 1) >= _NO_STEP:
        return 0
    return whole_number(environment, "SLURM_STEP_NUM_TASKS", 1, least=1)


def leave_foreign_step() -> None:
    """Remove the variables of another job's step: sbatch called from a shell of srun passes them on."""
    import psutil

    with contextlib.suppress(psutil.Error, LookupError, ValueError):
        daemon = psutil.Process(int(os.environ["SLURM_TASK_PID"])).parent()
        title = " ".join(daemon.cmdline()) if daemon is not None else ""
        if title.startswith(f"slurmstepd: [{os.environ['SLURM_JOB_ID']}.batch]"):
            for name in [name for name in os.environ if name.startswith("SLURM_STEP")]:
                del os.environ[name]


def refuse_options(words: Sequence[str]) -> None:
    """Refuse options of srun that choose the nodes or the tasks of a step: torchrun waits for every node of the job."""
    if wrong := [word for word in words if _CHANGES_NODES.fullmatch(word)]:
        raise ConfigError(
            f"--srun {wrong[0]} changes the nodes or the tasks of the step, which has one task on every node of the "
            "job. Leave it out, and submit a job of its own for each training."
        )


def step_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """An environment without the numbers of tasks, which srun would inherit from the job."""
    return {name: value for name, value in environment.items() if not _TASKS.fullmatch(name)}


def _squeue(*options: str) -> str | None:
    return _answer("squeue", "--noheader", *options)


def _answer(*words: str) -> str | None:
    """The output of a SLURM command; None where the controller is too busy to answer, or gone."""
    try:
        done = output_of(words, seconds=_PATIENCE)
    except OSError as error:
        logger.warning("%s: %s", words[0], error)
        return None
    if done.returncode:
        logger.warning("%s: %s", words[0], done.stderr.strip() or f"exit code {done.returncode}")
        return None
    return done.stdout


def _tried(attempt: Callable[[], bool]) -> bool:
    """Whether one of several attempts succeeds; a controller may be restarting or overloaded."""
    for number in range(_ATTEMPTS):
        if number:
            time.sleep(_PAUSE)
        if attempt():
            return True
    return False


class Requeue:
    """Requeues a job that was stopped before its time limit, as long as the run makes progress."""

    def __init__(self, job: SlurmJob | None) -> None:
        if job is None:
            raise ConfigError("--requeue is for SLURM jobs, but SLURM_JOB_ID or srun is missing here. Leave it out.")
        self.job = job
        self.run_folder: Path | None = None
        self.began_with = -1

    def watch(self, run_folder: Path) -> None:
        """Record the newest checkpoint before the run continues."""
        self.run_folder, self.began_with = run_folder, _newest(run_folder)

    def stopped(self, signals: Collection[int], code: int) -> int:
        """Requeue after a warning of the limit; `code`, or 1 without a new checkpoint or where SLURM refuses."""
        if WARNING not in signals:  # SLURM itself requeues preempted jobs, and cancelled jobs must stay ended
            return code
        if self.job.restarts and (self.run_folder is None or _newest(self.run_folder) <= self.began_with):
            logger.error(
                "SLURM job %d started %d times, and its last run saved no checkpoint before its time limit. "
                "It does not go back into the queue. Raise --time, or lower the seconds of --signal=B:USR1@SECONDS.",
                self.job.number, self.job.restarts + 1,
            )  # fmt: skip
            return 1
        if not self.job.requeue():
            logger.error("SLURM did not put job %d back into the queue. Submit it again.", self.job.number)
            return 1
        return code


def _newest(run_folder: Path) -> int:
    """Step of the newest checkpoint; -1 without one."""
    return max((step for step, _ in checkpoints(run_folder)), default=-1)
