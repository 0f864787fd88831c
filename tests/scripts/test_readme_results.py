"""The README's tables: one run with its intervals, seeds with mean and spread, precisions side by side."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "readme_results.py"
INTRO = "before\n<!-- results:begin -->\nold\n<!-- results:end -->\nafter\n"


def run_of(folder: Path, seed: int, score: float, *, precision: str = "bf16", task: str = "easy-vqa") -> Path:
    part = {"n": 200, "mean": score, "low": score - 0.03, "high": score + 0.03}
    row = {**part, "name": "tuned", "label": "Tuned", "task": task, "categories": {"open": part, "yes_no": part}}
    summary = {
        "description": f"DINOv2 on {task}.", "date": "2026-11-27 06:00 UTC", "hardware": "CPU X, 2 cores", "seed": seed,
        "precision": precision, "seconds": 600 + 60 * seed, "memory_gib": 4.0 + seed / 10, "zero": "zero2",
    }  # fmt: skip
    folder.mkdir()
    (folder / "evaluation.json").write_text(json.dumps([row]))
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


@pytest.fixture
def write(tmp_path: Path):
    """Runs the script on a README of its own and gives what it wrote between the markers."""
    (tmp_path / "scripts").mkdir()
    script = tmp_path / "scripts" / SCRIPT.name
    script.write_text(SCRIPT.read_text(encoding="utf-8"), encoding="utf-8")
    readme = tmp_path / "README.md"
    readme.write_text(INTRO)

    def written(*runs: Path) -> str:
        subprocess.run([sys.executable, script, *runs], check=True, timeout=60)
        before, _, rest = readme.read_text().partition("<!-- results:begin -->\n")
        body, _, after = rest.partition("\n<!-- results:end -->")
        assert (before, after) == ("before\n", "\nafter\n")
        return body

    return written


def test_one_run_has_its_intervals(write, tmp_path: Path) -> None:
    body = write(run_of(tmp_path / "a", 0, 0.9))
    assert "| **Tuned** | 90.0 [87.0, 93.0] | 90.0 [87.0, 93.0] | 90.0 [87.0, 93.0] |" in body
    assert "95 % intervals" in body
    assert "one seed" in body


def test_seeds_have_their_mean_and_spread_and_precisions_a_line_each(write, tmp_path: Path) -> None:
    runs = [run_of(tmp_path / f"b{seed}", seed, 0.9 + seed / 20) for seed in (0, 1, 2)]
    runs.append(run_of(tmp_path / "f0", 0, 0.99, precision="fp32"))
    other = run_of(tmp_path / "s", 0, 0.5, task="stamps")
    body = write(*runs, other)
    assert body.count("held-out questions") == 2, "one table per task"
    assert "| **Tuned** | 96.0 [90.0, 100.0] |" in body
    assert "mean of 4 runs, lowest and highest run in brackets" in body
    assert "| bf16, CPU X, 2 cores | 0, 1, 2 | 95.0 [90.0, 100.0] | 95.0 [90.0, 100.0] | 10.0 to 12.0 | 4.2 |" in body
    assert "| fp32, CPU X, 2 cores | 0 | 99.0 [96.0, 102.0] | 99.0 [96.0, 102.0] | 10.0 | 4.0 |" in body
    assert "one seed" in body, "of the stamps"
