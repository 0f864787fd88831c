"""`mm-moslora launch`: find this machine's accelerators, choose the launcher that fits, start the ranks and wait.

A signal is handed on to the ranks; they finish their step, save and leave, and the exit code is then 75. So it is when
they had not begun.
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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mm_moslora.errors import ConfigError
from mm_moslora.files import discard, refuse_strangers, replace_text
from mm_moslora.folders import RUN_FILES, RUN_LOCK, RUN_SIGNS
from mm_moslora.slurm import Job, Requeue

logger = logging.getLogger(__name__)

EXIT_REQUEUE = 75
STOPPED = "STOPPED"
"""File in a run folder: the run was stopped by a signal, which its text names, and nothing is unsaved."""
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)


def stopped_text(number: int) -> str:
    """What `STOPPED` holds, for people.

    Args:
        number: of the signal.
    """
    name = "Ctrl-C (SIGINT)" if number == signal.SIGINT else signal.Signals(number).name
    return f"Stopped by {name}; nothing is unsaved. The same command continues the run.\n"


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
class Places:
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


def command(places: Places, arguments: Sequence[str]) -> list[str]:
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
    places: Places, arguments: Sequence[str], *, run_folder: Path, dry_run: bool = False, requeue: Requeue | None = None
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
    # In a group of its own: Ctrl-C reaches whole groups, and ranks that hear it twice stop without saving.
    tell: Callable[[int], None] = _terminate
    if places.hostfile is not None:
        tell = end_deepspeed
    elif places.job is not None:
        tell = places.job.terminate_step
    if requeue is not None:
        requeue.watch(run_folder)
    ended = run_and_hand_on(words, _SIGNALS, tell=tell, env=environment, process_group=0, stdin=subprocess.DEVNULL)
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


def run_and_hand_on(
    words: Sequence[str],
    signals: Sequence[signal.Signals],
    *,
    tell: Callable[[int], None] = _terminate,
    **options: Any,
) -> Ended:
    """Run a command; signals that come meanwhile, also while it is being started, reach it as SIGTERM.

    Args:
        words: the command.
        signals: to hand on; those that are ignored here (nohup) stay ignored.
        tell: asks the process of this id to end; default: by SIGTERM.
        options: of `subprocess.Popen`.
    """
    child: subprocess.Popen[bytes] | None = None
    early: list[int] = []
    handed_on: list[int] = []

    def hand_on(number: int, _: object) -> None:
        if child is None:
            early.append(number)
        else:
            handed_on.append(number)
            if child.poll() is None:
                tell(child.pid)

    previous = {
        number: signal.signal(number, hand_on) for number in signals if signal.getsignal(number) != signal.SIG_IGN
    }
    try:
        child = subprocess.Popen(words, **options)
        if early and child.poll() is None:
            tell(child.pid)
        return Ended(code=child.wait(), signals=frozenset([*early, *handed_on]))
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
