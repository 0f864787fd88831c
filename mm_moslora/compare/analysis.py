"""From the outcomes of the runs to what can be said: `results.json`, which the table and the page show."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median, stdev
from typing import Any

from mm_moslora.compare.plan import (
    ALL,
    FORMAT,
    TUNING_SEEDS,
    Cell,
    Outcome,
    Settings,
    choose_rates,
    hopeless_arms,
    measured,
    reported_cells,
    run_count,
    tuning_cells,
)
from mm_moslora.compare.run import Comparison, short_names
from mm_moslora.compare.statistics import Estimate, TaskScores, arm_mean, difference, holm
from mm_moslora.compare.wording import says
from mm_moslora.files import replace_json
from mm_moslora.machine import hardware

SIGNIFICANT = 0.05


def analyse(comparison: Comparison, *, command: str = "") -> dict[str, Any]:
    """Analyse what is there, write `results.json`, return it.

    Args:
        comparison: read or run.
        command: how it was started, for the reader who wants to repeat it.
    """
    settings, outcomes, folder = comparison.settings, comparison.outcomes, comparison.folder
    names = short_names([*settings.tasks, *settings.validation])
    failures = [(c, o) for c, o in _every(settings, outcomes) if o.status != "ok"]
    chosen = choose_rates(settings, outcomes)
    scores = {arm.name: _scores(settings, outcomes, folder, arm.name, chosen) for arm in settings.arms}
    arms = [_arm(settings, outcomes, arm, chosen, scores[arm.name]) for arm in settings.arms]
    comparisons = _comparisons(settings, scores)
    from mm_moslora_eval.results import environment

    results = _plain(
        {
            "format": FORMAT,
            "name": comparison.recipe.name,
            "date": time.strftime("%Y-%m-%d", time.gmtime()),
            "hardware": hardware(),
            "environment": environment(),
            "command": command,
            "recipe": comparison.recipe.to_yaml(),
            "settings": {
                "arms": [arm.name for arm in settings.arms],
                "rates": list(settings.rates),
                "seeds": settings.seeds,
                "tuning_seeds": settings.tuning_seeds if settings.tunes else 0,
                "tasks": [names[task] for task in settings.tasks],
                "validation": [names[task] for task in settings.validation],
                "reference": settings.reference_arm,
            },
            "runs": {
                "planned": run_count(settings, len(hopeless_arms(settings, outcomes))),
                "over": len(_every(settings, outcomes)),
            },
            "seconds": sum(outcome.total_seconds for outcome in outcomes.values()),
            "arms": arms,
            "comparisons": comparisons,
            "floors": _floors(outcomes, names),
            "failures": [
                {"arm": c.arm.name, "rate": c.rate, "seed": c.seed, "status": o.status, "reason": o.reason}
                for c, o in failures
            ],
        }
    )
    results["says"] = says(results)
    replace_json(folder / "results.json", results)
    return results


def _every(settings: Settings, outcomes: Mapping[str, Outcome]) -> list[tuple[Cell, Outcome]]:
    """All runs that are over, failed ones of this or an earlier call included."""
    cells = [*tuning_cells(settings), *reported_cells(settings, choose_rates(settings, outcomes))]
    return [(cell, outcomes[cell.name]) for cell in cells if cell.name in outcomes]


def _scores(
    settings: Settings, outcomes: Mapping[str, Outcome], folder: Path, arm: str, chosen: Mapping[str, float]
) -> dict[str, TaskScores]:
    """Scores of an arm's seeds on every task; an empty mapping when no seed was measured."""
    from mm_moslora_eval.suite import read_samples

    cells = [c for c in reported_cells(settings, chosen) if c.arm.name == arm]
    good = [outcomes[c.name] for c in cells if c.name in outcomes and outcomes[c.name].status == "ok"]
    if not good:
        return {}
    found = {}
    names = short_names([*settings.tasks, *settings.validation])
    for task in settings.tasks:
        rows = [read_samples(folder / outcome.places[task]) for outcome in good]
        ids = [row["id"] for row in rows[0]]
        assert all([row["id"] for row in other] == ids for other in rows), "runs answered different documents"
        found[names[task]] = TaskScores(
            scores=[[float(row["score"] or 0.0) for row in one] for one in rows],
            clusters=[row["cluster"] for row in rows[0]],
        )
    return found


def _arm(
    settings: Settings, outcomes: Mapping[str, Outcome], arm: Any, chosen: Mapping[str, float],
    scores: Mapping[str, TaskScores],
) -> dict[str, Any]:  # fmt: skip
    reported = [c for c in reported_cells(settings, chosen) if c.arm.name == arm.name]
    over = [(c, outcomes[c.name]) for c in reported if c.name in outcomes]
    good = [(c, o) for c, o in over if o.status == "ok"]
    rate = chosen.get(arm.name)
    names = short_names([*settings.tasks, *settings.validation])
    tasks = {name: _measure({name: task}) for name, task in scores.items()}
    if len(scores) > 1:
        tasks[ALL] = _measure(scores)
    return {
        "name": arm.name,
        "about": arm.about,
        "changes": dict(arm.changes),
        "rate": rate,
        "edge": settings.tunes and len(settings.rates) > 2 and rate in (min(settings.rates), max(settings.rates)),
        "curve": _curve(settings, outcomes, arm.name),
        "seeds": [
            {
                "seed": c.seed,
                "status": o.status,
                "validation": o.validation,
                "test": {names[task]: score for task, score in o.test.items()},
                "first_loss": o.first_loss,
                "last_loss": o.last_loss,
            }
            for c, o in over
        ],
        "tasks": tasks,
        "cost": _cost([o for _, o in good]),
    }  # fmt: skip


