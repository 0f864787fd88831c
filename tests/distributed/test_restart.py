"""The launch script for real: a rank is killed, torchrun starts all again, and the run ends as an undisturbed one; all
are told to stop before the first step, and end.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from between import somebody_builds
from preloaded import Preloaded
from trials import hexed, make_recipe, weights, write
from waiting import wait_until

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]


@contextmanager
def launched(python: Preloaded, log: Path, *words: str) -> Iterator[subprocess.Popen[bytes]]:
    """The launch script with two ranks; stopped afterwards."""
    environment = os.environ | {
        "PYTHON": str(python.ours), "NPROC": "2", "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu",
        "PYTHONPATH": f"{ROOT}:{ROOT / 'eval'}",
    }  # fmt: skip
    command = ["bash", str(ROOT / "scripts" / "train.sh"), *words]
    process = subprocess.Popen(command, env=environment, stdout=log.open("wb"), stderr=subprocess.STDOUT)
    try:
        yield process
    finally:
        process.terminate()
        process.wait(timeout=240)


def said(log: Path) -> str:
    return log.read_text()[-3000:]


def test_a_killed_rank_is_started_again(parts, ranks, python, tmp_path):
    steps = 16
    recipe = make_recipe(parts, tmp_path / "run", "zero2", steps=steps, save_every=1, dropout=0.1)
    straight = make_recipe(parts, tmp_path / "straight", "zero2", steps=steps, dropout=0.1)
    run, log = tmp_path / "run", tmp_path / "log"
    with launched(python, log, "--max-restarts", "1", write(recipe)) as process:
        wait_until((run / "checkpoint-000003").exists, lambda: said(log), process=process)
        os.kill(json.loads((run / "heartbeat" / "rank-00001.json").read_text())["pid"], signal.SIGKILL)
        assert process.wait(timeout=300) == 0, said(log)
    assert "Continuing from checkpoint-" in log.read_text()
    ranks.run([write(straight)])
    assert hexed(run) == hexed(tmp_path / "straight")
    assert weights(run, steps) == weights(tmp_path / "straight", steps)


def test_ranks_that_are_told_to_stop_while_they_load_end_and_ask_to_be_started_again(parts, ranks, python, tmp_path):
    first, recipe = (
        replace(made, data=replace(made.data, cache=str(tmp_path / "cache")))
        for made in (make_recipe(parts, tmp_path / name, "zero2", steps=1) for name in ("first", "run"))
    )
    ranks.run([write(first)])
    beats = [tmp_path / "run" / "heartbeat" / f"rank-0000{rank}.json" for rank in (0, 1)]
    with somebody_builds(tmp_path / "cache"), launched(python, tmp_path / "log", write(recipe)) as process:
        wait_until(lambda: all(beat.exists() for beat in beats), lambda: said(tmp_path / "log"), process=process)
        process.send_signal(signal.SIGUSR1)
        assert process.wait(timeout=240) == 75, said(tmp_path / "log")
    assert "Stopped by a signal without saving." in said(tmp_path / "log")
    assert not any(Path(f"/proc/{json.loads(beat.read_text())['pid']}/exe").exists() for beat in beats)
    assert not list((tmp_path / "run").glob("checkpoint-*"))
