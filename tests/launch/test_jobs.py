"""Jobs as processes of this machine: failures, retries, accelerators, stopping."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from waiting import wait_until

from mm_moslora.launch import jobs as module
from mm_moslora.launch.jobs import Job, ProcessEngine, run_jobs
from mm_moslora.utils.errors import ConfigError
from tests.launch.job_runs import CHECKOUT, ends, fake_devices, job, starts


@pytest.fixture(autouse=True)
def _commands_of_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", f"{CHECKOUT}:{CHECKOUT / 'eval'}")


def test_a_job_that_fails_three_times_is_named_and_the_others_go_on(tmp_path: Path) -> None:
    kinds = ("dies", "works", "fails", "forgets", "dies-twice")
    failed, told = ends([job(tmp_path, kind) for kind in kinds])
    assert told == failed | {"works": "", "dies-twice": ""}
    assert set(failed) == {"dies", "fails", "forgets"}
    assert failed["dies"].startswith("the process was ended by signal 9; signal 9 often means")
    assert failed["fails"] == f"the process ended with code 4; see {tmp_path / 'fails' / 'log.txt'}"
    assert "ended without" in failed["forgets"]
    assert "this went wrong" in (tmp_path / "fails" / "log.txt").read_text()
    assert {kind: len(starts(tmp_path, kind)) for kind in kinds} == {
        "dies": 3, "works": 1, "fails": 3, "forgets": 3, "dies-twice": 3,
    }  # fmt: skip


def test_jobs_that_others_bring_about_run_in_the_same_call(tmp_path: Path) -> None:
    def known() -> list[Job]:
        first = job(tmp_path, "works", "first")
        return [first, *([job(tmp_path, "works", "second")] if first.output.exists() else [])]

    assert run_jobs(known, ProcessEngine(), over=lambda *_: None) == {}
    assert (tmp_path / "second" / "output").exists()
    assert len(starts(tmp_path, "first")) == 1


def test_each_job_has_accelerators_of_its_own_and_its_folder(tmp_path: Path, monkeypatch) -> None:
    fake_devices(monkeypatch, 5, visible="3,GPU-5,7,8,9")
    engine = ProcessEngine()
    assert (engine.cards, engine.width(2), engine.width(0)) == (5, 2, 5)
    monkeypatch.setattr(module, "_PAUSE", 0.5)  # all three start before one has ended
    jobs = [job(tmp_path, "works", name, cards=2, folder=tmp_path) for name in ("a", "b", "c")]
    assert ends(jobs, engine)[0] == {}
    told = {name: starts(tmp_path, name)[0][1:] for name in ("a", "b", "c")}
    assert {told["a"][0], told["b"][0]} == {"3,GPU-5", "7,8"}
    assert told["a"][1] == str(tmp_path)
    with pytest.raises(ConfigError, match="needs 6 accelerators, but there are 5 here"):
        ends([job(tmp_path, "works", "d", cards=6)], engine)
    with pytest.raises(ConfigError, match="--parallel is 0, expected 1 or more"):
        ProcessEngine(parallel=0)
    fake_devices(monkeypatch, 0)
    assert (ProcessEngine(parallel=3).width(0), ProcessEngine().width(0), ProcessEngine().cards) == (3, 1, 0)


def test_a_stop_lets_running_jobs_save_and_the_same_call_continues(tmp_path: Path, caplog) -> None:
    jobs = [job(tmp_path, "saves"), job(tmp_path, "works", "next")]
    told: list[str] = []
    run = {"over": lambda one, _: told.append(one.name), "stop": (tmp_path / "saves" / "ready").exists}
    assert run_jobs(lambda: jobs, ProcessEngine(parallel=1), **run) == {}
    assert (tmp_path / "saves" / "saved").exists()
    assert not (tmp_path / "next").exists()
    (tmp_path / "saves" / "done").touch()
    assert told == []
    assert caplog.messages == []
    assert ends(jobs) == ({}, {"saves": "", "next": ""})


def test_a_job_that_cannot_start_fails_and_the_others_go_on(tmp_path: Path, monkeypatch) -> None:
    fake_devices(monkeypatch, 1)
    log, gone = job(tmp_path, "works", "log", cards=1), job(tmp_path, "works", "gone", folder=tmp_path / "no", cards=1)
    log.log.mkdir(parents=True)
    failed, told = ends([log, gone, job(tmp_path, "works", cards=1)], ProcessEngine())
    assert told == failed | {"works": ""}
    assert failed["log"].startswith("it did not start: ")
    assert "no'" in failed["gone"]


def test_what_does_not_end_when_asked_is_killed_and_named(tmp_path: Path, monkeypatch, caplog) -> None:
    monkeypatch.setattr(module, "GRACE", 1.0)
    run_jobs(lambda: [job(tmp_path, "ignores")], ProcessEngine(), over=lambda *_: None,
             stop=(tmp_path / "ignores" / "ready").exists)  # fmt: skip
    assert not (tmp_path / "ignores" / "output").exists(), "it came to its end"
    assert not Path(f"/proc/{starts(tmp_path, 'ignores')[0][0]}").exists()
    assert "ignores did not save when it was asked to (killed, as after 1 s)" in caplog.text


def test_a_killed_parent_leaves_no_process_behind(tmp_path: Path) -> None:
    """The kernel's killer for want of memory chooses the parent, say."""
    program = (
        "import sys; from pathlib import Path; from tests.launch.job_runs import job, ends;"
        "ends([job(Path(sys.argv[1]), 'saves')])"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    parent = subprocess.Popen([sys.executable, "-P", "-c", program, str(tmp_path)], env=environment)
    wait_until((tmp_path / "saves" / "ready").exists, "the job did not begin", process=parent)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    wait_until((tmp_path / "saves" / "saved").exists, "the job outlived its parent")
