"""Jobs of `odd_jobs`, and what they left."""

from __future__ import annotations

from pathlib import Path

import pytest

from mm_moslora.launch.jobs import Job, ProcessEngine, run_jobs

CHECKOUT = Path(__file__).parents[2]


def job(below: Path, kind: str, name: str = "", **changes) -> Job:
    place = below / (name or kind)
    command = ("tests.launch.odd_jobs", kind, str(place))
    return Job(name=place.name, command=command, log=place / "log.txt", output=place / "output", **changes)


def fake_devices(monkeypatch: pytest.MonkeyPatch, count: int, visible: str = "") -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: count > 0)
    monkeypatch.setattr("torch.cuda.device_count", lambda: count)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)


def ends(jobs: list[Job], engine=None) -> tuple[dict[str, str], dict[str, str]]:
    """What `run_jobs` returns, and what it told by job."""
    told: dict[str, str] = {}
    failed = run_jobs(
        lambda: jobs, engine or ProcessEngine(parallel=2), over=lambda one, why: told.update({one.name: why})
    )
    return failed, told


def starts(folder: Path, name: str) -> list[list[str]]:
    return [line.split(" ") for line in (folder / name / "starts").read_text().splitlines()]
