"""Locks between processes: who gets one, what stays in its file, and what forked processes do with it."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

import pytest
from waiting import wait_until

from mm_moslora.utils.file_locks import lock_file


def test_one_holder_at_a_time_and_the_file_keeps_its_text(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    path.write_text("kept\n")
    with lock_file(path, wait=False):
        with pytest.raises(BlockingIOError):
            lock_file(path, wait=False)
        assert path.read_text() == "kept\n"
    with lock_file(path, wait=True):
        pass
    assert path.read_text() == "kept\n"


def test_waiting_for_another_holder_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "mm_moslora")

    def wait() -> None:
        with lock_file(tmp_path / "lock", wait=True):
            pass

    with lock_file(tmp_path / "lock", wait=True):
        assert not caplog.messages
        waiting = threading.Thread(target=wait)
        waiting.start()
        wait_until(lambda: caplog.messages)
    waiting.join()
    assert caplog.messages == [f"Waiting for another process, which holds {tmp_path / 'lock'}."]


def test_a_process_that_outlives_its_parents_lock_does_not_keep_it(tmp_path: Path) -> None:
    begun, begins = os.pipe()
    with lock_file(tmp_path / "lock", wait=False):
        child = os.fork()
        if not child:
            os.write(begins, b"x")
            signal.pause()
            os._exit(0)
        os.read(begun, 1)
    try:
        with lock_file(tmp_path / "lock", wait=False):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_leaving_the_block_in_a_forked_process_frees_nothing(tmp_path: Path) -> None:
    lock = lock_file(tmp_path / "lock", wait=False)
    with lock:
        child = os.fork()
        if not child:
            reused = os.open(tmp_path / "other", os.O_WRONLY | os.O_CREAT)  # takes the number of the lock's descriptor
            lock.__exit__(None, None, None)
            os._exit(0 if os.write(reused, b"x") == 1 else 1)
        assert os.waitpid(child, 0)[1] == 0
        with pytest.raises(BlockingIOError):
            lock_file(tmp_path / "lock", wait=False)
