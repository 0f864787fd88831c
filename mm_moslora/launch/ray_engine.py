"""Jobs on a Ray cluster, through Ray's public interface alone: https://docs.ray.io.

A task of Ray starts the job's command as a process of its node. Files are the result: the folder of the jobs is on a
file system that all nodes share, at the same path. Ray repeats the tasks of a node that is lost.
"""

from __future__ import annotations

import logging
import math
import os
import secrets
import signal
import socket
import time
from contextlib import chdir
from pathlib import Path
from typing import Any

from mm_moslora.launch.child_processes import kill_tree, output_of, python_words, terminate
from mm_moslora.launch.jobs import GRACE, THREADS, TRIES, End, Job, JobEngine, ProcessEngine, close, start_process
from mm_moslora.utils.errors import ConfigError, ExitStatus, reason_of
from mm_moslora.utils.files import writing_in_place
from mm_moslora.utils.package_requirements import install_extra
from mm_moslora.utils.untrusted_files import read_text

logger = logging.getLogger(__name__)

_PAUSE, _SECONDS, _SEEN_LATE = 0.2, 10.0, 90.0
"""Seconds between two polls of a process, to reach the cluster, and until a network file system shows an output."""
_CONNECT, _CONNECTED = (
    "import sys, ray; ray.init(sys.argv[1], log_to_driver=False, logging_level=40);"
    "print(ray.get_runtime_context().gcs_address)"
), 120.0  # fmt: skip
"""A program that connects to a cluster and prints its address, and its limit in seconds: Ray itself tries for a
quarter of an hour where a cluster is gone whose address is left, and cannot be interrupted."""
_OUTLIVES = {"RAY_kill_child_processes_on_worker_exit": "0"}
"""Ray kills its workers when this process is gone, but not their jobs then, which see it and save (`start_tied`)."""


def open_engine(ray: str, *, parallel: int | None) -> JobEngine:
    """The engine of a verb's options: a Ray cluster, or, without `ray`, `parallel` processes of this machine."""
    if ray and parallel is not None:
        raise ConfigError("--parallel is for this machine; with --ray, Ray starts what its nodes have room for.")
    return RayEngine(ray) if ray else ProcessEngine(parallel=parallel)


