"""`mm-moslora launch`: find this machine's accelerators, choose the launcher that fits, start the ranks and wait.

A signal is handed on to the ranks once; they finish their step, save and leave, and the exit code is then 75. So it is
when they had not begun. Ctrl-C a third time ends them unsaved.
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
"""Exit code of what was stopped by a signal and goes on when it is started again."""
STOPPED = "STOPPED"
"""File in a run folder: the run was stopped by a signal, which its text names, and nothing is unsaved."""
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
ONE_REQUEST_SECONDS = 3.0
"""Signals so close to a request are the same one: terminals and schedulers tell whole groups of processes, the
launchers hand on what they hear, and that of DeepSpeed sends SIGINT and SIGTERM."""
REQUESTS_TO_END_UNSAVED = 3


class RequestCounter:
    """Counts requests to stop. The first signal is one; later ones are none, since schedulers repeat themselves while a
    run saves, except Ctrl-C some seconds after the last request: a person insists."""

    def __init__(self) -> None:
        self._requests, self._since = 0, 0.0

    def count(self, number: int) -> int:
        """How many requests there were, if this signal is a new one, else 0.

        Args:
            number: of the signal.
        """
        now = time.monotonic()
        insists = number == signal.SIGINT and now - self._since > ONE_REQUEST_SECONDS
        if self._requests and not insists:
            return 0
        self._requests, self._since = self._requests + 1, now
        return self._requests


def stopped_text(number: int) -> str:
    """What `STOPPED` holds, for people.

    Args:
        number: of the signal.
    """
    name = signal.Signals(number).name
    said = {"SIGINT": "Ctrl-C (SIGINT)", "SIGTERM": "SIGTERM, which launchers send for Ctrl-C and other signals, too"}
    return f"Stopped by {said.get(name, name)}; nothing is unsaved. The same command continues the run.\n"


def leave_mark(run_folder: Path, number: int) -> None:
    """Say in a run folder that the run was stopped before it took the folder; one of somebody else is left as it is.

    Args:
        run_folder: may be missing.
        number: of the signal.
    """
    try:
        refuse_strangers(run_folder, RUN_FILES, kind="run", also=RUN_SIGNS)
        run_folder.mkdir(parents=True, exist_ok=True)
        (run_folder / RUN_LOCK).touch()  # the next start must find that the mark is a run's
        replace_text(run_folder / STOPPED, stopped_text(number))
    except (ConfigError, OSError) as error:
        logger.info("%s is not written: %s", run_folder / STOPPED, error)


@dataclass(frozen=True, kw_only=True)
class Topology:
    """Where ranks are to run."""

    nproc: int | None = None
    """Processes on each host; None: $NPROC, else one per accelerator, or one."""
    nnodes: int = 1
    """Hosts; the same command runs on each."""
    rdzv: str | None = None
    """HOST:PORT where they meet."""
    hostfile: Path | None = None
    """Lines such as `worker-1 slots=8`; the deepspeed launcher starts the ranks there through ssh."""
    max_restarts: int = 0
    """How often to start again from the newest checkpoint when a rank dies or hangs."""
    job: Job | None = None
    """The SLURM job whose nodes run the ranks; None: this machine, or the hosts that the other fields name."""

    def __post_init__(self) -> None:
        for name, least in (("nproc", 1), ("nnodes", 1), ("max_restarts", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f"--{name.replace('_', '-')} is {value}, expected {least} or more.")
        if self.rdzv is not None and not _is_place(self.rdzv):
            raise ConfigError(f"--rdzv is {self.rdzv!r}, expected HOST:PORT such as node-1:29400.")
        if self.rdzv is not None and self.nnodes == 1:
            raise ConfigError(f"--rdzv {self.rdzv} is where several hosts meet, but --nnodes is 1. Give --nnodes, too.")
        if self.nnodes > 1 and self.rdzv is None:
            raise ConfigError(f"--nnodes is {self.nnodes}, but no --rdzv HOST:PORT says where the hosts meet.")
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
    """Whether it reads HOST:PORT."""
    host, _, port = text.rpartition(":")
    return bool(host) and port.isascii() and port.isdigit() and 0 < int(port) < 2**16


def accelerators() -> int:
    """Accelerators that this process may use."""
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def command(places: Topology, arguments: Sequence[str]) -> list[str]:
    """The command that starts the ranks.

    Args:
        places: where.
        arguments: of `mm-moslora train`.
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
        places: where.
        arguments: of `mm-moslora train`.
        run_folder: where a run that was stopped leaves its mark.
        dry_run: show the command and start nothing.
        requeue: decides about the SLURM job of a run that was stopped.

    Returns:
        0 when the run is finished, 75 when it was stopped on request, else the launcher's code.
    """
    environment = {
        "OMP_WAIT_POLICY": "passive", "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1",
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "300",
        # torchrun shares one store between restarts, in which the ranks find the addresses of those that died.
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
        tell, kill = places.job.terminate_step, _terminate  # which srun answers by killing its step
    if requeue is not None:
        requeue.watch(run_folder)
    # In a group of its own: Ctrl-C reaches whole groups, and torchrun leaves its ranks when it hears a second signal.
    ended = run_and_hand_on(
        words, _SIGNALS, tell=tell, kill=kill, env=environment, process_group=0, stdin=subprocess.DEVNULL
    )
    # Not by the code alone: DeepSpeed's runner takes a launcher that was ended by a signal for a success.
    unsaved = bool(ended.signals) and not (ended.code == 0 and _is_finished(run_folder))
    if not mark.exists() and not unsaved:
        return ended.code
    if not mark.exists():
        logger.info("Stopped by a signal without saving. The same command goes on from the newest checkpoint, if any.")
    return requeue.stopped(ended.signals, EXIT_REQUEUE) if requeue is not None else EXIT_REQUEUE


def _is_finished(run_folder: Path) -> bool:
    try:
        return bool(json.loads((run_folder / "state.json").read_text(encoding="utf-8"))["state"] == "finished")
    except (OSError, ValueError, KeyError, TypeError):
        return False


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How a command ended."""

    code: int
    """Its exit code."""
    signals: frozenset[int]
    """Which signals came before."""


