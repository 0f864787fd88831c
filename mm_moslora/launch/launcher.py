"""`mm-moslora launch`: find this machine's accelerators, choose a launcher, start the ranks and wait for them.

A signal is forwarded to the ranks once. They finish their step, save and exit, and the exit code is 75, also where they
had not started. A third Ctrl-C ends them without saving.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mm_moslora.launch.slurm_job import Job, Requeue
from mm_moslora.utils.errors import ConfigError
from mm_moslora.utils.files import discard, refuse_strangers, replace_text
from mm_moslora.utils.run_paths import RUN_FILES, RUN_LOCK, RUN_SIGNS

logger = logging.getLogger(__name__)

EXIT_REQUEUE = 75
"""Exit code after a signal; the same command continues the run."""
STOPPED = "STOPPED"
"""File in a run folder: a signal, which its text names, stopped the run, and nothing is unsaved."""
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
ONE_REQUEST_SECONDS = 3.0
"""Seconds after a request in which further signals belong to it: terminals and schedulers signal whole process groups,
launchers forward signals, and DeepSpeed's launcher sends SIGINT and SIGTERM."""
REQUESTS_TO_END_UNSAVED = 3


class RequestCounter:
    """Counts requests to stop. The first signal is a request. Later ones are not, since schedulers repeat signals while
    a run saves, except for a Ctrl-C some seconds after the last request."""

    def __init__(self) -> None:
        self._requests, self._since = 0, 0.0

    def count(self, number: int) -> int:
        """The number of requests so far if this signal is a new one, else 0.

        Args:
            number: the signal.
        """
        now = time.monotonic()
        insists = number == signal.SIGINT and now - self._since > ONE_REQUEST_SECONDS
        if self._requests and not insists:
            return 0
        self._requests, self._since = self._requests + 1, now
        return self._requests


def stopped_text(number: int) -> str:
    """The text of `STOPPED`.

    Args:
        number: the signal.
    """
    name = signal.Signals(number).name
    said = {"SIGINT": "Ctrl-C (SIGINT)", "SIGTERM": "SIGTERM, which launchers send for Ctrl-C and other signals, too"}
    return f"Stopped by {said.get(name, name)}; nothing is unsaved. The same command continues the run.\n"


def leave_mark(run_folder: Path, number: int) -> None:
    """Mark a run folder as stopped before the run locked it; a folder of another program is left unchanged.

    Args:
        run_folder: may be missing.
        number: the signal.
    """
    try:
        refuse_strangers(run_folder, RUN_FILES, kind="run", also=RUN_SIGNS)
        run_folder.mkdir(parents=True, exist_ok=True)
        (run_folder / RUN_LOCK).touch()  # marks the folder as a run's for the next start
        replace_text(run_folder / STOPPED, stopped_text(number))
    except (ConfigError, OSError) as error:
        logger.info("%s is not written: %s", run_folder / STOPPED, error)


