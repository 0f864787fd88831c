"""The settings, commands and stored runs of the comparisons that the tests make."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from mm_moslora.compare import comparison_run
from mm_moslora.compare.arms import parse_arms
from mm_moslora.compare.comparison_cell import CellRun
from mm_moslora.compare.comparison_plan import (
    ComparisonSettings,
    reported_cells,
)
from mm_moslora.config import ModelConfig, Recipe

DIVERGING = "lora@alpha=1e30@train.max_skipped_steps=2"
ARMS = f"full,full@optim.max_grad_norm=0.5,peft:VBLORA,{DIVERGING}"
RECIPE = Recipe(model=ModelConfig(language="none"))


def command(
    recipe: Path, records: Path, out: Path, *more: str, arms: str = ARMS, rates: str = "1e-3,1e-2"
) -> list[str]:
    task = f"llava:{recipe.parent / 'test.jsonl'}@{records.parent / 'images'}"
    return ["compare", str(recipe), "--arms", arms, "--lr", rates, "--seeds", "2", "--tasks", task, "--hold-out", "0.3",
            "--max-new-tokens", "3", "--output", str(out), *more]  # fmt: skip


def ordered(folder: Path) -> CellRun:
    """A run that is ordered in a comparison's folder."""
    asked = settings(rates=[1e-4])
    cell = reported_cells(asked, {"lora": 1e-4})[0]
    run = CellRun(cell=cell, recipe=cell.recipe(RECIPE, folder), settings=asked, folder=folder)
    run.order()
    return run


def other_runs(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Let the processes of runs do this function of `other_runs.py`."""
    monkeypatch.setattr(comparison_run, "PROGRAM", "tests.compare.other_runs")
    monkeypatch.setenv("RUN_OF_TESTS", name)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parents[2]), *sys.path]))


def settings(**changes) -> ComparisonSettings:
    given = {
        "arms": parse_arms("lora,moslora:kaiming", RECIPE),
        "rates": [1e-4, 2e-4, 4e-4],
        "seeds": 2,
        "tasks": ["t"],
    }
    return ComparisonSettings(**{**given, **changes})


def fake_devices(monkeypatch: pytest.MonkeyPatch, count: int, visible: str | None = None) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: count > 0)
    monkeypatch.setattr("torch.cuda.device_count", lambda: count)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
