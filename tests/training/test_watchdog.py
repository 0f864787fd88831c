"""The file in which a rank says of itself where it is."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import pytest
from preloaded import Preloaded
from ranks import free_port
from waiting import wait_until

from mm_moslora.launch import heartbeat
from mm_moslora.training.supervision import watchdog
from mm_moslora.training.supervision.run_folder import exclusive
from mm_moslora.training.supervision.watchdog import Watchdog
from mm_moslora.utils.errors import ConfigError


def test_a_full_disk_does_not_hide_why_a_run_ended(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError(28, "No space left on device")

    with pytest.raises(ZeroDivisionError), Watchdog(tmp_path):  # noqa: PT012
        monkeypatch.setattr(Path, "write_text", refuse)
        monkeypatch.setattr(Path, "unlink", refuse)
        raise ZeroDivisionError


def test_files_of_the_user_beside_the_heartbeats_stay(tmp_path):
    (tmp_path / "heartbeat").mkdir()
    for name in ("notes.txt", "rank-00007.json"):
        (tmp_path / "heartbeat" / name).touch()
    with Watchdog(tmp_path):
        assert sorted(path.name for path in (tmp_path / "heartbeat").iterdir()) == ["notes.txt", "rank-00000.json"]


@pytest.mark.parametrize("name", ["heartbeat", "stacks", "stacks/rank-00000.txt", "run.lock"])
def test_links_in_a_run_folder_lead_to_one_error_and_their_targets_stay(name, tmp_path):
    run, mine = tmp_path / "run", tmp_path / "mine"
    (run / name).parent.mkdir(parents=True)
    mine.mkdir()
    for file in ("rank-00000.json", "rank-00000.txt"):
        (mine / file).write_text("years")
    if name != "run.lock":
        (run / "run.lock").touch()  # the sign of a run
    (run / name).symlink_to(mine / "rank-00000.txt" if "." in name else mine)
    with pytest.raises(ConfigError, match=f"{name} is a link to .*mine"), exclusive(run), Watchdog(run):
        pytest.fail("it would train")
    assert {path.name: path.read_text() for path in mine.iterdir()} == {
        "rank-00000.json": "years", "rank-00000.txt": "years"
    }  # fmt: skip


@pytest.mark.parametrize("restarts_left", [0, 1])
def test_a_torchrun_that_waits_for_a_lost_host_is_ended(restarts_left, monkeypatch):
    """Stuck in its store it does not hear SIGTERM; with a restart left it is the one that starts the ranks again."""
    monkeypatch.setattr(watchdog, "_TORCHRUN_SECONDS", 1)
    torchrun = os.fork()
    if torchrun == 0:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if os.fork() == 0:
            os.environ |= {"GROUP_WORLD_SIZE": "2", "TORCHELASTIC_RESTART_COUNT": "0"}
            os.environ["TORCHELASTIC_MAX_RESTARTS"] = str(restarts_left)
            watchdog.release_torchrun()
        else:
            time.sleep(2 if restarts_left else 60)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(torchrun, 0)[1]) == (0 if restarts_left else -signal.SIGKILL)


@pytest.mark.parametrize("phase", ["start", "data", "step", "save", "validation"])
@pytest.mark.parametrize(
    ("told", "misses"), [("failed: DataError: no such picture", True), ("ended", False), ("validation", False)]
)
def test_a_rank_that_failed_is_noticed_in_every_phase(phase, told, misses, tmp_path, monkeypatch):
    """On NCCL the ranks that wait for it in a collective would hear nothing for minutes."""
    monkeypatch.setattr(watchdog, "_GONE_SECONDS", 0.1)
    monkeypatch.setattr(Watchdog, "_give_up", lambda self, why: gave_up.append(self._phase) or self._stop.set())
    gave_up, looks, beats = [], count_calls(monkeypatch, "_misses_a_rank"), count_calls(monkeypatch, "_say")
    watched = Watchdog(tmp_path)
    watched.interval = 0.02
    other = {"rank": 1, "host": "elsewhere", "pid": 1, "step": 3, "phase": told}
    with watched:
        watched.phase(phase, 3, 600)
        path = tmp_path / "heartbeat" / "rank-00001.json"
        path.write_text(json.dumps(other))
        os.utime(path, (time.time() - 1,) * 2)
        begun = len(looks)
        wait_until(lambda: gave_up or len(looks) > begun + 2)
        assert gave_up == [phase] * misses
        if not misses:
            watched.phase(heartbeat.FAILING, 3, 600)
            begun = len(beats)
            wait_until(lambda: len(beats) > begun + 1)  # a look that had begun before is over
            path.write_text(json.dumps(other | {"phase": "failed: DataError: no such picture"}))
            os.utime(path, (time.time() - 1,) * 2)
            begun = len(beats)
            wait_until(lambda: gave_up or len(beats) > begun + 15)  # some three times as long as until a look
            assert not gave_up, "it would end before its trackers know why"


def count_calls(monkeypatch, name: str) -> list[None]:
    """A list that grows with each call of a method of the watchdog."""
    calls, method = [], getattr(Watchdog, name)
    monkeypatch.setattr(Watchdog, name, lambda self: calls.append(None) or method(self))
    return calls


LEAVING = """
import os, sys, threading, time
import torch.distributed as dist
from mm_moslora.cli import cli_app
from mm_moslora.utils import distributed, errors

