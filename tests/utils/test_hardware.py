"""What the machine gives a process."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from mm_moslora.utils import hardware

FORKS = """
import os, torch
from mm_moslora.utils.hardware import renew_threads
torch.set_num_threads(6)
torch.ones(100_000).to(torch.bfloat16)
process = os.fork()
if process == 0:
    before = len(os.listdir("/proc/self/task"))
    renew_threads()
    after = len(os.listdir("/proc/self/task"))
    os._exit(0 if (before, after, torch.get_num_threads()) == (1, 6, 6) else 1)
raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]))
"""


def test_a_forked_process_has_a_thread_pool_before_its_first_thread():
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    subprocess.run([sys.executable, "-c", FORKS], check=True, env=environment, timeout=120)


@pytest.mark.parametrize(
    ("cores", "ranks", "free_gib", "expected"),
    [(16, 1, 60, 8), (128, 8, 60, 8), (48, 8, 60, 4), (16, 8, 60, 0), (2, 1, 60, 0), (16, 1, 0.06, 0), (64, 8, 7, 0)],
)
def test_processes_for_data_leave_cores_and_shared_memory(
    cores: int, ranks: int, free_gib: float, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free_gib * 2**30))
    monkeypatch.setattr(hardware, "SHARED_MEMORY", Path("/"))
    assert hardware.spare_cores(ranks) == expected


def test_the_allocator_grows_segments_unless_the_user_sets_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in hardware.ALLOCATOR:
        monkeypatch.setenv(name, "")  # restored afterwards
        monkeypatch.delenv(name)
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:64")
    hardware.let_segments_grow()
    assert "PYTORCH_ALLOC_CONF" not in os.environ
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF")
    hardware.let_segments_grow()
    assert os.environ["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
