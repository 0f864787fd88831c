"""Stopping on request: at once while there is nothing to save, and once for all that tell the same."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from between import just_before, somebody_builds
from preloaded import Preloaded
from trials import losses, write
from waiting import wait_until

from mm_moslora.launch import child_processes
from mm_moslora.launch.child_processes import STOP_SIGNALS
from mm_moslora.launch.launcher import leave_mark, stopped_text
from mm_moslora.training import training_loop
from mm_moslora.training.supervision import stop_signals
from mm_moslora.training.supervision.run_folder import record_run_state
from mm_moslora.training.supervision.stop_signals import StopRequest
from mm_moslora.training.training_loop import train

ROOT = Path(__file__).parents[2]
NUMBERS = [*STOP_SIGNALS]


def heard_by_default() -> None:
    """As on a terminal; what a shell starts with `&` or nohup, these tests perhaps, has signals ignored."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def test_a_run_that_is_told_to_stop_while_it_loads_asks_to_be_started_again(recipe, python: Preloaded, tmp_path):
    cache = tmp_path / "cache"
    recipe = replace(recipe, data=replace(recipe.data, cache=str(cache)))
    straight = replace(recipe, train=replace(recipe.train, output=str(tmp_path / "straight")))
    train(straight)
    run = Path(recipe.train.output)
    words = [python.ours, "-m", "mm_moslora", "train", write(recipe)]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'eval'}"}
    with somebody_builds(cache):
        for number in NUMBERS:
            process = subprocess.Popen(
                words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                preexec_fn=heard_by_default,
            )  # fmt: skip
            wait_until(lambda: list(run.glob("heartbeat/*.json")), process=process)
            process.send_signal(number)
            said, errors = process.communicate(timeout=150)
            assert process.returncode == 75, errors
            assert stopped_text(number) in said
            assert "Traceback" not in errors
            assert (run / "STOPPED").read_text() == stopped_text(number)
            assert number.name in (run / "STOPPED").read_text()
            assert json.loads((run / "state.json").read_text())["state"] == "stopped"
            (run / "heartbeat" / "rank-00000.json").unlink()
    assert not list(run.glob("checkpoint-*"))
    done = subprocess.run(words, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not (run / "STOPPED").exists()
    assert losses(run) == losses(tmp_path / "straight")


@pytest.fixture(autouse=True)
def _no_nohup() -> Iterator[None]:
    """These tests may run under nohup."""
    previous = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, previous)


def test_under_nohup_a_closed_terminal_stops_nothing():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with StopRequest() as stop:
        signal.raise_signal(signal.SIGHUP)
        with stop.at_once():
            signal.raise_signal(signal.SIGHUP)
    assert not stop.received


def test_a_stop_before_a_killed_run_continues_is_recorded(tmp_path):
    """The process that state.json calls running is gone; one that runs keeps its state."""
    (tmp_path / "run.lock").touch()  # a run folder
    gone = subprocess.Popen(["true"])
    gone.wait()
    state = {"state": "running", "host": socket.gethostname(), "since": time.time() - 9}
    ways = {(gone.pid, _stop): "stopped", (os.getpid(), _stop): "running"}
    for (process, record), expected in (ways | {(gone.pid, _begin_and_stop): "stopped"}).items():
        (tmp_path / "state.json").write_text(json.dumps(state | {"process": process}))
        record(tmp_path)
        assert json.loads((tmp_path / "state.json").read_text())["state"] == expected
    for text in ("[]", "{", '{"state": "running", "process": "x", "host": 1}', json.dumps(state)):
        (tmp_path / "state.json").write_text(text)
        _stop(tmp_path)
        assert (tmp_path / "state.json").read_text() == text


def _stop(folder: Path) -> None:
    leave_mark(folder, signal.SIGTERM)


def _begin_and_stop(folder: Path) -> None:
    with contextlib.suppress(stop_signals.Stopped), record_run_state(folder):
        raise stop_signals.Stopped


@pytest.mark.parametrize("number", NUMBERS)
def test_the_first_signal_is_remembered_and_the_third_ctrl_c_stops_at_once(number, monkeypatch):
    before = signal.getsignal(number)
    with StopRequest() as stop:
        for told in (number, *NUMBERS, signal.SIGINT, signal.SIGINT):  # a launcher repeats what the terminal has told
            signal.raise_signal(told)
        monkeypatch.setattr(child_processes, "ONE_REQUEST_SECONDS", 0.0)
        for told in (signal.SIGTERM, signal.SIGUSR1, signal.SIGTERM, signal.SIGINT, signal.SIGTERM):
            signal.raise_signal(told)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        assert stop.received == number
    assert signal.getsignal(number) is before


def test_a_scheduler_that_repeats_itself_does_not_cost_the_save(recipe, monkeypatch, caplog):
    monkeypatch.setattr(child_processes, "ONE_REQUEST_SECONDS", 0.0)
    real = training_loop.snapshot

    def slow(run):
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGTERM):
            signal.raise_signal(number)
        return real(run)

    monkeypatch.setattr(training_loop, "snapshot", slow)
    just_before(
        monkeypatch,
        training_loop._Loop,
        "_periodically",
        lambda: signal.raise_signal(signal.SIGTERM),
        when=lambda *_: True,
    )
    with caplog.at_level("INFO"):
        result = train(recipe)
    assert (result.step, result.stopped_by) == (1, signal.SIGTERM)
    assert (result.checkpoint / "manifest.json").is_file()
    assert "SIGTERM: saving step 1. Ctrl-C three times in all ends without." in caplog.text


@pytest.mark.parametrize("number", NUMBERS)
def test_a_signal_that_a_library_swallows_while_it_loads_is_obeyed_by_the_loop(number, recipe, monkeypatch):
    monkeypatch.setattr(signal, "getsignal", lambda _: signal.SIG_DFL)  # these tests may have Ctrl-C ignored
    stop = StopRequest()
    with stop.at_once():
        with contextlib.suppress(BaseException):
            signal.raise_signal(number)
        result = train(recipe, stop=stop)
    assert (result.step, result.stopped_by) == (1, number)
    assert result.checkpoint.is_dir()


def test_what_was_swallowed_is_raised_again(monkeypatch):
    monkeypatch.setattr(stop_signals, "_AGAIN_SECONDS", 0.05)
    stop, before = StopRequest(), signal.getsignal(signal.SIGALRM)

    def load() -> None:
        with stop.at_once():
            with contextlib.suppress(BaseException):
                signal.raise_signal(signal.SIGTERM)
            time.sleep(60)

    with pytest.raises(stop_signals.Stopped):
        load()
    assert stop.received == signal.SIGTERM
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0
    assert signal.getsignal(signal.SIGALRM) is before


def test_what_is_forked_while_a_run_loads_ends_quietly_and_the_run_goes_on(tmp_path):
    """A pool ends its processes by SIGTERM."""
    stop = StopRequest()
    ready, told = os.pipe()
    with stop.at_once():
        child = os.fork()
        if child == 0:
            os.write(told, b".")  # Python forgets what a process is told while it is forked
            while True:
                time.sleep(1)
        assert os.read(ready, 1) == b"."
        os.kill(child, signal.SIGTERM)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 128 + signal.SIGTERM
    assert not stop.received


def test_one_rank_of_several_is_ended_by_its_launcher_as_before(monkeypatch):
    """It sends SIGTERM to the others when one has failed: no reason to start again."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    before = [signal.getsignal(number) for number in NUMBERS]
    with StopRequest().at_once():
        assert [signal.getsignal(number) for number in NUMBERS] == before
