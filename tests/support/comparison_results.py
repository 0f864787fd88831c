"""Made-up `results.json` of comparisons of any size, for tests of what shows them."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Any

NAMES = (
    "lora", "moslora:orthogonal", "moslora:kaiming", "moslora:identity", "moslora-init", "tsm", "lora+", "full",
    "dora", "rslora", "peft:HIRA@r=16", "moslora:orthogonal@rank=64@alpha=128", "lora@rank=4@alpha=8",
    "moslora:orthogonal@adapter.use_rslora=true@optim.lora_plus_ratio=16",
)  # fmt: skip
RATES = (5e-4, 1e-3, 2e-3, 4e-3)


def comparison_results(
    names: Sequence[str] = NAMES, *, tasks: Sequence[str] = ("kind", "word"), seeds: int = 3, tuned: bool = True,
    nats: bool = True,
) -> dict[str, Any]:  # fmt: skip
    """The first arm is the reference; the second is ahead by exactly 5.0 points [2.0, 8.0] on every column.

    Args:
        names: of the arms.
        tasks: names of the tasks; with several there is a column of their mean.
        seeds: reported runs per arm.
        tuned: whether rates were chosen.
        nats: whether log-likelihoods were measured.
    """
    draw = random.Random(0)
    columns = [*tasks, *(["all tasks"] if len(tasks) > 1 else [])]
    return {
        "format": 2, "name": "synthetic", "date": "2026-11-28", "hardware": "2 cores", "environment": {"torch": "2"},
        "command": "mm-moslora compare recipe.yaml", "recipe": "name: synthetic\n", "seconds": 3600.0,
        "settings": {
            "arms": list(names), "rates": list(RATES if tuned else RATES[:1]), "seeds": seeds,
            "tuning_seeds": 1 if tuned else 0, "tasks": list(tasks), "validation": ["loss"], "reference": names[0],
            "controls": True, "no_likelihood": {} if nats else {tasks[0]: "the task has no reference answers"},
            "scores": {},
        },
        "runs": {"planned": len(names) * (seeds + 4 * tuned), "over": len(names) * (seeds + 4 * tuned)},
        "arms": [_arm(draw, name, columns, seeds=seeds, tuned=tuned, nats=nats) for name in names],
        "comparisons": [
            _difference(draw, number, (name, names[0], column), seeds=seeds, nats=nats)
            for column in columns
            for number, name in enumerate(names)
            if number
        ],
        "floors": {task: {"majority": 0.33, "best_answer": None} for task in tasks},
        "floors_learned_from": "training answers",
        "failures": [],
        "verdicts": [{"mood": "good", "text": "Every arm is above always giving the most frequent answer."}],
        "remarks": ["A remark."],
        "says": ["Every arm is above always giving the most frequent answer.", "A remark."],
    }  # fmt: skip


def _measure(draw: random.Random, centre: float, spread: float, seeds: int) -> dict[str, Any]:
    values = [centre + draw.gauss(0, spread) for _ in range(seeds)]
    mean = math.fsum(values) / len(values)
    return {
        "mean": mean, "stderr": spread, "low": mean - 2 * spread, "high": mean + 2 * spread, "seeds": values,
        "seed_deviation": spread, "documents": 600,
    }  # fmt: skip


def _arm(
    draw: random.Random, name: str, columns: Sequence[str], *, seeds: int, tuned: bool, nats: bool
) -> dict[str, Any]:
    best = draw.choice(RATES)
    rank = 64 if "rank=64" in name else 4 if "rank=4@" in name else 16
    return {
        "name": name, "about": "made up", "changes": {}, "rate": best if tuned else RATES[0],
        "edge": tuned and best in (RATES[0], RATES[-1]), "grid": list(RATES) if tuned else [],
        "curve": [
            {"rate": rate, "seed": 0, "value": 0.5 + 0.2 * abs(math.log(rate / best)), "status": "ok"} for rate in RATES
        ] if tuned else [],
        "seeds": [
            {"seed": seed, "status": "ok", "validation": {"loss": 0.5}, "test": {}, "first_loss": 3.0, "last_loss": 0.5}
            for seed in range(seeds)
        ],
        "tasks": {column: _measure(draw, 0.7, 0.012, seeds) for column in columns},
        "nats": {column: {"own": _measure(draw, -1.3, 0.05, seeds)} if nats else {} for column in columns},
        "remarks": [],
        "cost": {
            "trainable": 207360 * rank + 38400 * ("moslora" in name), "steps": 24, "step_seconds": 1.2,
            "train_seconds": 28.0 + draw.uniform(0, 8), "memory_gib": 1.4, "processes": 1,
        },
        "controls": {},
    }  # fmt: skip


def _difference(
    draw: random.Random, number: int, place: tuple[str, str, str], *, seeds: int, nats: bool
) -> dict[str, Any]:
    value, half = (0.05, 0.03) if number == 1 else (draw.gauss(0, 0.015), draw.uniform(0.015, 0.03))
    shown = abs(value) > half
    likely, error = draw.gauss(0, 0.05), 0.03
    in_nats = {
        "difference": likely, "stderr": error / 2, "low": likely - error, "high": likely + error, "p": 0.01,
        "p_corrected": 0.03 if abs(likely) > error else 0.4, "detectable": 0.04, "documents": 600, "left_out": 0,
        "run_degrees": 8.0,
    }  # fmt: skip
    return {
        "arm": place[0], "reference": place[1], "task": place[2], "difference": value, "stderr": half / 2,
        "low": value - half, "high": value + half, "degrees": 10.0, "share_of_documents": 0.7, "components": {},
        "p": 0.01, "p_corrected": 0.02 if shown else 0.5, "detectable": 0.04, "documents": 600, "groups": 600,
        "seeds": [seeds, seeds], "nats": {"own": in_nats} if nats else {}, "controls_complete": True,
        "verdict": ("better" if value > 0 else "worse") if shown else "not shown",
    }  # fmt: skip