def _curve(settings: Settings, outcomes: Mapping[str, Outcome], arm: str) -> list[dict[str, Any]]:
    """Validation values of an arm by learning rate."""
    points = []
    for cell in tuning_cells(settings):
        if cell.arm.name == arm and cell.name in outcomes:
            outcome = outcomes[cell.name]
            value = measured(settings, outcome)
            points.append(
                {"rate": cell.rate, "seed": cell.seed - TUNING_SEEDS, "value": value, "status": outcome.status}
            )
    return sorted(points, key=lambda point: (point["rate"], point["seed"]))


def _measure(tasks: Mapping[str, TaskScores]) -> dict[str, Any]:
    estimate = arm_mean(tasks)
    rows = [_mean_of(tasks, seed) for seed in range(len(next(iter(tasks.values())).scores))]
    return {
        "mean": estimate.value,
        "stderr": estimate.stderr,
        "low": estimate.low,
        "high": estimate.high,
        "seeds": rows,
        "seed_deviation": stdev(rows) if len(rows) > 1 else None,
        "documents": sum(len(task.clusters) for task in tasks.values()),
    }


def _mean_of(tasks: Mapping[str, TaskScores], seed: int) -> float:
    means = [math.fsum(task.scores[seed]) / len(task.scores[seed]) for task in tasks.values()]
    return math.fsum(means) / len(means)


def _cost(outcomes: Sequence[Outcome]) -> dict[str, Any] | None:
    if not outcomes:
        return None
    return {
        "trainable": outcomes[0].trainable,
        "steps": outcomes[0].steps,
        "step_seconds": median(outcome.step_seconds for outcome in outcomes),
        "train_seconds": median(outcome.train_seconds for outcome in outcomes),
        "memory_gib": max(outcome.memory_gib for outcome in outcomes),
        "processes": outcomes[0].processes,
    }


def _comparisons(settings: Settings, scores: Mapping[str, dict[str, TaskScores]]) -> list[dict[str, Any]]:
    """Every arm against the reference, by task and over all tasks; p-values corrected over the arms of a column."""
    reference = scores[settings.reference_arm]
    names = [name for name in scores if name != settings.reference_arm and scores[name] and reference]
    columns = {name: [name] for name in reference}
    if len(reference) > 1:
        columns[ALL] = list(reference)
    rows = []
    for column, tasks in columns.items():
        estimates = [difference({t: scores[arm][t] for t in tasks}, {t: reference[t] for t in tasks}) for arm in names]
        corrected = holm([estimate.p_value for estimate in estimates])
        for arm, estimate, p in zip(names, estimates, corrected, strict=True):
            left = [scores[arm][t] for t in tasks]
            rows.append(_row(settings, arm, column, estimate, p, left, [reference[t] for t in tasks], len(names)))
    return rows


def _row(
    settings: Settings, arm: str, task: str, estimate: Estimate, p: float, left: Sequence[TaskScores],
    right: Sequence[TaskScores], comparisons: int,
) -> dict[str, Any]:  # fmt: skip
    seeds = (len(left[0].scores), len(right[0].scores))
    return {
        "arm": arm,
        "reference": settings.reference_arm,
        "task": task,
        "difference": estimate.value,
        "stderr": estimate.stderr,
        "low": estimate.low,
        "high": estimate.high,
        "degrees": estimate.degrees if math.isfinite(estimate.degrees) else None,
        "share_of_documents": estimate.documents,
        "p": estimate.p_value,
        "p_corrected": p,
        "detectable": estimate.detectable(comparisons=comparisons),
        "documents": sum(len(one.clusters) for one in left),
        "clusters": sum(len(set(one.clusters)) for one in left),
        "seeds": list(seeds),
        "verdict": _verdict(estimate.value, p, seeds),
    }


def _verdict(value: float, p: float, seeds: tuple[int, int]) -> str:
    if min(seeds) < 2:
        return "one seed"
    if p < SIGNIFICANT:
        return "better" if value > 0 else "worse"
    return "no difference seen"


def _floors(outcomes: Mapping[str, Outcome], names: Mapping[str, str]) -> dict[str, dict[str, float]]:
    """Scores of answers that need no model, by task; the same in every run."""
    for outcome in outcomes.values():
        if outcome.floors:
            return {names[task]: floors for task, floors in outcome.floors.items()}
    return {}


def _plain(value: Any) -> Any:
    """nan and infinity as None, so that the file is strict JSON."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
