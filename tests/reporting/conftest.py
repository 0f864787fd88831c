"""A small finished run folder with all files of a report."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

HOSTILE = '<img src="x" onerror="document.title=\'owned\'"> </script><script>alert(1)</script> {{ 7*7 }}'


def _score(mean: float, n: int = 200) -> dict[str, Any]:
    half = 1.96 * math.sqrt(mean * (1 - mean) / n)
    return {"n": n, "mean": mean, "low": mean - half, "high": mean + half}


def _metrics(path: Path, steps: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as stream:
        for step in range(1, steps + 1):
            record = {
                "step": step, "loss": 3 / step, "grad_norm": None if step == 2 else 1.0, "tokens_per_second": 900.0,
                "lr/adapter": 1e-4, "lr/mixer": 2e-4,
            }  # fmt: skip
            stream.write(json.dumps(record) + "\n")
        stream.write(json.dumps({"step": steps, "validation_loss": 0.5}) + "\n")


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    _metrics(folder / "metrics.jsonl", 400)
    (folder / "config.yaml").write_text("name: demo\nmodel:\n  language: tiny\n")
    (folder / "quarantine.jsonl").write_text('{"reason": "image missing"}\n{"reason": "image missing"}\n')
    (folder / "state.json").write_text(json.dumps({"state": "finished"}))
    (folder / "summary.json").write_text(
        json.dumps(
            {
                "format": 1, "name": "demo", "title": "Demo run", "hardware": "2 cores",
                "zero": "zero2", "world_size": 1,
                "components": [
                    {"name": "vision", "total": 1000, "trainable": 0},
                    {"name": "projector", "total": 500, "trainable": 500},
                    {"name": "language", "total": 8000, "trainable": 0},
                    {"name": "adapter", "total": 400, "trainable": 400},
                    {"name": "mixer", "total": 100, "trainable": 100},
                ],
                "base": {"language": "/cache/tiny-llm", "vision": "tiny-vit"}, "tokens_per_image": 16,
                "memory_gib": 1.5, "counters": {"seconds": 125.0, "wall_seconds": 125.0},
                "data": {"training": {"records": 1234}},
                "environment": {"torch": "2"}, "commands": [{"what": "Again", "command": "mm-moslora train demo"}],
            }
        )
    )  # fmt: skip
    scores = {"untuned": 0.05, "tuned": 0.85, "wrong_image": 0.3, "blind": 0.25}
    rows = [
        {"name": name, "label": name.replace("_", " "), "task": "shapes", **_score(mean),
         "categories": {"colour": _score(mean, 100), "count": _score(mean, 90)}}
        for name, mean in scores.items()
    ]  # fmt: skip
    (folder / "evaluation.json").write_text(json.dumps(rows))
    (folder / "samples").mkdir()
    Image.new("RGB", (64, 64), "teal").save(folder / "samples" / "0.png")
    Image.new("RGB", (900, 600), "navy").save(folder / "samples" / "1.jpg")
    samples = [
        {"image": "samples/0.png", "question": "What colour?", "answer": "teal", "options": {"A": "red", "B": HOSTILE},
         "before": HOSTILE, "after": "teal",
         "before_correct": False, "after_correct": True},
        {"image": "samples/1.jpg", "question": HOSTILE, "answer": HOSTILE, "before": "yes", "after": HOSTILE,
         "before_correct": True, "after_correct": False},
    ]  # fmt: skip
    (folder / "samples.json").write_text(json.dumps(samples))
    matrix = [[1.0, -0.5], [0.25, 1.0]]
    mixers = [
        {"path": "layers.0.q_proj", "rank": 2, "before": matrix, "after": [[1.2, -0.4], [0.2, 0.9]], "moved": 0.1,
         "pairs": [[0.7, 0.1], [0.0, 0.2]], "norm_update": 2.0, "effective_rank": 1.5},
        {"path": "layers.1.q_proj", "rank": 2, "norm_update": 0.4, "effective_rank": 1.25},
    ]  # fmt: skip
    (folder / "mixers.json").write_text(json.dumps(mixers))
    return folder
