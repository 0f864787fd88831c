"""The GPU benchmark in miniature on a CPU: rows, what a second call does, failures, budgets, and the table."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from preloaded import Preloaded

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts" / "bench"))
import gpu

BENCH = Path(gpu.__file__).parent
H100 = "NVIDIA H100 80GB HBM3"


def figures(**changes):
    return {
        "seconds": 0.9, "tokens_per_second": 14_800.0, "mfu": 0.44, "steps": 10, "tokens": [13_000] * 3,
        "peak_memory_gib": 60.0, "micro_batches": 1, "profile": {"kernels": 5000, "busy": 0.98}, "first_loss": 10.4,
        "full": {"seconds": 1.1, "tokens_per_second": 14_900.0}, "peak_tflops": 790.0, "copy_tbs": 3.0,
        "date": "2026-12-01T00:00:00+00:00",
    } | changes  # fmt: skip


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch):
    """The contenders that were measured; what each gives is `figures`, or what the test puts into `gives`."""
    found = SimpleNamespace(names=[], gives={}, seconds=0.0)
    monkeypatch.setattr(gpu, "card_of", lambda device: H100)
    monkeypatch.setattr(gpu, "end_with_parent", lambda: None)
    monkeypatch.setattr(gpu, "version_of", lambda package: "1.0")
    monkeypatch.setattr(gpu, "time", SimpleNamespace(monotonic=lambda: found.seconds))  # nobody else's clock

    def measure(contender, shape, device, seconds):
        found.names.append(contender.name)
        found.seconds += 40.0
        return found.gives.get(contender.name, figures()) | {"process_seconds": 40.0}

    monkeypatch.setattr(gpu, "measure", measure)
    return found


def test_two_contenders_run_on_a_cpu_and_a_second_call_measures_nothing(python: Preloaded, tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    command = [
        python.ours, str(BENCH / "gpu.py"), "--shape", "tiny", "--device", "cpu", "--only", "hf", "ours", "--out",
        str(out),
    ]  # fmt: skip
    first = subprocess.run(command, capture_output=True, text=True)
    assert first.returncode == 0, first.stderr[-2000:]
    rows = {one["contender"]: one for one in map(json.loads, out.read_text().splitlines())}
    assert rows.keys() == {"hf", "ours"}
    for found in rows.values():
        assert "error" not in found, found
        assert found["gradients"]["median"] < 0.02  # of bf16
        assert found["profile"]["kernels"] > 1000
        assert found["full"]["tokens"] == [512]
    losses = [found["first_loss"] for found in rows.values()]
    assert max(losses) - min(losses) < 5e-3
    with out.open("a") as stream:
        stream.write('{"shape": "tin')  # a process was killed here
    second = subprocess.run(command, capture_output=True, text=True)
    assert second.stdout == first.stdout
    assert "2 of 2 rows are there" in second.stderr


def test_a_contender_that_fails_is_a_row_and_the_rest_goes_on(started, tmp_path: Path, capsys) -> None:
    started.gives["hf"] = {"error": "OutOfMemoryError: too little"}
    arguments = ["--out", str(tmp_path / "rows.jsonl"), "--only", "hf", "ours"]
    assert gpu.main(arguments) == 0
    assert "- hf: failed, OutOfMemoryError: too little" in capsys.readouterr().out
    assert gpu.main(arguments) == 0
    assert started.names == ["hf", "ours"]
    started.gives.clear()
    assert gpu.main([*arguments, "--retry"]) == 0
    assert started.names == ["hf", "ours", "hf"]
