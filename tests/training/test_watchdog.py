"""The file in which a rank says of itself where it is."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest
from between import just_before
from preloaded import Preloaded

from mm_moslora.training.supervision import watchdog
from mm_moslora.training.supervision.watchdog import Watchdog


def test_two_threads_may_say_where_the_rank_is(tmp_path, monkeypatch):
    """`verdict` does it in the main thread, beside the watching one."""
    watched = Watchdog(tmp_path)
    watched.beats.mkdir()

    def beside():
        other = threading.Thread(target=watched._write)
        other.start()
        other.join()

    just_before(monkeypatch, Path, "replace", beside, when=lambda *_: True)
    watched._write()
    assert [beat.rank for beat in watched.read()] == [0]
    assert len(list(watched.beats.iterdir())) == 1


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
            time.sleep(2)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(torchrun, 0)[1]) == (0 if restarts_left else -signal.SIGKILL)


BUSY = """
import os, sys, threading, time
from pathlib import Path
from mm_moslora.training.supervision.watchdog import Watchdog

def deep(depth):
    return depth and deep(depth - 1)

def work():
    while True:
        deep(400)

with Watchdog(Path(sys.argv[1])):
    for _ in range(3):
        threading.Thread(target=work, daemon=True).start()
    print(os.getpid(), flush=True)
    time.sleep(2)
    os._exit(0)
"""


def test_a_busy_process_survives_being_asked_for_its_stacks(python: Preloaded, tmp_path: Path) -> None:
    process = subprocess.Popen([python.ours, "-c", BUSY, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    pid = int(process.stdout.readline())
    while process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGUSR2)
        time.sleep(0.0005)
    assert process.returncode == 0
    assert "<string>" in (tmp_path / "stacks" / "rank-00000.txt").read_text()
