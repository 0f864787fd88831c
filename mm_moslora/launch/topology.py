"""Where a run's ranks are: processes, hosts, SLURM jobs, containers; and the command that starts them there."""

from __future__ import annotations

import os
import random
import re
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mm_moslora.launch.child_processes import python_words
from mm_moslora.launch.imported_code import import_words
from mm_moslora.launch.slurm_job import SlurmJob, refuse_options
from mm_moslora.utils.errors import ConfigError
from mm_moslora.utils.text_format import LARGEST_PORT, whole_number
from mm_moslora.utils.untrusted_files import read_text

HOST = r"[^\s-]\S*"
"""Pattern of a host's name. ssh and launchers would take a name that begins with `-` for an option."""


@dataclass(frozen=True, kw_only=True)
class Topology:
    """The processes and hosts of a run."""

    nproc: int | None = None
    """Processes on each host; None: one per accelerator of that host, or one."""
    nnodes: int = 1
    """Number of hosts; the same command runs on each."""
    rdzv: str | None = None
    """HOST:PORT of the rendezvous."""
    rdzv_id: str | None = None
    """Distinguishes runs with the same rendezvous; None: mm-moslora."""
    local_addr: str | None = None
    """Address of this host, where its name resolves to another one."""
    deepspeed: bool = False
    """DeepSpeed's launcher instead of torchrun."""
    hostfile: Path | None = None
    """File with lines such as `worker-1 slots=8`; the deepspeed launcher starts the ranks there through ssh."""
    max_restarts: int = 0
    """Maximum number of restarts from the newest checkpoint after a rank dies or hangs."""
    through: tuple[str, ...] = ()
    """Words before the command on every host: a container, or a script that ends with `exec "$@"`."""
    python: str = sys.executable
    """Python of the ranks; in a container it has another path."""
    srun: tuple[str, ...] = ()
    """Further options of srun."""
    job: SlurmJob | None = None
    """The SLURM job that runs the ranks on its nodes; None: this machine, or the hosts in the other fields."""

    def __post_init__(self) -> None:
        for name, least in (("nproc", 1), ("nnodes", 1), ("max_restarts", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f"--{name.replace('_', '-')} is {value}, expected {least} or more.")
        if self.rdzv is not None and not _is_address(self.rdzv):
            raise ConfigError(f"--rdzv is {self.rdzv!r}, expected HOST:PORT such as node-1:29400.")
        for name in ("rdzv", "rdzv_id", "local_addr"):
            if (value := getattr(self, name)) is not None and self.nnodes == 1:
                raise ConfigError(
                    f"--{name.replace('_', '-')} {value} is for several hosts, but --nnodes is 1. Give --nnodes, too."
                )
        if self.nnodes > 1 and self.rdzv is None:
            raise ConfigError(f"--nnodes is {self.nnodes}, but no --rdzv HOST:PORT is given. Give --rdzv, too.")
        if self.srun and self.job is None:
            raise ConfigError("--srun is for SLURM jobs, but SLURM_JOB_ID or srun is missing here. Leave it out.")
        refuse_options(self.srun)
        self._check_deepspeed()

    def _check_deepspeed(self) -> None:
        if self.hostfile is not None and not self.hostfile.is_file():
            raise ConfigError(f"--hostfile {self.hostfile} does not exist.")
        if self.hostfile is not None:
            _check_hosts(self.hostfile)
        if not self.uses_deepspeed:
            return
        name = "--deepspeed" if self.hostfile is None else "--hostfile"
        if self.nnodes > 1:
            raise ConfigError(f"{name} and --nnodes are two ways to start ranks; give one of them.")
        if self.max_restarts:
            raise ConfigError(f"--max-restarts needs torchrun; the deepspeed launcher of {name} cannot restart.")
        if self.through:
            raise ConfigError(f"--through needs torchrun; the deepspeed launcher of {name} starts ranks by itself.")

    @property
    def uses_deepspeed(self) -> bool:
        """Whether DeepSpeed's launcher starts the ranks."""
        return self.deepspeed or self.hostfile is not None


def _check_hosts(hostfile: Path) -> None:
    lines = [line.partition("#")[0].strip() for line in read_text(hostfile, errors="replace").splitlines()]
    wrong = [line for line in lines if line and not re.fullmatch(rf"{HOST}\s+slots=[1-9]\d*", line)]
    if wrong or not any(lines):
        fault = f"holds {wrong[0]!r}" if wrong else "names no host"
        raise ConfigError(f"--hostfile {hostfile} {fault}, expected lines such as 'worker-1 slots=8'.")


def _is_address(text: str) -> bool:
    """Whether the text has the form HOST:PORT."""
    host, _, port = text.rpartition(":")
    return bool(re.fullmatch(HOST, host)) and port.isascii() and port.isdigit() and 0 < int(port) <= LARGEST_PORT


def accelerators() -> int:
    """Number of accelerators that are visible to this process."""
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def command(topology: Topology, arguments: Sequence[str]) -> list[str]:
    """The command that starts the ranks: their verb and its arguments."""
    imports = import_words()
    if topology.uses_deepspeed:
        where = (
            ["--hostfile", str(topology.hostfile)]
            if topology.hostfile
            else ["--num_gpus", str(_local_processes(topology))]
        )
        return [
            *python_words("-m", "deepspeed.launcher.runner", python=topology.python),
            "--master_port", str(_master_port()), "--no_local_rank", *where, "--module", "mm_moslora",
            *imports, *arguments,
        ]  # fmt: skip
    rank = python_words("-u", "-m", "mm_moslora", *imports, *arguments, python=topology.python)
    # torchrun would start `python -m` without -P, and a container may drop PYTHONSAFEPATH.
    torchrun = [*topology.through, *python_words("-m", "torch.distributed.run", python=topology.python), "--no-python"]
    if topology.max_restarts:
        torchrun += ["--max_restarts", str(topology.max_restarts)]
    if topology.job is not None:
        # Every node counts its own GPUs.
        counted = topology.nproc or ("gpu" if topology.job.gpus_on_node or accelerators() else 1)
        meet = topology.job.rendezvous()
        return [*topology.job.srun(), *topology.srun, *torchrun, "--nproc_per_node", str(counted), *meet, *rank]
    nproc = _local_processes(topology)
    torchrun += ["--nproc_per_node", str(nproc)]
    if topology.nnodes > 1:
        torchrun += ["--nnodes", str(topology.nnodes), "--rdzv_backend", "c10d", "--rdzv_endpoint", str(topology.rdzv)]
        torchrun += ["--rdzv_id", topology.rdzv_id or "mm-moslora"]
        torchrun += ["--local_addr", topology.local_addr] if topology.local_addr else []
        return [*torchrun, *rank]
    if nproc == 1 and not topology.max_restarts:
        return [*topology.through, *rank]
    return [*torchrun, "--standalone", *rank]


def _local_processes(topology: Topology) -> int:
    """Processes on this host."""
    return topology.nproc or max(1, accelerators())


def _master_port() -> int:
    """$MASTER_PORT, or a free one."""
    return whole_number(os.environ, "MASTER_PORT", 0, least=1, most=LARGEST_PORT) or free_port()


def free_port() -> int:
    """A port of this machine below the ephemeral ones of Linux, so that it stays free until somebody listens there."""
    while True:
        port = random.SystemRandom().randrange(15000, 32768)  # not the seed of a run
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)):
                return port
