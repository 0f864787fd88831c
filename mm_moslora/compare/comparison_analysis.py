"""Analyse the outcomes of the runs and write `results.json`, which the table and the page show."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from statistics import median, stdev
from typing import Any

from mm_moslora.compare.arms import Arm
from mm_moslora.compare.comparison_controls import (
    OWN,
    Answers,
    TaskAnswers,
    add_controls,
    as_difference,
    columns_of,
    pictures_controlled,
    with_readable,
)
from mm_moslora.compare.comparison_plan import (
    FORMAT,
    TUNING_SEEDS,
    Cell,
    ComparisonSettings,
    Outcome,
    best_rate,
    choose_rates,
    grid_of,
    measured,
    reported_cells,
    run_count,
    short_names,
    tuning_cells,
    tuning_scores,
)
from mm_moslora.compare.comparison_run import ArmComparison
from mm_moslora.compare.comparison_text import says
from mm_moslora.compare.seed_statistics import ArmEstimate, TaskScores, arm_mean, differences, holm
from mm_moslora.reporting.verdicts import PICTURE_CONTROLS, verdict_of_arms
from mm_moslora.utils.files import replace_json
from mm_moslora.utils.hardware import hardware


def analyse(comparison: ArmComparison, *, command: str = "") -> dict[str, Any]:
    """Analyse finished runs, write `results.json` with the command that repeats it, return it."""
    settings, folder = comparison.settings, comparison.folder
    names = short_names([*settings.tasks, *settings.validation])
    chosen = choose_rates(settings, comparison.outcomes)
    outcomes = with_readable(reported_cells(settings, chosen), comparison.outcomes, folder, settings.tasks)
    failures = [(c, o) for c, o in _every(settings, outcomes) if o.status != "ok"]
    measured = Answers(settings, outcomes, folder, chosen, names)
    scores = {arm.name: measured.of(arm.name) for arm in settings.arms}
    arms = [_arm(settings, outcomes, arm, chosen, scores[arm.name]) for arm in settings.arms]
    add_controls(arms, scores)
    comparisons = _comparisons(settings, scores, {arm["name"]: arm["controls"] for arm in arms})
    from mm_moslora_eval.run.run_records import environment
    from mm_moslora_eval.scoring.task_result import strict_json

    results = strict_json(
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
                "controls": settings.controls,
                "no_likelihood": {
                    name: task.no_nats for of in scores.values() for name, task in of.items() if task.no_nats
                },
                "scores": {name: task.score for of in scores.values() for name, task in of.items() if task.score},
            },
            "runs": {"planned": run_count(settings, outcomes), "over": len(_every(settings, outcomes))},
            "seconds": sum(outcome.total_seconds for outcome in outcomes.values()),
            "arms": arms,
            "comparisons": comparisons,
            "floors": measured.floors,
            "floors_learned_from": measured.learned_from,
            "failures": [
                {"arm": c.arm.group, "rate": c.rate, "seed": c.seed, "status": o.status, "reason": o.reason}
                for c, o in failures
            ],
        }
    )
    results |= says(results)
    replace_json(folder / "results.json", results)
    return results


def _every(settings: ComparisonSettings, outcomes: Mapping[str, Outcome]) -> list[tuple[Cell, Outcome]]:
    """All finished runs, failed ones of this or an earlier call included."""
    cells = [*tuning_cells(settings, outcomes), *reported_cells(settings, choose_rates(settings, outcomes))]
    return [(cell, outcomes[cell.name]) for cell in cells if cell.name in outcomes]


def _arm(
    settings: ComparisonSettings, outcomes: Mapping[str, Outcome], arm: Arm, chosen: Mapping[str, float],
    scores: Mapping[str, TaskAnswers],
) -> dict[str, Any]:  # fmt: skip
    reported = [c for c in reported_cells(settings, chosen) if c.arm.group == arm.name]
    over = [(c, outcomes[c.name]) for c in reported if c.name in outcomes]
    good = [(c, o) for c, o in over if o.status == "ok"]
    choosing = [value for _, outcome in good if (value := measured(settings, outcome)) is not None]
    way = next((way for way in arm.ways if way.name in chosen), arm.ways[0])
    rate = chosen.get(way.name)
    grid = grid_of(settings, way, outcomes) if settings.chooses(arm) else []
    names = short_names([*settings.tasks, *settings.validation])
    own = {name: task.own for name, task in scores.items()}
    return {
        "name": arm.name,
        "about": arm.about,
        "changes": dict(way.changes),
        "chosen": way.name,
        "alternatives": [_alternative(settings, outcomes, other) for other in arm.alternatives],
        "last_value": "" if rate is None else _last_value(arm, way),
        "rate": rate,
        "edge": len(grid) > 2 and rate in (grid[0], grid[-1]),
        "grid": grid,
        "curve": _curve(settings, outcomes, way.name),
        "spread": stdev(choosing) if len(choosing) > 1 else None,
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
        "tasks": {column: _measure({task: own[task] for task in of}) for column, of in columns_of(own).items()},
        "nats": {
            column: {mode: _measure(nats, bounded=False) for mode in _SHOWN if (nats := _nats(scores, of, mode))}
            for column, of in columns_of(scores).items()
        },
        "remarks": [f"{name}, {remark}" for name, task in scores.items() for remark in task.remarks],
        "cost": _cost([o for _, o in good]),
    }  # fmt: skip


def _alternative(settings: ComparisonSettings, outcomes: Mapping[str, Outcome], way: Arm) -> dict[str, Any]:
    """An alternative, whether its tuning runs are over, its best rate and that rate's validation score."""
    scores = tuning_scores(settings, way, outcomes)
    rate = best_rate(settings, scores or {})
    value = scores[rate] if scores and rate is not None else None
    return {"name": way.name, "over": scores is not None, "rate": rate, "value": value}


