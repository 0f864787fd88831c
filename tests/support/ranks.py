"""Groups of real processes that train together, started in a second: forked from one process that has imported it all.

`Ranks` starts that process; each `start` forks one process per rank with the environment that a launcher would set.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import socket
import subprocess
import sys
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path

CHECKOUT = Path(__file__).parents[2]

PATH = ("", "eval", "tests", "tests/support", "tests/builders", "tests/distributed", "scripts/soak")


def python_path() -> str:
    """Where processes of the tests import from; packages that were carried to a machine lie behind it."""
    given = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    return os.pathsep.join([*(str(CHECKOUT / part) for part in PATH), *given])


@dataclass
class Group:
    """The processes of one run."""

    pids: list[int]
    log: Path
    statuses: dict[int, int] = field(default_factory=dict)

    @property
    def codes(self) -> list[int]:
        """Exit codes by rank; negative: killed by that signal."""
        return [os.waitstatus_to_exitcode(self.statuses[pid]) for pid in self.pids]

    def output(self, rank: int) -> str:
        return Path(f"{self.log}.{rank}").read_text(errors="replace")

    @property
    def outputs(self) -> str:
        return "\n".join(f"--- rank {rank}\n{self.output(rank)[-3000:]}" for rank in range(len(self.pids)))


class Ranks:
    """Starts groups of ranks, one group at a time. Use it in a `with` block."""

    def __init__(self, folder: Path, python: Path | str | None = None) -> None:
        self.folder, self.number = folder, 0
        self.python = python or os.environ.get("PYTHON", sys.executable)
        self.unfinished: Group | None = None
        folder.mkdir(parents=True, exist_ok=True)

    def __enter__(self) -> Ranks:
        environment = {
            **os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "DS_ACCELERATOR": "cpu",
            "PYTHONPATH": python_path(),
        }  # fmt: skip
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
            environment.pop(name, None)
        self.process = subprocess.Popen(
            [self.python, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
            stderr=(self.folder / "parent.log").open("w"),
        )  # fmt: skip
        return self

    def __exit__(self, *_: object) -> None:
        if self.unfinished is not None:
            self._abandon(self.unfinished)
        self.process.stdin.close()
        self.process.wait(timeout=120)

    def start(self, arguments: list[str], *, ranks: int = 2, hosts: list | None = None) -> Group:
        """Start `mm-moslora`-like training of recipes on some ranks; see `train_recipes` for the arguments.

        With `hosts` (of `test_two_hosts`) each rank runs in the network namespace of its host.
        """
        if self.unfinished is not None:  # a test failed between `start` and `finish`; its answer is not ours
            self._abandon(self.unfinished)
        self.number += 1
        log = self.folder / f"group-{self.number}"
        self.process.stdin.write(
            json.dumps(
                {
                    "ranks": ranks, "port": free_port(), "log": str(log), "arguments": arguments,
                    "hosts": [{"namespace": h.namespace, "address": h.address, "interface": h.interface} for h in hosts]
                    if hosts else None,
                }
            ) + "\n"
        )  # fmt: skip
        self.process.stdin.flush()
        self.unfinished = Group(pids=self._read()["pids"], log=log)
        return self.unfinished

    def finish(self, group: Group, *, limit: float = 240) -> Group:
        """Wait for all ranks; past the limit they are killed and it is an error."""
        deadline = time.monotonic() + limit
        import select

        while not select.select([self.process.stdout], [], [], 0.2)[0]:
            if time.monotonic() > deadline:
                outputs = group.outputs  # what they say once others are killed would mislead
                self._abandon(group)
                raise AssertionError(f"The ranks took more than {limit} s.\n{outputs}")
        group.statuses = {int(pid): status for pid, status in self._read()["statuses"].items()}
        self.unfinished = None
        return group

    def _abandon(self, group: Group) -> None:
        import psutil

        for pid in group.pids:
            with contextlib.suppress(psutil.NoSuchProcess):
                process = psutil.Process(pid)
                if process.ppid() == self.process.pid:  # else another process, which has the number now
                    process.kill()
        self._read()
        self.unfinished = None

    def run(self, arguments: list[str], *, ranks: int = 2, limit: float = 240) -> Group:
        """Start, wait, and fail unless every rank ended well."""
        group = self.finish(self.start(arguments, ranks=ranks), limit=limit)
        assert group.codes == [0] * ranks, group.outputs
        return group

    def _read(self) -> dict:
        line = self.process.stdout.readline()
        assert line, (self.folder / "parent.log").read_text()
        return json.loads(line)


_GIVEN: set[int] = set()


def free_port() -> int:
    """One that nobody is given before rank 0 listens there: Linux hands out those from 32768 by itself."""
    while True:
        port = random.SystemRandom().randrange(10_000, 20_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("", port))
            if port not in _GIVEN:
                _GIVEN.add(port)
                return port


def train_recipes(arguments: list[str]) -> int:
    """Train recipes one after the other: `RECIPE[@STOP]`, or `module:function ARG ...` to call something else."""
    import importlib
    import logging

    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(message)s", force=True)
    if ":" in arguments[0] and not Path(arguments[0].partition("@")[0]).exists():
        module, _, function = arguments[0].partition(":")
        return getattr(importlib.import_module(module), function)(*arguments[1:]) or 0
    from mm_moslora.config import load_recipe
    from mm_moslora.training.training_loop import train

    for argument in arguments:
        path, _, stop_at = argument.partition("@")
        train(load_recipe(path), stop_at=int(stop_at) if stop_at else None)
    return 0


def _rank(command: dict, rank: int) -> None:
    """What a forked process does; it never returns."""
    import torch

    code = 1
    try:
        log = os.open(f"{command['log']}.{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.environ |= {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(command["ranks"]),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(command["port"]),
        }  # fmt: skip
        if command["hosts"]:
            _enter(command["hosts"][rank], command["hosts"][0])
        torch.set_num_threads(torch.get_num_threads())  # a fork leaves the pool without its threads
        code = train_recipes(command["arguments"])
        import torch.distributed as dist

        if dist.is_initialized():
            dist.destroy_process_group()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def _enter(host: dict, first: dict) -> None:
    """Move this process to a host; the first rank's host is where all meet."""
    import ctypes

    with open(host["namespace"]) as file:
        if ctypes.CDLL(None, use_errno=True).setns(file.fileno(), 0x40000000) != 0:
            raise OSError(ctypes.get_errno(), "setns")
    os.environ |= {"MASTER_ADDR": first["address"], "GLOO_SOCKET_IFNAME": host["interface"]}


def _serve() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever libraries print is no answer

    import gc

    import deepspeed  # noqa: F401
    import torch
    import transformers.models.dinov2.modeling_dinov2
    import transformers.models.llama.modeling_llama
    import transformers.models.llava.modeling_llava
    import transformers.models.llava.processing_llava
    import transformers.tokenization_mistral_common  # noqa: F401  (a processor imports it)

    import mm_moslora.training.training_loop  # noqa: F401

    torch.set_num_threads(1)
    gc.freeze()  # half a million objects that no rank need search for garbage, and copy for it
    for line in sys.stdin:
        command = json.loads(line)
        pids = []
        for rank in range(command["ranks"]):
            Path(f"{command['log']}.{rank}").touch()  # a test may look before the rank has begun
            pid = os.fork()
            if pid == 0:
                _rank(command, rank)
            pids.append(pid)
        print(json.dumps({"pids": pids}), file=answers, flush=True)
        statuses = {}
        while len(statuses) < len(pids):
            pid, status = os.wait()
            statuses[pid] = status
        print(json.dumps({"statuses": statuses}), file=answers, flush=True)


if __name__ == "__main__":
    _serve()
