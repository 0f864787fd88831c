"""`mm-moslora launch`: start the ranks and wait for them.

A signal is forwarded to the ranks once. They finish their step, save and exit, and the exit code is 75, also where they
had not started. A third Ctrl-C ends them without saving.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shlex
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mm_moslora.launch.child_processes import (
    LOG_FOLDER,
    Ended,
    child_environment,
    end_with_parent,
    python_words,
    run_and_hand_on,
    start_tied,
    terminate,
)
from mm_moslora.launch.heartbeat import is_running
from mm_moslora.launch.slurm_job import Requeue, step_environment
from mm_moslora.launch.topology import Topology, command
from mm_moslora.utils.errors import ConfigError, ExitStatus
from mm_moslora.utils.files import discard, open_in_place, read_json, replace_json, replace_text
from mm_moslora.utils.folder_marks import refuse_strangers
from mm_moslora.utils.redaction import is_secret_name
from mm_moslora.utils.run_paths import RUN_FILES, RUN_LOCK, RUN_SIGNS
from mm_moslora.utils.untrusted_files import read_text

logger = logging.getLogger(__name__)

DEEPSPEED_ENV_FILE = "DS_ENV_FILE"
"""DeepSpeed's variable for the name of that file; absolute paths work, too."""
PASSED_ON = (
    "DS_", "GLOO_", "HF_", "LOCAL_KERNELS", "MKL_", "MM_MOSLORA_", "NCCL_", "OMP_", "PYTORCH_", "TENSORBOARD_",
    "TOKENIZERS_", "TORCH_", "TRACKIO_", "TRANSFORMERS_", "USE_HUB_KERNELS", "WANDB_",
)  # fmt: skip
"""Beginnings of the names of variables that the hosts of a host file get."""
SILENT_SECONDS = 60.0
STATE = "state.json"
DEEPSPEED, TORCHRUN = "deepspeed", "torchrun"
"""Kinds of commands of `run_tied`."""
STOPPED = "STOPPED"
"""File in a run folder: a signal, which its text names, stopped the run, and nothing is unsaved."""


def exported_lines(environment: Mapping[str, str]) -> str:
    """The content of a file for `DS_ENV_FILE`: variables to pass on, then the lines of the user's own files."""
    # By itself DeepSpeed exports variables that begin with MLFLOW, PYTHON, MV2, UCX and, with GPUs, NCCL, puts the
    # working folder on PYTHONPATH, and reads `.deepspeed_env` in the home and in the working folder. Here the working
    # folder has no say: its files may be somebody else's, and variables such as LD_PRELOAD run code. Names of secrets
    # are left out, since DeepSpeed writes all values into command lines, which other users of the hosts can read, and
    # values with line breaks, which such a file cannot hold.
    chosen = {
        name: value for name, value in environment.items() if name.startswith(PASSED_ON) and name != DEEPSPEED_ENV_FILE
    }
    exported = {name: value for name, value in chosen.items() if not is_secret_name(name) and "\n" not in value}
    if left_out := sorted(chosen.keys() - exported.keys()):
        logger.warning(
            "%s: not passed on to the hosts. Log in on each host (hf auth login, wandb login), or use a .deepspeed_env "
            "file.", ", ".join(left_out),
        )  # fmt: skip
    lines = [f"{name}={_escaped(value)}" for name, value in exported.items()]
    lines.append(f"PYTHONPATH={_escaped(environment.get('PYTHONPATH', ''))}")
    named = environment.get(DEEPSPEED_ENV_FILE)
    files = [Path.home() / ".deepspeed_env"] if named is None else [Path.home() / named, Path(named)]
    if named is None and Path(".deepspeed_env").is_file() and Path.cwd() != Path.home():
        logger.warning(".deepspeed_env of this folder is not read. Name it: DS_ENV_FILE=.deepspeed_env")
    for file in dict.fromkeys(files):
        if file.is_file():  # later lines win; DeepSpeed fails on lines without a value
            lines += [line for line in read_text(file).splitlines() if "=" in line]
    return "".join(f"{line}\n" for line in lines)


def _escaped(value: str) -> str:
    """A value that DeepSpeed's double quotes keep as it is."""
    return re.sub(r'([\\"$`])', r"\\\1", value)


def stopped_text(number: int) -> str:
    """The text of `STOPPED` for a signal."""
    name = signal.Signals(number).name
    texts = {"SIGINT": "Ctrl-C (SIGINT)", "SIGTERM": "SIGTERM, which launchers send for Ctrl-C and other signals, too"}
    return f"Stopped by {texts.get(name, name)}; nothing is unsaved. The same command continues the run.\n"


def leave_mark(run_folder: Path, number: int) -> None:
    """Mark a run folder as stopped before the run locked it; a folder of another program is left unchanged."""
    try:
        refuse_strangers(run_folder, RUN_FILES, kind="run", also=RUN_SIGNS)
        run_folder.mkdir(parents=True, exist_ok=True)
        os.close(open_in_place(run_folder / RUN_LOCK, os.O_WRONLY))  # marks the folder as a run's for the next start
        replace_text(run_folder / STOPPED, stopped_text(number))
        with contextlib.suppress(ValueError, KeyError, TypeError, OverflowError, FileNotFoundError):
            state = read_json(run_folder / STATE)  # of a process that was killed it says "running"
            runs_here = state["state"] == "running" and state["host"] == socket.gethostname()
            if runs_here and not is_running(int(state["process"]), started=state.get("started")):
                replace_json(run_folder / STATE, state | {"state": "stopped", "ended": time.time()})
    except (ConfigError, OSError) as error:
        logger.info("%s is not written: %s", run_folder / STOPPED, error)


