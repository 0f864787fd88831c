"""The launch script for real: a rank is killed, torchrun starts all again, and the run ends as an undisturbed one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from trials import hexed, make_recipe, weights, write

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]


def test_a_killed_rank_is_started_again(parts, ranks, python, tmp_path):
    steps = 30
    recipe = make_recipe(parts, tmp_path / "run", "zero2", steps=steps, save_every=1, dropout=0.1)
    straight = make_recipe(parts, tmp_path / "straight", "zero2", steps=steps, dropout=0.1)
    environment = os.environ | {
        "PYTHON": str(python.ours), "NPROC": "2", "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu",
        "PYTHONPATH": f"{ROOT}:{ROOT / 'eval'}",
    }  # fmt: skip
    log = tmp_path / "log"
    command = ["bash", str(ROOT / "scripts" / "train.sh"), "--max-restarts", "1", write(recipe)]
    process = subprocess.Popen(command, env=environment, stdout=log.open("wb"), stderr=subprocess.STDOUT)
    run, deadline = tmp_path / "run", time.monotonic() + 300
    try:
        while not (run / "checkpoint-000003").exists():
            assert time.monotonic() < deadline, log.read_text()[-3000:]
            assert process.poll() is None, log.read_text()[-3000:]
            time.sleep(0.02)
        os.kill(json.loads((run / "heartbeat" / "rank-00001.json").read_text())["pid"], signal.SIGKILL)
        assert process.wait(timeout=300) == 0, log.read_text()[-3000:]
    finally:
        process.terminate()
        process.wait(timeout=60)
    assert "Continuing from checkpoint-" in log.read_text()
    ranks.run([write(straight)])
    assert hexed(run) == hexed(tmp_path / "straight")
    assert weights(run, steps) == weights(tmp_path / "straight", steps)