def _last_value(arm: Arm, chosen: Arm) -> str:
    """The chosen value as `key=value` where it is the smallest or largest of three or more on offer; else empty."""
    for key, value in chosen.changes.items():
        values = {way.changes[key] for way in arm.alternatives if isinstance(way.changes[key], int | float)}
        if len(values) > 2 and value in (min(values), max(values)):
            return f"{key}={value:g}"
    return ""


def _curve(settings: ComparisonSettings, outcomes: Mapping[str, Outcome], arm: str) -> list[dict[str, Any]]:
    """Validation values of an arm by learning rate."""
    points = []
    for cell in tuning_cells(settings, outcomes):
        if cell.arm.name == arm and cell.name in outcomes:
            outcome = outcomes[cell.name]
            value = measured(settings, outcome)
            points.append(
                {"rate": cell.rate, "seed": cell.seed - TUNING_SEEDS, "value": value, "status": outcome.status}
            )
    return sorted(points, key=lambda point: (point["rate"], point["seed"]))


_SHOWN = (OWN, *PICTURE_CONTROLS)
"""Pictures with which log-likelihoods are reported."""


def _nats(scores: Mapping[str, TaskAnswers], tasks: Sequence[str], mode: str) -> dict[str, TaskScores]:
    """Log-likelihoods by task with these pictures; empty unless every task has them."""
    by_task = {task: scores[task].nats[mode] for task in tasks if task in scores and mode in scores[task].nats}
    return by_task if len(by_task) == len(tasks) else {}


def _measure(tasks: Mapping[str, TaskScores], *, bounded: bool = True) -> dict[str, Any]:
    estimate = arm_mean(tasks, bounded=bounded)
    shares = all(0 <= score <= 1 for task in tasks.values() for row in task.scores for score in row)
    rows = [_mean_of(tasks, seed) for seed in range(len(next(iter(tasks.values())).scores))]
    return {
        "mean": estimate.value,
        "stderr": estimate.stderr,
        "low": max(0.0, estimate.low) if bounded else estimate.low,
        "high": min(1.0, estimate.high) if shares else estimate.high,
        "seeds": rows,
        "seed_deviation": stdev(rows) if len(rows) > 1 else None,
        "documents": sum(len(task.clusters) for task in tasks.values()),
    }


