"""Pythons that start at once: commands on the disk; their processes are forked from one that has imported everything.

Importing PyTorch, transformers, PEFT and DeepSpeed takes a process ten seconds. A test of what the
process does then starts `python.ours`, or `python.stock`, which has imported nothing of ours, in place of
`sys.executable`. What is started is a process like any other: arguments, environment, working folder, open files,
signals and exit code are its own, and it ends when the command is killed. What libraries read from the environment
while they are imported is what the tests have there.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys
from pathlib import Path
from types import FrameType

CHECKOUT = Path(__file__).parents[2]
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)
"""What the command hands on to the process that it stands for."""
SECONDS_PER_STEP = "SECONDS_PER_STEP"
"""Variable for training that somebody waits for: each step takes so much longer, and costs nothing meanwhile."""

STOCK = (
    "diffusers", "peft", "peft.tuners.lora.bnb", "peft.utils.transformers_weight_conversion", "setuptools",
    "torch.profiler._cupti_monitor", "transformers.models.auto", "transformers.models.clip.modeling_clip",
    "transformers.models.dinov2.modeling_dinov2", "transformers.models.llama.modeling_llama",
    "transformers.models.llava.modeling_llava", "transformers.models.llava.processing_llava",
    "transformers.tokenization_mistral_common",
)  # fmt: skip
OURS = (
    "deepspeed", "deepspeed.module_inject.auto_ep_layer", "deepspeed.ops.op_builder.all_ops",
    "deepspeed.runtime.superoffload.superoffload_stage3", "deepspeed.runtime.zero.muon.muon_optimizer",
    "mm_moslora.cli", "mm_moslora.training.training_loop", "mm_moslora.tracking.wandb_tracker",
    "mm_moslora_eval.eval_commands",
    "mm_moslora_eval.run.in_training", "mm_moslora_eval.backends.open_model", "torch._subclasses.schema_check_mode",
)  # fmt: skip
"""What training, measuring and answering import, the greater part while they run."""


class Preloaded:
    """Two commands in a folder, and the process behind them. Use it in a `with` block."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ours, self.stock = folder / "ours", folder / "stock"
        self.log = folder / "log"

    def __enter__(self) -> Preloaded:
        import subprocess
        import tempfile

        self.folder.mkdir(parents=True, exist_ok=True)
        self.sockets = Path(tempfile.mkdtemp(prefix="python-"))  # the paths of sockets are at most 107 bytes long
        listeners = []
        for path in (self.stock, self.ours):
            place = self.sockets / path.name
            listeners.append(socket.socket(socket.AF_UNIX))
            listeners[-1].bind(str(place))
            listeners[-1].listen(64)
            path.write_text(f'#!/bin/sh\nexec "{sys.executable}" -IS "{__file__}" "$0" "{place}" "$@"\n')
            path.chmod(0o755)
        numbers = [listener.fileno() for listener in listeners]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, __file__, *map(str, numbers)], pass_fds=numbers, stdin=subprocess.PIPE, stdout=log,
                stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": _path()},
            )  # fmt: skip
        for listener in listeners:
            listener.close()
        return self

    def __exit__(self, *_: object) -> None:
        import shutil

        self.process.stdin.close()
        self.process.wait(timeout=120)
        shutil.rmtree(self.sockets)


def _path() -> str:
    return os.pathsep.join([str(CHECKOUT), str(CHECKOUT / "eval")])