def launch(
    topology: Topology,
    arguments: Sequence[str],
    *,
    run_folder: Path,
    log_folder: Path | None = None,
    dry_run: bool = False,
    requeue: Requeue | None = None,
) -> int:
    """Start the ranks and wait for them; returns 0 after a finished run, 75 after a stop, else the launcher's code."""
    words = command(topology, arguments)
    logger.info("%s", shlex.join(words))
    if dry_run:
        return 0
    mark = run_folder / STOPPED
    refuse_strangers(run_folder, (STOPPED,), kind="run", also=RUN_SIGNS)
    discard(mark)
    if requeue is not None:
        requeue.watch(run_folder)
    with _warning_of_silence(run_folder):
        ended = _run_ranks(topology, words, log_folder)
    # The code alone is not enough: DeepSpeed's runner reports success for a launcher that a signal ended.
    unsaved = bool(ended.signals) and not (ended.code == 0 and is_finished(run_folder))
    if not mark.exists() and not unsaved:
        return ended.code
    if not mark.exists():
        logger.info("Stopped by a signal without saving. The same command resumes from the newest checkpoint, if any.")
    return requeue.stopped(ended.signals, ExitStatus.STOPPED) if requeue is not None else ExitStatus.STOPPED


@contextlib.contextmanager
def _warning_of_silence(run_folder: Path) -> Iterator[None]:
    """Say once, after a minute, that the ranks have not met: then rank 0 writes the run's state."""
    before = _written(run_folder)

    def warn() -> None:
        if _written(run_folder) == before:
            logger.warning(
                "The ranks have not met within %g s. Either imports are slow, or "
                "a launcher waits: torchrun for all hosts, with the same --rdzv; srun for CPUs and GPUs on every node.",
                SILENT_SECONDS,
            )  # fmt: skip

    timer = threading.Timer(SILENT_SECONDS, warn)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _written(run_folder: Path) -> int:
    """When the state of a run was written; 0: never."""
    try:
        return (run_folder / STATE).stat().st_mtime_ns
    except OSError:
        return 0


def _run_ranks(topology: Topology, words: Sequence[str], log_folder: Path | None) -> Ended:
    """Run the command of the ranks in their environment."""
    environment = {
        "OMP_WAIT_POLICY": "passive", "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1",
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "300",
        # torchrun keeps one store over restarts, in which ranks would find the addresses of dead ranks.
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        # By default torchrun ends on SIGUSR1 and leaves its ranks; `--signal=USR1@SECONDS` of sbatch sends it there.
        "PET_SIGNALS_TO_HANDLE": "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1",
    } | child_environment()  # fmt: skip
    if log_folder is not None:
        environment[LOG_FOLDER] = str(log_folder.absolute())
    if topology.uses_deepspeed:
        environment = {"OMP_NUM_THREADS": "1"} | environment  # torchrun sets it, too
    elif topology.job is not None:
        # srun kills its step on SIGTERM, and ends with its job.
        return run_and_hand_on(
            words, request_stop=topology.job.terminate_step, kill=terminate, env=step_environment(environment),
            process_group=0,
        )  # fmt: skip
    with contextlib.ExitStack() as stack:
        if topology.hostfile is not None:
            file = stack.enter_context(tempfile.NamedTemporaryFile("w", prefix="deepspeed_env-", encoding="utf-8"))
            file.write(exported_lines(environment))
            file.flush()
            environment[DEEPSPEED_ENV_FILE] = file.name
        return run_tied(DEEPSPEED if topology.uses_deepspeed else TORCHRUN, words, environment)


def run_tied(kind: str, words: Sequence[str], changes: Mapping[str, str], **options: Any) -> Ended:
    """Run a launcher of ranks, which ends once this process is gone, however it ended; see `run_and_hand_on`."""
    # torchrun and DeepSpeed do not watch whether their parent is there: `main` is between, and asks them to end. In its
    # own process group: Ctrl-C reaches whole groups, and torchrun abandons its ranks on a second signal.
    tied = python_words("-m", "mm_moslora.launch.launcher", kind, *words)
    return run_and_hand_on(tied, begin=start_tied, changes=changes, **options)


def main() -> int:
    """Run the command of `run_tied`; returns its exit code, of one that a signal killed 128 and its number."""
    end_with_parent()
    kind, *words = sys.argv[1:]
    request_stop = end_deepspeed if kind == DEEPSPEED else terminate
    # In its own process group, which `end_deepspeed` signals.
    code = run_and_hand_on(words, request_stop=request_stop, process_group=0).code
    return code if code >= 0 else 128 - code


def is_finished(run_folder: Path) -> bool:
    """Whether a run has recorded its end."""
    try:
        return bool(read_json(run_folder / STATE)["state"] == "finished")
    except (OSError, ValueError, KeyError, TypeError):
        return False


def end_deepspeed(runner: int) -> None:
    """Ask a run under DeepSpeed's launcher to end, by the process id of the runner, which is also that of its group."""
    # On one machine DeepSpeed's runner forwards no signal: it would exit while the launcher below it and the ranks
    # train on. The signal therefore goes to that launcher, which ends its ranks, and the runner waits for it. With
    # several hosts the runner forwards signals itself.
    import psutil

    with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
        process = psutil.Process(runner)
        own = process.cmdline()
        commands = [(child, child.cmdline()) for child in process.children()]
        # A child without a command line, or with the same one, is a fork about to start another program.
        started = [(child, words) for child, words in commands if words not in ([], own)]
        launchers = [child for child, words in started if words[2:4] == ["-m", "deepspeed.launcher.launch"]]
        for child in launchers:
            child.terminate()
        if not started:  # it may be about to start the launcher
            os.killpg(runner, signal.SIGTERM)
        elif not launchers:
            process.terminate()


if __name__ == "__main__":
    sys.exit(main())
