"""Validation pictures of a diffusion run in its report."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from mm_moslora.reporting import build_report
from mm_moslora.reporting.drawing_grid import MOST_STEPS, drawing_grid


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A diffusion run with two seeds and nine validations."""
    rows = []
    for step in (0, *range(10, 100, 10)):
        folder = tmp_path / "pictures" / (f"step-{step:06d}" if step else "untuned")
        folder.mkdir(parents=True)
        for seed in range(2):
            Image.new("RGB", (64, 64), (step, 90 * seed, 0)).save(folder / f"0-{seed}.png")
            row = {
                "step": step,
                "prompt": "a <b>cat</b>",
                "seed": seed,
                "image": f"pictures/{folder.name}/0-{seed}.png",
            }
            rows += [row | {"untuned": f"pictures/untuned/0-{seed}.png"}] if step else []
    (tmp_path / "drawings.json").write_text(json.dumps(rows))
    (tmp_path / "summary.json").write_text(json.dumps({"format": 1, "name": "cat", "kind": "diffusion"}))
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": 0.5}) + "\n")
    return tmp_path


def test_rows_have_one_seed_and_begin_with_the_untuned_model(run: Path) -> None:
    first, second = drawing_grid(run)
    assert (first["seed"], second["seed"]) == (0, 1)
    labels = [picture["label"] for picture in first["pictures"]]
    assert labels == ["untuned", "step 10", "step 30", "step 50", "step 70", "step 90"]
    assert len(labels) == MOST_STEPS + 1
    assert all(picture["url"].startswith("data:image/") for picture in first["pictures"])
    text = build_report(run, run / "report.html").read_text()
    assert "Pictures by step" in text
    assert "a &lt;b&gt;cat&lt;/b&gt;" in text
    assert "<b>cat" not in text
    assert 'id="samples"' not in text


def test_damaged_entries_and_pictures_outside_the_run_are_not_shown(run: Path, tmp_path: Path) -> None:
    Image.new("RGB", (64, 64)).save(tmp_path.parent / "secret.png")
    good = {"step": 1, "prompt": "x", "seed": 0, "image": "../secret.png", "untuned": "pictures/untuned/0-0.png"}
    (run / "drawings.json").write_text(json.dumps([{"step": "1"}, 3, good]))
    (row,) = drawing_grid(run)
    assert [picture["url"] is None for picture in row["pictures"]] == [False, True]
    (run / "drawings.json").write_text("{")
    assert drawing_grid(run) == []
