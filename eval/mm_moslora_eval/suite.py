"""Evaluate a model on a task with its controls and baselines, and compare two runs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mm_moslora.errors import EvalError

from . import statistics
from .baselines import BASELINES, TrainingAnswer, baseline
from .images import MODES, Hasher, ImageMode
from .model import Model
from .results import TaskResult, score_folder, write_results
from .runner import Progress, Settings, open_run, run_task, select
from .task import Task


def evaluate(
    model: Model,
    task: Task,
    output: Path,
    *,
    modes: Sequence[ImageMode] = MODES,
    baselines: Sequence[str] = BASELINES,
    training: Sequence[TrainingAnswer] = (),
    settings: Settings | None = None,
    progress: Progress | None = None,
) -> list[TaskResult]:
    """Ask, score and write one task in several image modes, with baselines.

    Args:
        model: answers; what is already in `output` is not asked again.
        task: the protocol.
        output: run folder; it belongs to one model.
        modes: own (the real pictures), blind (their mean colour), wrong (another item's picture).
        baselines: names of `baselines.BASELINES`.
        training: for the baselines; without it they learn from the evaluated set.
        settings: batch size, limits, rank.
        progress: called with (answered, all) within each mode.

    Returns:
        One result per mode and baseline, in this order; an empty list on ranks other than 0.

    Raises:
        EvalError: see `runner.run_task` and `runner.open_run`.
    """
    settings = settings or Settings()
    data = task.load()
    hasher = Hasher()
    results: list[TaskResult] = []
    with open_run(output, model, rank=settings.rank):
        for mode in modes:
            place = run_task(
                model, task, output, mode=mode, settings=settings, data=data, progress=progress, hasher=hasher
            )
            if settings.rank == 0:
                results.append(score_folder(place))
                write_results(output, results)
        if settings.rank == 0:
            documents = select(data, settings)
            results += [baseline(name, task, documents, data=data, training=training) for name in baselines]
            write_results(output, results)
    return results


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two runs on the same samples, A - B."""

    task: str
    score_a: float
    score_b: float
    paired: statistics.Paired
    changed: tuple[str, ...]
    """Ids of the samples whose score differs."""
    detectable: float
    """The true difference that this many samples are likely to show (80 % power)."""


def read_samples(place: Path) -> list[dict[str, Any]]:
    """The rows of a `samples.jsonl`, given the file or its folder."""
    path = place / "samples.jsonl" if place.is_dir() else place
    if not path.is_file():
        raise EvalError(f"{path} is missing; expected a `samples.jsonl` or the folder TASK@PROTOCOL/MODE of a run.")
    return [json.loads(text) for text in path.read_text(encoding="utf-8").split("\n") if text]


def compare(run_a: Path, run_b: Path) -> Comparison:
    """Compare the samples of two task folders (of two runs, or of two image modes of one run).

    Raises:
        EvalError: they hold different documents.
    """
    a = {row["id"]: row for row in read_samples(run_a)}
    b = {row["id"]: row for row in read_samples(run_b)}
    if a.keys() != b.keys():
        odd = sorted(a.keys() ^ b.keys())
        raise EvalError(
            f"{run_a} and {run_b} hold different documents: {len(odd)} are in one only (first: {odd[0]!r}). "
            "Evaluate both on the same data and limit."
        )
    asked = [(row["question"], row["answers"]) for row in a.values()]
    if asked != [(b[name]["question"], b[name]["answers"]) for name in a]:
        raise EvalError(f"{run_a} and {run_b} use the same ids for different questions; they are not comparable.")
    left, right = [a[name]["score"] for name in a], [b[name]["score"] for name in a]
    clusters = [row["cluster"] for row in a.values()]
    shared = len(set(clusters)) < len(clusters)
    return Comparison(
        task=run_a.parent.name if run_a.is_dir() else run_a.parent.parent.name,
        score_a=statistics.mean(left),
        score_b=statistics.mean(right),
        paired=statistics.paired(left, right, clusters=clusters if shared else None),
        changed=tuple(name for name in a if a[name]["score"] != b[name]["score"]),
        detectable=_detectable(left, right),
    )


def _detectable(left: Sequence[float], right: Sequence[float]) -> float:
    """From the differences themselves, so that neither a spread nor a correlation has to be assumed."""
    spread = statistics.sample_stddev([a - b for a, b in zip(left, right, strict=True)])
    # detectable_difference takes the spread of each run; without correlation that is the difference's over sqrt(2).
    return statistics.detectable_difference(len(left), std=spread / 2**0.5, correlation=0.0)
