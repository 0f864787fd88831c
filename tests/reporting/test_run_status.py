"""The state of a run, from its records and the heartbeats of its ranks on this host and others."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from mm_moslora.launch.heartbeat import process_start, read_heartbeats
from mm_moslora.reporting import build_report, load_run
from mm_moslora.reporting.run_status import read_state
from mm_moslora.reporting.summary_text import standing
from mm_moslora.utils.errors import ConfigError

ELSEWHERE = "node2"


def write_state(folder: Path, *, age: float = 10_000, **content: Any) -> None:
    """Write a `state.json` of the given age in seconds."""
    folder.mkdir(parents=True, exist_ok=True)
    written = {"state": "running", "process": 77, "host": ELSEWHERE, "since": time.time() - age} | content
    (folder / "state.json").write_text(json.dumps(written))
    os.utime(folder / "state.json", (time.time() - age,) * 2)


def beat(folder: Path, rank: int, *, age: float, phase: str = "step", host: str = ELSEWHERE, **more: Any) -> None:
    """Write the heartbeat of a rank, of the given age in seconds."""
    (folder / "heartbeat").mkdir(exist_ok=True)
    path = folder / "heartbeat" / f"rank-{rank:05d}.json"
    path.write_text(json.dumps({"rank": rank, "host": host, "pid": 77, "step": 12, "phase": phase} | more))
    os.utime(path, (time.time() - age,) * 2)


def test_a_run_of_another_host_with_heartbeats_is_running(tmp_path: Path) -> None:
    """Metrics may be hours old, in a long validation or with a large `log_every`."""
    write_state(tmp_path)
    beat(tmp_path, 0, age=2)
    beat(tmp_path, 1, age=1)
    assert read_state(tmp_path).name == "running"
    assert read_state(tmp_path).reason is None


def test_a_silent_host_is_named_with_its_rank(tmp_path: Path) -> None:
    write_state(tmp_path)
    beat(tmp_path, 0, age=7200)
    state = read_state(tmp_path)
    assert (state.name, state.ranks) == ("killed", (0,))
    assert state.reason == "rank 0 (process 77 on node2) is silent for 2 h 00 min, last seen at step 12 (step)"
    said = standing(load_run(tmp_path))
    assert said is not None
    assert any("silent for 2 h 00 min" in sentence for sentence in said.sentences)


def test_one_silent_rank_of_two_is_named_while_the_other_waits(tmp_path: Path) -> None:
    write_state(tmp_path)
    beat(tmp_path, 0, age=1)
    beat(tmp_path, 1, age=400)
    state = read_state(tmp_path)
    assert (state.name, state.ranks) == ("running", (1,))
    assert "rank 1 (process 77 on node2) is silent for 6 min 00 s" in str(state.reason)


def test_the_failed_rank_is_the_reason_and_ranks_that_gave_up_are_not(tmp_path: Path) -> None:
    write_state(tmp_path)
    beat(tmp_path, 0, age=50, phase="failed: DistributedError: The other ranks cannot be reached.")
    beat(tmp_path, 1, age=50, phase="failed: OutOfMemoryError: no room")
    state = read_state(tmp_path)
    assert (state.name, state.ranks) == ("failed", (1,))
    assert state.reason == "rank 1 (process 77 on node2) failed at step 12: OutOfMemoryError: no room"


def test_a_recorded_reason_names_its_rank_unless_all_ranks_failed(tmp_path: Path) -> None:
    write_state(tmp_path, state="failed", reason="no room", ranks=[0])
    beat(tmp_path, 0, age=50, phase="failed: OutOfMemoryError: no room")
    beat(tmp_path, 1, age=50, phase="failed: DistributedError: The other ranks cannot be reached.")
    assert read_state(tmp_path).reason == "Rank 0: no room"
    beat(tmp_path, 1, age=50, phase="failed: OutOfMemoryError: no room")
    assert read_state(tmp_path).reason == "no room"


def test_heartbeats_of_an_earlier_start_are_ignored(tmp_path: Path) -> None:
    write_state(tmp_path, age=3)
    beat(tmp_path, 0, age=500, phase="failed: ValueError: earlier")
    assert read_state(tmp_path).name == "running"


def test_a_reused_process_id_is_not_the_run(tmp_path: Path) -> None:
    """This process has the id of a process that was started earlier."""
    own = process_start(os.getpid())
    assert own is not None
    for started, expected in ((own - 1, "killed"), (own, "running")):
        write_state(tmp_path, host=socket.gethostname(), process=os.getpid(), started=started)
        assert read_state(tmp_path).name == expected
        beat(tmp_path, 0, age=9000, host=socket.gethostname(), pid=os.getpid(), started=started)
        assert read_state(tmp_path).name == expected
        (tmp_path / "heartbeat" / "rank-00000.json").unlink()


def test_a_clock_that_is_set_makes_no_process_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The clocks of this machine and of its file system may differ by any time."""
    write_state(tmp_path, age=0)
    beat(tmp_path, 0, age=0, host=socket.gethostname(), pid=os.getpid(), started=process_start(os.getpid()))
    real = time.time
    for jump in (-3600, 3600):
        monkeypatch.setattr(time, "time", lambda jump=jump: real() + jump)
        (found,) = read_heartbeats(tmp_path / "heartbeat")
        assert not found.is_dead()


def test_an_ended_process_of_this_machine_is_noticed_within_seconds(tmp_path: Path) -> None:
    with subprocess.Popen(["true"]) as gone:
        pass
    write_state(tmp_path, host=socket.gethostname(), process=gone.pid)
    beat(tmp_path, 0, age=10, host=socket.gethostname(), pid=gone.pid)
    assert read_state(tmp_path).name == "killed"
    beat(tmp_path, 0, age=0, host=socket.gethostname(), pid=gone.pid)  # of a container with numbers of its own
    assert read_state(tmp_path).name == "running"


@pytest.mark.parametrize("content", ["[]", "{", '{"rank": 0}', '{"rank": 1e999}', "[" * 5000])
def test_a_damaged_heartbeat_is_ignored(content: str, tmp_path: Path) -> None:
    write_state(tmp_path, age=1)
    beat(tmp_path, 0, age=0)
    (tmp_path / "heartbeat" / "rank-00001.json").write_text(content)
    assert read_state(tmp_path).name == "running"


def test_a_folder_of_runs_names_them(tmp_path: Path) -> None:
    for name in ("align", "other"):
        write_state(tmp_path / name, state="stopped")
    with pytest.raises(ConfigError, match=r"It contains runs: give one or several of .*/align, .*/other"):
        build_report(tmp_path, tmp_path / "out.html")
