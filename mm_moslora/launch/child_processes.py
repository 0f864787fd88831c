"""The door to child processes: what this project starts passes here, and so do the signals that it forwards.

`tests/packaging/test_doors.py` refuses any other way. What holds for all children:

- A command is a list of words, never a line for a shell.
- A Python starts with `-P` and passes `PYTHONSAFEPATH=1` on, so that files of the working folder (`regex.py`,
  `datasets.py`) are not imported in place of libraries. `PYTHONPATH` belongs to the user and is passed on as it is.
- Its environment is complete before it starts: libraries read `CUDA_VISIBLE_DEVICES` while they are imported.
- It reads nothing from the terminal.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from concurrent.futures import ProcessPoolExecutor
    from multiprocessing.context import BaseContext
import socket

from mm_moslora.utils.files import writing_in_place
from mm_moslora.utils.text_format import whole_number

logger = logging.getLogger(__name__)

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
"""Signals that schedulers and terminals send to end a program. Where nohup ignores SIGHUP, it stays ignored."""
ONE_REQUEST_SECONDS = 3.0
"""Seconds after a request in which further signals belong to it: terminals and schedulers signal whole process groups,
launchers forward signals, and DeepSpeed's launcher sends SIGINT and SIGTERM."""
REQUESTS_TO_END_UNSAVED = 3
_TIED = "MM_MOSLORA_ENDS_WITH_PARENT"
PIPE = subprocess.PIPE
Child = subprocess.Popen[bytes]
Handler = Callable[[int, Any], None]


def python_words(*arguments: str, python: str = "") -> list[str]:
    """The command of a Python (default: this one) that does not import files of its working folder."""
    return [python or sys.executable, "-P", *arguments]


def child_environment(changes: Mapping[str, str] = MappingProxyType({})) -> dict[str, str]:
    """The environment of a child: that of this process, safe module paths for all Pythons below, and the changes."""
    return {**os.environ, "PYTHONSAFEPATH": "1", **changes}


def start(words: Sequence[str | Path], **options: Any) -> Child:
    """Start a command; `options` are of `subprocess.Popen`, by default with `child_environment()` and no input."""
    assert "shell" not in options
    return subprocess.Popen([*words], **{"env": child_environment(), "stdin": subprocess.DEVNULL, **options})


def start_tied(words: Sequence[str | Path], changes: Mapping[str, str], **options: Any) -> Child:
    """Start a command line of this project that is asked to save and exit once this process is gone, however it ended.
    Ctrl-C in a terminal does not reach it, only this process. `changes` are of its environment."""
    return start(words, env=child_environment({**changes, _TIED: "1"}), stdin=PIPE, process_group=0, **options)


def end_with_parent() -> None:
    """In a process of `start_tied`: ask it to save and exit at the end of its input, which the parent holds open."""
    if os.environ.pop(_TIED, ""):  # children of its own have other inputs
        threading.Thread(target=_terminate_after_input, name="end with parent", daemon=True).start()


def _terminate_after_input() -> None:
    while os.read(0, 1):
        pass
    terminate(os.getpid())