@dataclass(frozen=True, kw_only=True)
class Topology:
    """The processes and hosts of a run."""

    nproc: int | None = None
    """Processes on each host; None: $NPROC, else one per accelerator, or one."""
    nnodes: int = 1
    """Number of hosts; the same command runs on each."""
    rdzv: str | None = None
    """HOST:PORT of the rendezvous."""
    hostfile: Path | None = None
    """File with lines such as `worker-1 slots=8`; the deepspeed launcher starts the ranks there through ssh."""
    max_restarts: int = 0
    """Maximum number of restarts from the newest checkpoint after a rank dies or hangs."""
    job: Job | None = None
    """The SLURM job that runs the ranks on its nodes; None: this machine, or the hosts in the other fields."""

    def __post_init__(self) -> None:
        for name, least in (("nproc", 1), ("nnodes", 1), ("max_restarts", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f"--{name.replace('_', '-')} is {value}, expected {least} or more.")
        if self.rdzv is not None and not _is_place(self.rdzv):
            raise ConfigError(f"--rdzv is {self.rdzv!r}, expected HOST:PORT such as node-1:29400.")
        if self.rdzv is not None and self.nnodes == 1:
            raise ConfigError(f"--rdzv {self.rdzv} is for several hosts, but --nnodes is 1. Give --nnodes, too.")
        if self.nnodes > 1 and self.rdzv is None:
            raise ConfigError(f"--nnodes is {self.nnodes}, but no --rdzv HOST:PORT is given. Give --rdzv, too.")
        if self.hostfile is not None and self.nnodes > 1:
            raise ConfigError("--hostfile and --nnodes are two ways to use several hosts; give one of them.")
        if self.hostfile is not None and not self.hostfile.is_file():
            raise ConfigError(f"--hostfile {self.hostfile} does not exist.")
        if self.hostfile is not None:
            _check_hosts(self.hostfile)
        if self.hostfile is not None and self.max_restarts:
            raise ConfigError("--max-restarts needs torchrun; the deepspeed launcher of --hostfile cannot restart.")


def _check_hosts(hostfile: Path) -> None:
    lines = [line.partition("#")[0].strip() for line in hostfile.read_text(encoding="utf-8").splitlines()]
    wrong = [line for line in lines if line and not re.fullmatch(r"\S+\s+slots=[1-9]\d*", line)]
    if wrong or not any(lines):
        found = f"holds {wrong[0]!r}" if wrong else "names no host"
        raise ConfigError(f"--hostfile {hostfile} {found}, expected lines such as 'worker-1 slots=8'.")


def _is_place(text: str) -> bool:
    """Whether the text has the form HOST:PORT."""
    host, _, port = text.rpartition(":")
    return bool(host) and port.isascii() and port.isdigit() and 0 < int(port) < 2**16


def accelerators() -> int:
    """Number of accelerators that are visible to this process."""
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def command(places: Topology, arguments: Sequence[str]) -> list[str]:
    """The command that starts the ranks.

    Args:
        places: processes and hosts.
        arguments: those of `mm-moslora train`.
    """
    train = ["mm_moslora", "train", *arguments]
    if places.hostfile is not None:
        return [
            sys.executable, "-m", "deepspeed.launcher.runner", "--hostfile", str(places.hostfile), "--no_local_rank",
            "--module", *train,
        ]  # fmt: skip
    nproc = places.nproc or (places.job and places.job.gpus_on_node) or max(1, accelerators())
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(nproc)]
    if places.max_restarts:
        torchrun += ["--max_restarts", str(places.max_restarts)]
    if places.job is not None:
        return [*places.job.srun(), *torchrun, *places.job.rendezvous(), "-m", *train]
    if places.nnodes > 1:
        meet = ["--rdzv_backend", "c10d", "--rdzv_id", "mm-moslora", "--rdzv_endpoint", str(places.rdzv)]
        return [*torchrun, "--nnodes", str(places.nnodes), *meet, "-m", *train]
    if nproc == 1 and not places.max_restarts:
        return [sys.executable, "-m", *train]
    return [*torchrun, "--standalone", "-m", *train]


def launch(
    places: Topology,
    arguments: Sequence[str],
    *,
    run_folder: Path,
    dry_run: bool = False,
    requeue: Requeue | None = None,
) -> int:
    """Start the ranks and wait for them.

    Args:
        places: processes and hosts.
        arguments: those of `mm-moslora train`.
        run_folder: gets the mark of a run that was stopped.
        dry_run: print the command and start nothing.
        requeue: decides whether a stopped run's SLURM job goes back into the queue.

    Returns:
        0 after a finished run, 75 after a requested stop, else the launcher's code.
    """
    environment = {
        "OMP_WAIT_POLICY": "passive", "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1",
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "300",
        # torchrun keeps one store over restarts, in which ranks would find the addresses of dead ranks.
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
    } | os.environ  # fmt: skip
    words = command(places, arguments)
    logger.info("%s", shlex.join(words))
    if dry_run:
        return 0
    mark = run_folder / STOPPED
    refuse_strangers(run_folder, (STOPPED,), kind="run", also=RUN_SIGNS)
    discard(mark)
    tell: Callable[[int], None] = _terminate
    kill: Callable[[int], None] = kill_tree
    if places.hostfile is not None:
        tell = end_deepspeed
    elif places.job is not None:
        tell, kill = places.job.terminate_step, _terminate  # srun kills its step on SIGTERM
    if requeue is not None:
        requeue.watch(run_folder)
    # In its own process group: Ctrl-C reaches whole groups, and torchrun abandons its ranks on a second signal.
    ended = run_and_hand_on(
        words, _SIGNALS, tell=tell, kill=kill, env=environment, process_group=0, stdin=subprocess.DEVNULL
    )
    # The code alone is not enough: DeepSpeed's runner reports success for a launcher that a signal ended.
    unsaved = bool(ended.signals) and not (ended.code == 0 and _is_finished(run_folder))
    if not mark.exists() and not unsaved:
        return ended.code
    if not mark.exists():
        logger.info("Stopped by a signal without saving. The same command resumes from the newest checkpoint, if any.")
    return requeue.stopped(ended.signals, EXIT_REQUEUE) if requeue is not None else EXIT_REQUEUE


