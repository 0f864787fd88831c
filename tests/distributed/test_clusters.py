"""Host files for real, on this machine: `ssh` and `pdsh` on the PATH start processes here. SLURM: `test_slurm.py`."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from preloaded import Preloaded
from trials import make_recipe, metrics, write
from waiting import wait_until

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]

SSH = """
while [[ "$1" == -* ]]; do [[ "$1" == -o || "$1" == -p ]] && shift; shift; done
shift
[ "$*" = "hostname -I" ] && { echo 127.0.0.1; exit; }
exec bash -c "$*"
"""
PDSH = """
while [[ "$1" == -* ]]; do
  case "$1" in -w) hosts=$2; shift 2 ;; -f) shift 2 ;; *) shift ;; esac
done
echo "$hosts" >"$CLUSTER/hosts"
IFS=, read -ra names <<<"$hosts"
pids=() code=0
for number in "${!names[@]}"; do
  bash -c "${*//%n/$number}" & pids+=($!)
done
for pid in "${pids[@]}"; do wait "$pid" || code=$?; done
exit "$code"
"""


@pytest.fixture
def cluster(tmp_path: Path, python: Preloaded) -> dict[str, str]:
    """The environment of somebody who is logged in to a cluster."""
    tools = tmp_path / "bin"
    tools.mkdir()
    scripts = {"ssh": SSH, "pdsh": PDSH}
    for name, text in scripts.items():
        (tools / name).write_text(f"#!/usr/bin/env bash\nset -u\n{text}")
        (tools / name).chmod(0o755)
    return os.environ | {
        "PATH": f"{tools}:{os.environ['PATH']}", "CLUSTER": str(tmp_path), "PYTHON": str(python.ours), "NPROC": "1",
        "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": f"{ROOT}:{ROOT / 'eval'}",
    }  # fmt: skip


@contextmanager
def started(command: list[str], environment: dict[str, str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A command; its processes are all gone afterwards."""
    process = subprocess.Popen(
        command, env=environment, cwd=ROOT, stdout=log.open("wb"), stderr=subprocess.STDOUT, start_new_session=True
    )
    try:
        yield process
    finally:
        for other in psutil.process_iter():  # launchers put what they start into groups of their own
            with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
                if os.getsid(other.pid) == process.pid:
                    other.kill()
        process.wait()


def has_stepped(run: Path) -> bool:
    return (run / "metrics.jsonl").is_file() and '"loss"' in (run / "metrics.jsonl").read_text()


def test_the_hosts_of_a_host_file_train_together(parts, cluster, tmp_path):
    recipe = make_recipe(parts, tmp_path / "run", "zero2", steps=2)
    hosts = tmp_path / "hosts.txt"
    hosts.write_text("worker-1 slots=1\nworker-2 slots=1\n")
    log = tmp_path / "log"
    command = ["bash", str(ROOT / "scripts" / "train_deepspeed.sh"), "--hostfile", str(hosts), write(recipe)]
    with started(command, cluster, log) as process:
        assert process.wait(timeout=300) == 0, log.read_text()[-3000:]
    assert (tmp_path / "hosts").read_text().split() == ["worker-1,worker-2"]
    said = log.read_text()
    assert 1024 <= int(re.search(r"--master_port (\d+)", said)[1]) < 65536
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["world_size"] == 2
    assert len(metrics(tmp_path / "run")) == 2


def test_a_host_file_of_this_machine_alone_trains_here_and_saves_when_it_is_stopped(parts, cluster, tmp_path):
    """By processes of its own, not forked ones: parents and children are the point."""
    run, log, hosts = tmp_path / "run", tmp_path / "log", tmp_path / "hosts.txt"
    hosts.write_text("localhost slots=2\n")
    recipe = write(make_recipe(parts, run, "zero2", steps=2000))
    command = [sys.executable, "-m", "mm_moslora", "launch", "--hostfile", str(hosts), recipe]
    with started(command, cluster | {"PYTHON": sys.executable}, log) as process:
        wait_until(lambda: has_stepped(run), log.read_text, process=process)
        process.terminate()
        assert process.wait(timeout=120) == 75, log.read_text()[-3000:]
    (checkpoint,) = run.glob("checkpoint-*")
    assert checkpoint.name == f"checkpoint-{len(metrics(run)):06d}"
    assert json.loads((run / "summary.json").read_text())["world_size"] == 2


def test_torchrun_started_by_hand_has_a_code_of_its_own_and_the_folder_says_what_came_of_the_run(
    parts, cluster, tmp_path
):
    """Told to end, it exits with 1 and a traceback, whatever its ranks do: see docs/reliability.md."""
    run, log = tmp_path / "run", tmp_path / "log"
    recipe = write(make_recipe(parts, run, "zero2", steps=2000))
    torchrun = [cluster["PYTHON"], "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]

    def told(*, stepped: bool) -> str:
        with started([*torchrun, "-m", "mm_moslora", "train", recipe], cluster, log) as process:
            beat = run / "heartbeat" / "rank-00001.json"
            wait_until(lambda: has_stepped(run) if stepped else beat.exists(), log.read_text, process=process)
            process.terminate()
            assert process.wait(timeout=240) == 1
        return str(json.loads((run / "state.json").read_text())["state"])

    assert told(stepped=False) == "running"  # of a process that is gone: ended while it loaded
    assert not (run / "STOPPED").exists()
    assert told(stepped=True) == "stopped"
    assert (run / "STOPPED").exists()
    assert len(list(run.glob("checkpoint-*"))) == 1