def _mean_of(tasks: Mapping[str, TaskScores], seed: int) -> float:
    finite = [[score for score in task.scores[seed] if math.isfinite(score)] for task in tasks.values()]
    return math.fsum(math.fsum(scores) / len(scores) for scores in finite) / len(finite) if all(finite) else math.nan


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


def _judged(
    arms: Mapping[str, Mapping[str, TaskScores]], reference: Mapping[str, TaskScores], *, bounded: bool = True
) -> dict[str, tuple[ArmEstimate, float]]:
    """Each arm that has a seed of the reference against it, with its p-value corrected over the arms."""
    estimates = differences(arms, reference, bounded=bounded)
    corrected = holm([one.p_value for one in estimates.values()])
    return {name: (one, p) for (name, one), p in zip(estimates.items(), corrected, strict=True)}


def _numbers(estimate: ArmEstimate, p_corrected: float, *, comparisons: int) -> dict[str, Any]:
    """The numbers of a row of `results.json`; the detectable difference is that of so many p-values."""
    return {
        "difference": estimate.value,
        "stderr": estimate.stderr,
        "low": estimate.low,
        "high": estimate.high,
        "half_width": estimate.half_width,
        "p": estimate.p_value,
        "p_corrected": p_corrected,
        "detectable": estimate.detectable(comparisons=comparisons),
        "components": asdict(estimate.components),
        "run_degrees": estimate.run_degrees,
        "seeds": estimate.size[0],
        "documents": estimate.size[1],
        "clusters": estimate.groups,
    }


def _comparisons(
    settings: ComparisonSettings, scores: Mapping[str, dict[str, TaskAnswers]],
    controls: Mapping[str, Mapping[str, Any]],
) -> list[dict[str, Any]]:  # fmt: skip
    """Every arm against the reference, by task and over all tasks; p-values are corrected over the arms of a column."""
    reference = scores[settings.reference_arm]
    names = [name for name in scores if name != settings.reference_arm and scores[name] and reference]
    rows = []
    for column, tasks in columns_of(reference).items():
        right = {task: reference[task].own for task in tasks}
        lefts = {arm: {task: scores[arm][task].own for task in tasks} for arm in names}
        nats = {mode: _differences_in_nats(scores, reference, names, (tasks, mode)) for mode in _SHOWN}
        for arm, (estimate, p) in _judged(lefts, right).items():
            of_both = [controls[name].get(column) for name in (arm, settings.reference_arm)]
            stand = any(item is None or item["above"] for item in of_both)
            difference = as_difference(estimate, [*lefts[arm].values(), *right.values()])
            answers = [scores[name][task] for name in (arm, settings.reference_arm) for task in tasks]
            rows.append(
                {
                    "arm": arm,
                    "reference": settings.reference_arm,
                    "task": column,
                    **_numbers(estimate, p, comparisons=len(names)),
                    "low": difference.low,
                    "high": difference.high,
                    "degrees": estimate.degrees if math.isfinite(estimate.degrees) else None,
                    "share_of_documents": estimate.documents,
                    "groups": difference.groups,
                    "verdict": verdict_of_arms(difference, p, runs=estimate.run_degrees > 0, stand=stand),
                    "nats": {mode: by_arm[arm] for mode, by_arm in nats.items() if arm in by_arm},
                    "controls_complete": pictures_controlled(answers),
                }
            )
    return rows


def _differences_in_nats(
    scores: Mapping[str, dict[str, TaskAnswers]], reference: Mapping[str, TaskAnswers], arms: Sequence[str],
    measure: tuple[Sequence[str], str],
) -> dict[str, dict[str, Any]]:  # fmt: skip
    """Differences of the arms with log-likelihoods, by arm; p-values are corrected over these arms."""
    right = _nats(reference, *measure)
    lefts = {arm: left for arm in arms if right and (left := _nats(scores[arm], *measure))}
    return {
        arm: _numbers(estimate, p, comparisons=len(lefts))
        | {"left_out": sum(len(one.clusters) for one in right.values()) - estimate.size[1]}
        for arm, (estimate, p) in _judged(lefts, right, bounded=False).items()
    }
