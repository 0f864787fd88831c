"""A benchmark ends when the process that started it is gone, and stays under nohup."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from waiting import stays, wait_until

BENCH = Path(__file__).parents[2] / "scripts" / "bench"
CHILD = (
    "import os, pathlib, sys, time; from parent import end_with_parent; end_with_parent(seconds=0.05);"
    "pathlib.Path('pid').write_text(str(os.getpid())); time.sleep(300)"
)


@pytest.mark.parametrize("nohup", [False, True])
def test_a_benchmark_ends_with_its_parent_unless_nohup_says_otherwise(tmp_path: Path, nohup: bool) -> None:
    started = [*(["nohup"] if nohup else []), sys.executable, "-c", CHILD]
    attended = (
        "import signal, subprocess, sys; signal.signal(signal.SIGHUP, signal.SIG_DFL); subprocess.run(sys.argv[1:])"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", attended, *started],  # also where the tests themselves run under nohup
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(BENCH)},
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    pid = tmp_path / "pid"
    child = int(wait_until(lambda: pid.is_file() and pid.read_text(), process=parent))
    parent.kill()
    parent.wait()
    try:
        if nohup:
            stays(lambda: alive(child), 1)
        else:
            wait_until(lambda: not alive(child))
    finally:
        if alive(child):
            os.kill(child, 9)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