def _is_finished(run_folder: Path) -> bool:
    try:
        return bool(json.loads((run_folder / "state.json").read_text(encoding="utf-8"))["state"] == "finished")
    except (OSError, ValueError, KeyError, TypeError):
        return False


@dataclass(frozen=True, kw_only=True)
class Ended:
    """The outcome of a command."""

    code: int
    """Its exit code."""
    signals: frozenset[int]
    """Signals received before."""


def _terminate(process: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(process, signal.SIGTERM)


def kill_tree(process: int) -> None:
    """Kill a process with all its descendants, without saving.

    Args:
        process: its process id.
    """
    import psutil

    with contextlib.suppress(psutil.NoSuchProcess):
        root = psutil.Process(process)
        for member in [root, *root.children(recursive=True)]:  # the launcher first, which might start further ones
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()


def run_and_hand_on(
    words: Sequence[str],
    signals: Sequence[signal.Signals],
    *,
    tell: Callable[[int], None] = _terminate,
    kill: Callable[[int], None] = kill_tree,
    **options: Any,
) -> Ended:
    """Run a command. The first signal in the meantime, also while the command is starting, is forwarded. Later ones
    are not, and a third Ctrl-C kills the command.

    Args:
        words: the command.
        signals: those to forward; signals that are ignored here (nohup) stay ignored.
        tell: asks the process with this id to save and exit; default: by SIGTERM.
        kill: kills it; default: with all its descendants.
        options: options of `subprocess.Popen`.
    """
    child: subprocess.Popen[bytes] | None = None
    early: list[int] = []
    late: list[int] = []
    requests = RequestCounter()

    def hand_on(number: int, _: object) -> None:
        request = requests.count(number)
        if child is None:
            early.append(number)
            return
        late.append(number)
        if not request or child.poll() is not None:
            return
        if request == 1:
            tell(child.pid)
        elif request >= REQUESTS_TO_END_UNSAVED:
            kill(child.pid)
        else:
            logger.info(
                "The run saves before it ends. Ctrl-C again, more than %g s later, ends it unsaved.",
                ONE_REQUEST_SECONDS,
            )

    previous = {
        number: signal.signal(number, hand_on) for number in signals if signal.getsignal(number) != signal.SIG_IGN
    }
    try:
        child = subprocess.Popen(words, **options)
        if early and child.poll() is None:
            tell(child.pid)
        return Ended(code=child.wait(), signals=frozenset([*early, *late]))
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def end_deepspeed(runner: int) -> None:
    """Ask a run under DeepSpeed's launcher to end.

    On one machine DeepSpeed's runner forwards no signal: it would exit while the launcher below it and the ranks train
    on. The signal therefore goes to that launcher, which ends its ranks, and the runner waits for it. With several
    hosts the runner forwards signals itself.

    Args:
        runner: its process id, which is also that of its process group.
    """
    import psutil

    with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
        process = psutil.Process(runner)
        own = process.cmdline()
        commands = [(child, child.cmdline()) for child in process.children()]
        # A child without a command line, or with the same one, is a fork about to start another program.
        started = [(child, words) for child, words in commands if words not in ([], own)]
        here = [child for child, words in started if words[2:4] == ["-m", "deepspeed.launcher.launch"]]
        for child in here:
            child.terminate()
        if not started:  # it may be about to start the launcher
            os.killpg(runner, signal.SIGTERM)
        elif not here:
            process.terminate()