def _terminate(process: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(process, signal.SIGTERM)


def kill_tree(process: int) -> None:
    """End a process and all that it started, unsaved.

    Args:
        process: its id.
    """
    import psutil

    with contextlib.suppress(psutil.NoSuchProcess):
        root = psutil.Process(process)
        for member in [root, *root.children(recursive=True)]:  # a launcher first, which might start others
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
    """Run a command. The first signal that comes meanwhile, also while it is being started, is handed on; later ones
    are not, and the third Ctrl-C ends the command at once.

    Args:
        words: the command.
        signals: to hand on; those that are ignored here (nohup) stay ignored.
        tell: asks the process of this id to save and to end; default: by SIGTERM.
        kill: ends it at once; default: together with all that it started.
        options: of `subprocess.Popen`.
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
    """Ask a run of DeepSpeed's launcher to end.

    On one machine its runner hands no signal on: it ends, and the launcher below it and the ranks train on unseen. So
    that launcher is told, which ends its ranks, and the runner waits for it. With several hosts it tells them itself.

    Args:
        runner: its process id, which is that of its process group, too.
    """
    import psutil

    with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
        process = psutil.Process(runner)
        own = process.cmdline()
        commands = [(child, child.cmdline()) for child in process.children()]
        # With no words, or the same, it is a fork that starts another.
        started = [(child, words) for child, words in commands if words not in ([], own)]
        here = [child for child, words in started if words[2:4] == ["-m", "deepspeed.launcher.launch"]]
        for child in here:
            child.terminate()
        if not started:  # and what it is about to start
            os.killpg(runner, signal.SIGTERM)
        elif not here:
            process.terminate()
