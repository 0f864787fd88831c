"""What the machine gives a process."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from mm_moslora.utils import hardware


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
