"""A SLURM cluster of two nodes on this machine: Debian's slurmctld and slurmd, real jobs, no authentication."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ranks import free_port
from waiting import wait_until

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "srun", "scancel", "squeue", "scontrol")
WHY_NOT = "needs root and SLURM (Debian: apt-get install slurmctld slurmd slurm-client)"
NODES = "127.0.0.[1-2]"
"""Both are this machine: names that need no look-up."""
KILL_WAIT = 60
"""Seconds that SLURM gives the processes of a job that it has told to end."""


def available() -> bool:
    """Whether a cluster can be started here."""
    return os.geteuid() == 0 and all(shutil.which(program) for program in PROGRAMS)


class Cluster:
    """The partition `high` takes the nodes of `low` jobs away."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.daemons: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Cluster:
        (self.folder / "state").mkdir(parents=True)
        (self.folder / "slurm.conf").write_text(self._configuration())
        self._start("slurmctld", "-D")
        for number in (1, 2):
            self._start("slurmd", "-D", "-N", f"127.0.0.{number}")
        try:
            wait_until(lambda: self.ask("sinfo", "-h", "-p", "low", "-o", "%t %D") == "idle 2", "idle nodes")
        except AssertionError:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.ask("scancel", "--signal=KILL", "--full", "--user=root")
        self.ask("scancel", "--user=root")
        for daemon in reversed(self.daemons):
            daemon.terminate()
        for daemon in self.daemons:
            daemon.wait(timeout=60)

    @property
    def environment(self) -> dict[str, str]:
        return {**os.environ, "SLURM_CONF": str(self.folder / "slurm.conf")}

    def ask(self, *words: str) -> str:
        """The output of one of SLURM's commands."""
        done = subprocess.run(words, env=self.environment, capture_output=True, text=True, check=False, timeout=60)
        return done.stdout.strip()

    def announce_limit(self, job: str) -> None:
        """Signal a job's batch script as SLURM does before the time limit, with `--signal=B:USR1@SECONDS`."""
        self.ask("scancel", "--batch", "--signal=USR1", job)

    def submit(self, log: Path, *words: str) -> str:
        """Submit a batch job that appends to a log; returns its number."""
        command = ["sbatch", "--parsable", "--requeue", "--open-mode=append", f"--output={log}", *words]
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, check=False, timeout=60)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def show(self, job: str, key: str) -> str:
        """A field of `scontrol show job`."""
        fields = dict(word.split("=", 1) for word in self.ask("scontrol", "show", "job", job).split() if "=" in word)
        return fields.get(key, "")

    @contextmanager
    def job(self, log: Path, *words: str) -> Iterator[str]:
        """A job that is gone afterwards."""
        number = self.submit(log, *words)
        try:
            yield number
        finally:
            self.ask("scancel", "--signal=KILL", "--full", number)
            self.ask("scancel", number)
            wait_until(lambda: not self.ask("squeue", "-h", "-j", number), "the end of the job")

    def _start(self, *words: str) -> None:
        with (self.folder / f"{'-'.join(words)}.out").open("wb") as output:
            self.daemons.append(subprocess.Popen(words, env=self.environment, stdout=output, stderr=output))

    def _configuration(self) -> str:
        controller, *ports = (free_port() for _ in range(3))
        here, place = socket.gethostname(), self.folder
        return f"""ClusterName=test
SlurmctldHost={here}(127.0.0.1)
SlurmctldPort={controller}
AuthType=auth/none
AuthInfo=cred_expire=5
CredType=cred/none
SlurmUser=root
SlurmdUser=root
SlurmctldPidFile={place}/slurmctld.pid
SlurmdPidFile={place}/slurmd-%n.pid
StateSaveLocation={place}/state
SlurmdSpoolDir={place}/spool-%n
SlurmctldLogFile={place}/slurmctld.log
SlurmdLogFile={place}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
MailProg=/bin/true
ReturnToService=2
KillWait={KILL_WAIT}
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobCompType=jobcomp/none
SchedulerParameters=bf_interval=1,sched_interval=1,batch_sched_delay=0,sched_min_interval=0
NodeName={NODES} NodeHostname={here} NodeAddr=127.0.0.1 Port={",".join(map(str, ports))} CPUs=2 State=UNKNOWN
PartitionName=low Nodes={NODES} Default=YES PriorityTier=1 GraceTime=60
PartitionName=high Nodes={NODES} PriorityTier=10
"""