def _stand_in(executable: str, place: str, arguments: list[str]) -> None:
    """Be the command: ask for the process, hand signals on, and end as it ends."""
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # none within the question, and some until it asks
    ignored = [int(number) for number in SIGNALS if signal.getsignal(number) is signal.SIG_IGN]
    files = [number for number in map(int, os.listdir("/proc/self/fd")) if _is_handed_on(number)]
    asked = {"executable": executable, "arguments": arguments, "folder": os.getcwd(), "ignored": ignored,
             "blocked": [*map(int, blocked)], "environment": dict(os.environ), "files": files}  # fmt: skip
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(place)

        def hand_on(number: int, _: FrameType | None) -> None:
            connection.send(bytes([number]))

        content = json.dumps(asked).encode()
        socket.send_fds(connection, [len(content).to_bytes(4, "little")], files)
        connection.sendall(content)
        for number in SIGNALS:  # also those that are ignored here: the process may handle them, whatever it was given
            signal.signal(number, hand_on)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        status = int.from_bytes(connection.recv(4), "little")
    if os.WIFSIGNALED(status):
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if os.WTERMSIG(status) != signal.SIGKILL:
            signal.signal(os.WTERMSIG(status), signal.SIG_DFL)
        os.kill(os.getpid(), os.WTERMSIG(status))
    os._exit(os.waitstatus_to_exitcode(status))


def _is_handed_on(file: int) -> bool:
    try:
        return os.get_inheritable(file)
    except OSError:  # it was that of the folder listed
        return False


def _serve(stock: int, ours: int) -> None:
    """Import what every process of ours needs, first without us, and fork what is asked for until the tests end."""
    import gc
    import select

    if 0 in select.select([0, stock, ours], [], [])[0]:  # the tests end, and none has asked
        return

    gc.disable()  # what is imported stays

    import torch
    from PIL import Image

    _import(STOCK)
    torch.set_num_threads(1)
    if os.fork():
        os.close(ours)
        gc.freeze()  # half a million objects that no process need search for garbage, and copy for it
        _answer(stock)
        return
    os.close(stock)
    _import(OURS)
    Image.init()
    _find_out()
    gc.freeze()
    _answer(ours)


def _import(names: tuple[str, ...]) -> None:
    """Import what there is of these: other versions of the libraries have other modules, and miss only speed."""
    import importlib

    for name in names:
        with contextlib.suppress(ModuleNotFoundError):
            importlib.import_module(name)


def _find_out() -> None:
    """Find out what each process would: patterns for the names of weights, operators that compile."""
    import deepspeed.ops

    assert deepspeed.ops.__compatible_ops__
    with contextlib.suppress(ImportError):
        from transformers.conversion_mapping import get_checkpoint_conversion_mapping

        get_checkpoint_conversion_mapping("llama")


def _answer(number: int) -> None:
    """Start what is asked for, pass signals to it, and tell how it ended, until the tests end.

    `gc` has been frozen, and looks for garbage again in what is forked.
    """
    import gc
    import select

    gc.enable()
    listener = socket.socket(fileno=number)
    started: dict[int, tuple[int, socket.socket]] = {}
    """Process id and connection, by the descriptors of the process and of the connection."""
    while True:
        ready, _, _ = select.select([listener, 0, *started], [], [])
        if 0 in ready:  # the tests' end of it is closed
            return
        if listener in ready:
            connection, _ = listener.accept()
            if process := _start(connection, [listener.fileno(), *started]):
                started |= dict.fromkeys((os.pidfd_open(process), connection.fileno()), (process, connection))
        for file in ready:
            if file in started:
                _hand_on(file, started)


def _hand_on(file: int, started: dict[int, tuple[int, socket.socket]]) -> None:
    """The end of a process to the command, or a signal to the process, which ends with the command."""
    process, connection = started[file]
    if file != connection.fileno():
        status = os.waitpid(process, 0)[1]
        with contextlib.suppress(OSError):  # the command is gone
            connection.send(status.to_bytes(4, "little"))
        started.pop(connection.fileno(), None)
        connection.close()
        del started[file]
        os.close(file)
        return
    numbers = connection.recv(1)
    os.kill(process, numbers[0] if numbers else signal.SIGKILL)
    if not numbers:
        del started[file]


