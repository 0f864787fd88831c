"""A step's numbers are read while the device computes the next one; nothing else changes by it.

A GPU is needed for the gain alone: AdamW's one kernel, which skips a step by itself, runs on a CPU, too.
"""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from trials import with_train

from mm_moslora.training.engine import TorchEngine
from mm_moslora.training.engine.optimizers import OptimizerKind
from mm_moslora.training.training_loop import _Loop, train
from mm_moslora.utils.errors import DivergedError

STEPS = 6


@pytest.fixture
def run(recipe, tmp_path, monkeypatch):
    """Trains with AdamW's one kernel; the losses of the steps in `poisoned` are NaN."""
    make, real = OptimizerKind.make, _Loop._step
    monkeypatch.setattr(OptimizerKind, "make", lambda *args, fused: make(*args, fused=True))

    def run(name, *, poisoned=(3,), late=True, **options):
        def step(loop, batches, *, first):
            number = loop.run.step + 1
            if number == options.get("fails_at"):
                raise MemoryError("no more")
            if number in poisoned:
                nan = [replace(batch, weights=torch.full_like(batch.targets, torch.nan, dtype=torch.float32))
                       for batch in next(batches)]  # fmt: skip
                batches = iter([nan])
            real(loop, batches, first=first)

        with monkeypatch.context() as patch:
            patch.setattr(_Loop, "_step", step)
            if not late:
                patch.setattr(TorchEngine, "late", False)
            output = str(tmp_path / name)
            return train(
                with_train(recipe, output=output, steps=STEPS, save_every=2, max_skipped_steps=2, rehearsal=False),
                stop_at=options.get("stop_at"),
            )

    return run


def records(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [
        (line["step"], line["skipped_steps"], line["grad_norm"], line["loss"])
        for line in lines
        if "skipped_steps" in line
    ]


def test_late_numbers_are_those_that_are_read_at_once(run, tmp_path, caplog):
    run("late")
    assert "Step 3 skipped" in caplog.text
    assert not run("stopped", stop_at=4).finished
    run("stopped")
    run("soon", late=False)
    for other in ("stopped", "soon"):
        assert str(records(tmp_path / other)) == str(records(tmp_path / "late"))
        ours, theirs = (load_file(tmp_path / name / "checkpoint-000006/adapter/moslora.safetensors")
                        for name in ("late", other))  # fmt: skip
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_a_run_that_diverges_ends_at_the_step_that_shows_it(run, tmp_path):
    with pytest.raises(DivergedError, match="stopped at step 4"):
        run("run", poisoned=range(3, 9))
    assert records(tmp_path / "run")[-1][:2] == (4, 2)


def test_an_error_of_the_next_step_leaves_the_record_of_the_last_one(run, tmp_path):
    with pytest.raises(MemoryError):
        run("run", fails_at=6)
    assert records(tmp_path / "run")[-1][0] == 5
