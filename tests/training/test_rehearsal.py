"""Before the first step: what would fail later fails now, and nothing of it remains."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mm_moslora.training import rehearsal
from mm_moslora.training.engine import TorchEngine
from mm_moslora.training.training_loop import train
from mm_moslora.utils import files
from mm_moslora.utils.errors import CheckpointError, TrainingError


def hexed(folder: Path) -> str:
    return (folder / "metrics.jsonl").read_text().split('"loss": ')[1].split(",")[0]


def test_nothing_remains_of_it(recipe, tmp_path, caplog):
    caplog.set_level("INFO")
    short = replace(recipe, train=replace(recipe.train, steps=2))
    train(short)
    train(replace(short, train=replace(short.train, rehearsal=False, output=str(tmp_path / "other"))))
    assert hexed(tmp_path / "run") == hexed(tmp_path / "other")
    assert caplog.text.count("Rehearsal: a checkpoint takes") == 1
    assert not list((tmp_path / "run").glob(".tmp*"))


def test_a_micro_batch_that_does_not_fit_is_said_before_the_first_step(recipe, monkeypatch, tmp_path):
    def full(self, micro_batches, lr_factor):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(TorchEngine, "step", full)
    with pytest.raises(TrainingError, match=r"4 examples with \d+ tokens .* does not fit .* Lower train\.micro_batch"):
        train(recipe)
    assert not list((tmp_path / "run").glob("checkpoint-*"))


def test_too_little_room_is_said_before_the_first_step(recipe, monkeypatch):
    monkeypatch.setattr(files, "free_bytes", lambda folder: 1000)
    with pytest.raises(CheckpointError, match=r"0 MiB free, .* MiB are needed, .* MiB are missing"):
        train(recipe)


def test_a_disk_that_fills_up_later_costs_no_training(recipe, monkeypatch, caplog, tmp_path):
    """Two saves find no room, the later ones do; three in a row would stop the run."""
    real = files.free_bytes
    steps = replace(recipe.train, save_every=1, rehearsal=False, keep_last=0)

    remaining = {"full": 2}

    def free(folder):
        if remaining["full"]:
            remaining["full"] -= 1
            return 1000
        return real(folder)

    monkeypatch.setattr(files, "free_bytes", free)
    train(replace(recipe, train=steps))
    assert caplog.text.count("Training continues.") == 2
    names = sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*"))
    assert names == [f"checkpoint-{step:06d}" for step in (3, 4, 5, 6)]
    remaining["full"] = 3
    with pytest.raises(CheckpointError, match="The last 3 saves failed"):
        train(replace(recipe, train=replace(steps, output=str(tmp_path / "full"))))


def test_a_trial_that_reads_back_otherwise_is_an_error(recipe, monkeypatch):
    hashes = iter(range(10**6))
    monkeypatch.setattr(rehearsal, "sha256_of", lambda path: str(next(hashes)))
    with pytest.raises(CheckpointError, match="reads back differently than it was written"):
        train(recipe)