def _start(connection: socket.socket, others: list[int]) -> int:
    """Fork what is asked for; gives the number of the process, 0 where the command was killed before it had asked."""
    head, files, _, _ = socket.recv_fds(connection, 4, 250)
    content, size = b"", int.from_bytes(head, "little")
    while part := connection.recv(size - len(content)):
        content += part
    if not head or len(content) < size:
        connection.close()
        for file in files:
            os.close(file)
        return 0
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # until the process has its own
    process = os.fork()
    if process == 0:
        for file in (0, connection.fileno(), *others):
            os.close(file)
        _become(json.loads(content), files)
    signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
    for file in files:
        os.close(file)
    return process


def _become(asked: dict, files: list[int]) -> None:
    """Run a Python's command line as the interpreter does: `-c CODE | -m MODULE | FILE`. Never returns."""
    import atexit
    import fcntl
    import threading
    import traceback

    import torch

    high = [fcntl.fcntl(file, fcntl.F_DUPFD_CLOEXEC, 512) for file in files]  # out of the way of the numbers wanted
    for file in files:
        os.close(file)
    for file, number in zip(high, asked["files"], strict=True):
        os.dup2(file, number)
        os.close(file)
    os.chdir(asked["folder"])
    os.environ.clear()
    os.environ.update(asked["environment"])
    for number in SIGNALS:  # not those of the tests, which a shell may have started with Ctrl-C ignored
        usual = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
        signal.signal(number, signal.SIG_IGN if number in asked["ignored"] else usual)
    signal.pthread_sigmask(signal.SIG_SETMASK, asked["blocked"])
    torch.set_num_threads(torch.get_num_threads())  # a fork leaves the pool without its threads
    code = 1
    try:
        _run(asked["executable"], asked["arguments"])
        code = 0
    except SystemExit as left:
        code = left.code if isinstance(left.code, int) else int(left.code is not None)
        if not isinstance(left.code, int | None):
            print(left.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    threading._shutdown()
    atexit._run_exitfuncs()
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except OSError:
        code = 120  # as the interpreter does
    os._exit(code & 0xFF)


def _step_slowly(seconds: float) -> None:
    import time

    from mm_moslora.training.engine import TrainingEngine

    step = TrainingEngine.queue

    def slowly(*arguments: object, **more: object) -> object:
        time.sleep(seconds)
        return step(*arguments, **more)

    TrainingEngine.queue = slowly


def _run(executable: str, arguments: list[str]) -> None:
    import multiprocessing.spawn
    import runpy
    from types import ModuleType

    sys.executable = executable  # what it starts is started at once, too
    multiprocessing.spawn.set_executable(executable)
    path = [entry for entry in sys.path[1:] if entry not in _path().split(os.pathsep)]
    path = [*filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep)), *path]
    safe = bool(os.environ.get("PYTHONSAFEPATH"))
    while arguments[0] in ("-u", "-B", "-P"):
        safe, arguments = safe or arguments[0] == "-P", arguments[1:]
    if seconds := float(os.environ.get(SECONDS_PER_STEP, 0)):
        _step_slowly(seconds)
    how, rest = arguments[0], arguments[1:]
    first = "" if how == "-c" else os.getcwd() if how == "-m" else str(Path(how).parent)
    sys.path[:] = path if safe else [first, *path]
    if how == "-c":
        sys.argv[:] = ["-c", *rest[1:]]
        sys.modules["__main__"] = ModuleType("__main__")
        exec(compile(rest[0], "<string>", "exec"), sys.modules["__main__"].__dict__)
    elif how == "-m":
        sys.argv[:] = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        assert not how.startswith("-"), f"{how} is an option that this Python does not know"
        sys.argv[:] = arguments
        runpy.run_path(how, run_name="__main__")


if __name__ == "__main__":
    if len(sys.argv) == 3:
        _serve(int(sys.argv[1]), int(sys.argv[2]))
    else:
        _stand_in(sys.argv[1], sys.argv[2], sys.argv[3:])