class RayEngine:
    """A running Ray cluster at the HOST:PORT of its head, or `auto` for the one of this machine."""

    def __init__(self, address: str) -> None:
        os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
        try:
            import ray
        except ImportError as error:
            raise ConfigError(f"--ray needs Ray: {install_extra('ray')}") from error
        if address == "local":
            raise ConfigError(
                "--ray local is no cluster that runs. Leave --ray out for this machine, or give its address."
            )
        _require_listener(address)
        try:
            root = Path("/")  # Ray puts the working folder first on its workers' module path
            tried = output_of(python_words("-c", _CONNECT, address), seconds=_CONNECTED, cwd=root)
            if tried.returncode:
                raise ConnectionError((tried.stderr.strip().splitlines() or [f"exit code {tried.returncode}"])[-1])
            found = address if "://" in address else tried.stdout.split()[-1]  # `auto` may lead elsewhere by now
            with chdir(root):
                ray.init(found, log_to_driver=False, logging_level=logging.ERROR, runtime_env={"env_vars": _OUTLIVES})
        except (ConnectionError, RuntimeError, ValueError, OSError) as error:
            late = isinstance(error, TimeoutError)
            why = f"not within {_CONNECTED:g} seconds" if late else reason_of(error)
            raise ConfigError(
                f"--ray {address}: no Ray cluster answers there ({why}). Start one with `ray "
                "start --head` and this command on one of its nodes, or give HOST:PORT of one that runs."
            ) from error
        self._ray = ray
        self._task = ray.remote(_run_on_node)
        self._running: dict[Any, Job] = {}
        self._warned = False

    @property
    def cards(self) -> int:
        """Accelerators of the cluster."""
        return int(self._ray.cluster_resources().get("GPU", 0))

    def width(self, cards: int) -> int:
        """Jobs with so many cards and one core each that run at the same time."""
        return sum(
            int(min(node.get("CPU", 0), node.get("GPU", 0) // cards if cards else node.get("CPU", 0)))
            for node in self._nodes()
        )

    def _nodes(self) -> list[dict[str, float]]:
        return [node["Resources"] for node in self._ray.nodes() if node["Alive"]]

    def takes(self, job: Job) -> bool:
        """True: Ray starts jobs when their cards and cores are free."""
        nodes = self._nodes()
        fits = any(node.get("CPU", 0) >= job.cores and node.get("GPU", 0) >= job.cards for node in nodes)
        if not fits and not self._warned:  # a cluster that grows on demand may bring one
            have = ", ".join(f"{node.get('CPU', 0):g} CPUs and {node.get('GPU', 0):g} GPUs" for node in nodes)
            logger.warning(
                "Jobs wait for a node with %d CPUs and %d GPUs. Ray's nodes have %s.", job.cores, job.cards, have
            )
        self._warned = self._warned or not fits
        return True

    def start(self, job: Job) -> None:
        """Queue a job; the sign in its log shows a node that it sees the same file system."""
        sign = f"Ray job {secrets.token_hex(8)}"
        job.log.parent.mkdir(parents=True, exist_ok=True)
        with writing_in_place(job.log, append=True) as log:
            log.write(f"{sign}\n")
        # Ray sets the first of them on its nodes.
        threads = {name: os.environ.get(name) for name in THREADS}
        task = self._task.options(num_cpus=job.cores, num_gpus=job.cards, max_retries=TRIES - 1, name=job.name)
        self._running[task.remote(job, sign, threads)] = job

    def wait(self, seconds: float) -> list[End]:
        """Wait until jobs end, up to a time limit; returns those that did."""
        over, _ = self._ray.wait(list(self._running), timeout=seconds)
        return [self._end(one) for one in over]

    def _end(self, one: Any) -> End:
        job = self._running.pop(one)
        try:
            code = self._ray.get(one)
        except self._ray.exceptions.TaskCancelledError:
            return End(job, ExitStatus.STOPPED)  # before it began
        except self._ray.exceptions.RayError as error:
            return End(job, 1, reason_of(getattr(error, "cause", None) or error))
        deadline = time.monotonic() + _SEEN_LATE
        while code == 0 and job.output is not None and not job.output.exists() and time.monotonic() < deadline:
            time.sleep(_PAUSE)
        return End(job, code)

    def stop(self) -> list[End]:
        """Ask the running jobs to save, wait for them, and leave the cluster."""
        for one in self._running:
            self._ray.cancel(one)
        deadline, ends = time.monotonic() + GRACE + _SECONDS, list[End]()
        while self._running and (left := deadline - time.monotonic()) > 0:
            ends += self.wait(left)
        ends += [End(job, 1, "its node does not answer") for job in self._running.values()]
        self._running.clear()
        self._ray.shutdown()
        return ends


def _require_listener(address: str) -> None:
    """Fail soon where nobody listens; Ray would try for a minute."""
    host, _, port = address.rpartition(":")
    if "/" in address or not port.isdecimal():  # auto, ray://HOST:PORT
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_SECONDS).close()
    except (OSError, OverflowError, UnicodeError) as error:  # the port, a long name
        why = getattr(error, "strerror", "") or error
        raise ConfigError(
            f"--ray {address}: nothing answers there ({why}). Give the address that `ray start --head` printed, or "
            "auto on a node of the cluster."
        ) from error


def _run_on_node(job: Job, sign: str, threads: dict[str, str | None]) -> int:
    """Run a job's command on this node; returns its exit code."""
    if not job.log.is_file() or sign not in read_text(job.log, errors="replace"):
        raise ConfigError(
            f"node {socket.gethostname()} does not see {job.log.parent}, which must be on a shared file system"
        )
    for name, value in threads.items():
        os.environ.pop(name, None)
        os.environ |= {} if value is None else {name: value}
    requests: list[int] = []
    # Ray cancels a task by SIGINT, which does nothing where `ray start` inherited that it is ignored, as behind `&`.
    signal.signal(signal.SIGINT, lambda number, _: requests.append(number))
    child, deadline = start_process(job, {}), math.inf
    while child.poll() is None:
        if requests and deadline == math.inf:
            terminate(child.pid)
            deadline = time.monotonic() + GRACE
        if time.monotonic() > deadline:
            kill_tree(child.pid)
        time.sleep(_PAUSE)
    return close(child)