dist.destroy_process_group = lambda: time.sleep(60)  # as on NCCL, whose other ranks are in another collective

def fail(*_, **__):
    distributed.join()
    if distributed.is_main():
        time.sleep(60)
    print("the last line before it", end="")
    raise {"bug": RuntimeError, "told": errors.DataError, "ctrl-c": KeyboardInterrupt}[sys.argv[1]]("no such picture")

cli_app.app = fail
cli_app.main()
"""


@pytest.mark.parametrize(
    ("how", "code", "told"),
    [
        ("bug", 1, "RuntimeError: no such picture"),
        ("told", 1, "error: no such picture"),
        ("ctrl-c", 130, "interrupted"),
    ],
)
def test_a_rank_that_failed_ends_although_the_others_do_not_leave_the_group(how, code, told, python) -> None:
    program = sys.executable if how == "bug" else python.ours  # the first ends as an interpreter does
    port = str(free_port())
    common = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    main, other = (
        subprocess.Popen(
            [program, "-c", LEAVING, how], text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env=common | {"RANK": rank, "LOCAL_RANK": rank},
        )
        for rank in "01"
    )  # fmt: skip
    try:
        out, err = other.communicate(timeout=200)
    finally:
        for process in (main, other):
            process.kill()
            process.communicate()
    assert other.returncode == code, err
    assert told in err
    assert out == "the last line before it"


BUSY = """
import os, sys, threading, time
from pathlib import Path
from mm_moslora.training.supervision.watchdog import Watchdog
from mm_moslora.launch.heartbeat import Heartbeat

def deep(depth):
    return depth and deep(depth - 1)

def work():
    while True:
        deep(400)

with Watchdog(Path(sys.argv[1])):
    for _ in range(3):
        threading.Thread(target=work, daemon=True).start()
    print(os.getpid(), flush=True)
    sys.stdin.read()
    os._exit(0)
"""


def test_a_busy_process_survives_being_asked_for_its_stacks(python: Preloaded, tmp_path: Path) -> None:
    process = subprocess.Popen(
        [python.ours, "-c", BUSY, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    pid, stacks = int(process.stdout.readline()), tmp_path / "stacks" / "rank-00000.txt"

    def asked_often() -> bool:
        os.kill(pid, signal.SIGUSR2)
        return stacks.stat().st_size > 100_000

    wait_until(asked_often, process=process, pause=0.0005)
    process.communicate(timeout=60)
    assert process.returncode == 0
    assert "<string>" in stacks.read_text()


def test_a_process_that_only_a_file_names_is_not_signalled(tmp_path: Path) -> None:
    """SIGUSR2 would end it."""
    handles = subprocess.Popen([sys.executable, "-c", STAYS], stdout=subprocess.PIPE)
    others = [subprocess.Popen(["sleep", "60"]), handles]
    assert handles.stdout is not None
    handles.stdout.readline()
    try:
        with Watchdog(tmp_path) as watching:
            for number, pid in enumerate([*(other.pid for other in others), os.getppid(), 1, 0, -1], start=1):
                beat = {"rank": number, "host": socket.gethostname(), "pid": pid, "step": 0, "phase": "step"}
                (tmp_path / "heartbeat" / f"rank-{number:05d}.json").write_text(json.dumps(beat))
            with (
                mock.patch.object(watchdog.distributed, "world_size", return_value=9),
                mock.patch.object(watchdog.os, "kill") as kill,
            ):
                watching._ask_for_stacks()
        assert not kill.called
    finally:
        for other in others:
            other.kill()
            other.wait()


STAYS = """
import signal, sys, time
signal.signal(signal.SIGUSR2, lambda *_: sys.exit(9))
print(flush=True)
time.sleep(60)"""