def output_of(
    words: Sequence[str | Path], *, seconds: float | None = None, cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end; returns exit code, output and errors."""
    try:
        return subprocess.run(
            [*words], capture_output=True, text=True, check=False, timeout=seconds, cwd=cwd, env=child_environment(),
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise TimeoutError(f"{words[0]} did not end within {seconds:g} seconds") from error


def fork_context() -> BaseContext | None:
    """What forks workers from this process, with the modules and data that it has; None where nothing can fork."""
    import multiprocessing

    return multiprocessing.get_context("fork") if "fork" in multiprocessing.get_all_start_methods() else None


def forked_pool(processes: int, context: BaseContext, initializer: Callable[[int], None]) -> ProcessPoolExecutor:
    """A pool of forked processes; `initializer` is called in each of them with the id of this process."""
    from concurrent.futures import ProcessPoolExecutor

    return ProcessPoolExecutor(processes, mp_context=context, initializer=initializer, initargs=(os.getpid(),))


class RequestCounter:
    """Counts requests to stop. The first signal is a request. Later ones are not, since schedulers repeat signals while
    a run saves, except for a Ctrl-C some seconds after the last request."""

    def __init__(self) -> None:
        self._requests, self._since = 0, 0.0

    def count(self, number: int) -> int:
        """The number of requests so far if this signal is a new one, else 0."""
        now = time.monotonic()
        insists = number == signal.SIGINT and now - self._since > ONE_REQUEST_SECONDS
        if self._requests and not insists:
            return 0
        self._requests, self._since = self._requests + 1, now
        return self._requests


def install_handler(
    handler: Handler, numbers: Sequence[int] = STOP_SIGNALS, *, unless_ignored: bool = True
) -> dict[int, Any]:
    """Handle signals; returns the previous handlers, none outside the main thread. With `unless_ignored`, all signals
    that are ignored are left alone; otherwise SIGHUP only, which nohup ignores."""
    try:
        return {
            number: signal.signal(number, handler)
            for number in numbers
            if signal.getsignal(number) != signal.SIG_IGN or not (unless_ignored or number == signal.SIGHUP)
        }
    except ValueError:  # the embedding program handles signals
        return {}


def restore_handlers(previous: Mapping[int, Any]) -> None:
    """Undo `install_handler`."""
    for number, handler in previous.items():
        signal.signal(number, handler)


@dataclass(frozen=True, kw_only=True)
class Ended:
    """The outcome of a command."""

    code: int
    """Its exit code."""
    signals: frozenset[int]
    """Signals received before."""


def terminate(process: int) -> None:
    """Ask a process to save and exit."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(process, signal.SIGTERM)


def kill_tree(process: int) -> None:
    """Kill a process with all its descendants, without saving."""
    import psutil

    with contextlib.suppress(psutil.NoSuchProcess):
        root = psutil.Process(process)
        for member in [root, *root.children(recursive=True)]:  # the launcher first, which might start further ones
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()


def run_and_hand_on(
    words: Sequence[str],
    *,
    signals: Sequence[int] = STOP_SIGNALS,
    request_stop: Callable[[int], None] = terminate,
    kill: Callable[[int], None] = kill_tree,
    begin: Callable[..., Child] = start,
    **options: Any,
) -> Ended:
    """Run a command by `begin`, with its `options`. The first of `signals` in the meantime, also while the command is
    starting, is forwarded by `request_stop`. Later ones are not, and a third Ctrl-C kills the command."""
    child: Child | None = None
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
            request_stop(child.pid)
        elif request >= REQUESTS_TO_END_UNSAVED:
            kill(child.pid)
        else:
            logger.info(
                "The run saves before it ends. Ctrl-C again, more than %g s later, ends it unsaved.",
                ONE_REQUEST_SECONDS,
            )

    previous = install_handler(hand_on, signals)
    try:
        child = begin(words, **options)
        if early and child.poll() is None:
            request_stop(child.pid)
        return Ended(code=child.wait(), signals=frozenset([*early, *late]))
    finally:
        restore_handlers(previous)


LOG_FOLDER = "MM_MOSLORA_LOG_DIR"
"""Variable with the folder; `launch --log-dir` sets it for the ranks."""


def keep_rank_log(environment: Mapping[str, str]) -> None:
    """Write this process's output, also that outside Python, to `rank-00003.log` in a folder of `LOG_FOLDER`, too."""
    folder = environment.get(LOG_FOLDER)
    if not folder:
        return
    rank = whole_number(environment, "RANK", 0)
    path = Path(folder) / f"rank-{rank:05d}.log"
    path.parent.mkdir(parents=True, exist_ok=True)
    with writing_in_place(path, append=True) as file:
        now = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        file.write(f"--- {now}: rank {rank} on {socket.gethostname()}, process {os.getpid()}\n")
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
        number = stream.fileno()
        # A program inherits which signals are blocked: no terminal or scheduler ends `tee` before the rank, so that no
        # line is lost.
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        try:
            tee = start(["tee", "-a", path], stdin=PIPE, stdout=number, start_new_session=True)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        assert tee.stdin is not None
        os.dup2(tee.stdin.fileno(), number)
        tee.stdin.close()
