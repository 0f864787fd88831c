"""Evaluates a model on a task with controls and baselines, and compares two runs."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mm_moslora.reporting.verdicts import unread_text
from mm_moslora.utils.errors import EvalError
from mm_moslora_eval.protocol.model_interface import Model
from mm_moslora_eval.protocol.task import Task
from mm_moslora_eval.run.baselines import BASELINES, TrainingAnswer, baseline
from mm_moslora_eval.run.result_file import score_folder, write_results
from mm_moslora_eval.run.run_lock import open_run
from mm_moslora_eval.run.sample_thumbnails import store_thumbnails
from mm_moslora_eval.run.scored_subsets import (
    DOCUMENTS,
    SAMPLES,
    TASK,
    documents_of,
    find_view,
    folder_of,
    read_lines,
    read_scored,
    read_view,
    scored_row,
)
from mm_moslora_eval.run.stored_types import StoredSample, check_row
from mm_moslora_eval.run.task_runner import EvaluationSettings, run_task, select
from mm_moslora_eval.scoring import error_bars
from mm_moslora_eval.scoring.answer_scoring import is_judged
from mm_moslora_eval.scoring.measured_scores import ScoreDifference, difference_of_scores, units_of
from mm_moslora_eval.scoring.reference_likelihood import LikelihoodDifference, likelihood_difference, nats_of
from mm_moslora_eval.scoring.score_aggregation import facts_of
from mm_moslora_eval.scoring.scored_sample import Scored, with_scores
from mm_moslora_eval.scoring.task_result import RULES, TaskResult
from mm_moslora_eval.sources.document import DataSet, Document
from mm_moslora_eval.sources.image_controls import MODES, Hasher, ImageMode
from mm_moslora_eval.sources.source_videos import with_whole_videos

if TYPE_CHECKING:
    from mm_moslora_eval.run.judging.llm_judge import Judge

logger = logging.getLogger(__name__)

ModeProgress = Callable[[ImageMode, int, int], None]
"""Called with (image mode, documents answered, all documents)."""


def evaluate(
    model: Model,
    task: Task,
    output: Path,
    *,
    modes: Sequence[ImageMode] = MODES,
    baselines: Sequence[str] = BASELINES,
    training: Sequence[TrainingAnswer] = (),
    settings: EvaluationSettings | None = None,
    progress: ModeProgress | None = None,
    judge: Judge | None = None,
    locked: bool = False,
    data: DataSet | None = None,
) -> list[TaskResult]:
    """Ask, score and write one task in several image modes, with baselines.

    Args:
        model: the model; questions with an answer in `output` are not asked again.
        task: the protocol.
        output: run folder; it belongs to one model.
        modes: own (the real pictures), blind (their mean colour), wrong (another item's picture).
        baselines: names of `baselines.BASELINES`.
        training: training answers for the baselines; None: the answers of the evaluated set.
        settings: batch size, limits, rank.
        progress: called with (mode, answered, all).
        judge: grades free answers; without a judge such tasks stay unscored.
        locked: the caller has opened the run folder (`run_lock.open_run`), over several tasks.
        data: what `task.load` gives, if it is loaded already.

    Returns:
        One result per mode and baseline, in this order; an empty list on ranks other than 0.

    Raises:
        EvalError: see `task_runner.run_task` and `run_lock.open_run`.
    """
    settings = settings or EvaluationSettings()
    with nullcontext() if locked else open_run(output, model, rank=settings.rank):
        asked, task, hasher = task, shown_as_trained(task, model), Hasher()
        if data is None or (task != asked and data.shows_videos):
            data = task.load()
        results: list[TaskResult] = []
        for mode in modes:
            report = None if progress is None else partial(progress, mode)
            view = run_task(
                model, task, output, mode=mode, settings=settings, data=data, progress=report, hasher=hasher
            )
            if settings.rank == 0 and settings.shard is None:
                results.append(score_folder(view, judge=judge))
                videos = getattr(model, "videos", None)
                shown = data.documents
                if videos is not None:
                    shown = tuple(with_whole_videos(document, videos) for document in shown)
                store_thumbnails(output, read_samples(view), shown, mode=mode, hasher=hasher)
                _write(output, results[-1:])
        if settings.shard is not None:  # all shards together are scored
            return []
        documents = select(data, settings, aggregation=task.aggregation)
        if settings.rank == 0 and not is_judged(task.metric) and any(document.answers for document in documents):
            own_result = next((result for result in results if result.mode == "own" and result.scored), None)
            own = read_scored(output / own_result.folder) if own_result is not None and baselines else []
            floors = [
                baseline(name, task, documents, data=data, training=training, own=own, stratify=settings.stratify)
                for name in baselines
            ]
            _write(output, floors)
            results += floors
        return results


def shown_as_trained(task: Task, model: Any) -> Task:
    """The task with as many frames of a video as the model was trained with, unless it names its own number."""
    source, frames, fps = task.source, getattr(model, "trained_frames", None), getattr(model, "trained_fps", None)
    if frames is None and fps is None:
        return task
    if source.video_frames is None and source.video_fps is None:
        return replace(task, source=replace(source, video_frames=frames, video_fps=fps))
    if (source.video_frames, source.video_fps) != (frames, fps):
        own, trained = (
            f"{count} frames" if rate is None else f"{rate:g} frames a second"
            for count, rate in ((source.video_frames, source.video_fps), (frames, fps))
        )
        logger.warning("%s shows %s of a video, and %s was trained with %s.", task.id, own, model.name, trained)
    return task


def _write(output: Path, results: Sequence[TaskResult]) -> None:
    for result in write_results(output, results):
        logger.warning(
            "%s: results.json keeps the earlier result of the same documents, which is more complete than this one.",
            result.id,
        )


@dataclass(frozen=True, kw_only=True)
class PairedComparison:
    """Two systems on the same samples, A - B; each may have run with several seeds."""

    task: str
    aggregation: str
    """The task's aggregation, whose score is compared."""
    score: ScoreDifference
    nats: LikelihoodDifference | None
    """The difference in the log-likelihood of the references; None where a run has none."""
    samples: tuple[tuple[dict[str, Any], dict[str, Any]], ...]
    """The rows of A and B (of their first seeds) with different scores."""
    remarks: tuple[str, ...] = ()
    """What keeps a score of A or B from being one of its model."""

    @property
    def seed_spread(self) -> float:
        """Standard deviation between seeds, pooled over both systems; nan with one seed each."""
        several = [scores for scores in (self.score.seeds_a, self.score.seeds_b) if len(scores) > 1]
        squares = [error_bars.sample_stddev(scores) ** 2 * (len(scores) - 1) for scores in several]
        degrees = sum(len(scores) - 1 for scores in several)
        return math.sqrt(sum(squares) / degrees) if degrees else math.nan

    @property
    def caution(self) -> str:
        """A note for tasks with another score than the mean of samples or questions; empty for these."""
        if not self.score.unit or facts_of(self.aggregation).captions:
            return ""
        return (
            f"Wins, losses and the sign test are about single questions; {self.score.unit} adds them up differently "
            f"({self.aggregation})."
        )


def read_samples(source: Path) -> list[dict[str, Any]]:
    """The rows of a `samples.jsonl`, given the file, its view, or TASK@PROTOCOL/MODE.

    Raises:
        EvalError: the file is missing or damaged.
    """
    path = find_view(source) / SAMPLES if source.is_dir() else Path(os.path.realpath(source))  # a user's path
    if not path.is_file():
        raise EvalError(f"{path} is missing; expected a `samples.jsonl` or the folder TASK@PROTOCOL/MODE of a run.")
    rows = read_lines(path)
    for row in rows:
        check_row(StoredSample, row, source=f"{path}: sample {row.get('id')!r}")
    return rows


def paired_folders(runs_a: Sequence[Path], runs_b: Sequence[Path]) -> list[tuple[list[Path], list[Path]]]:
    """The views that all runs have (same task, protocol, image mode and documents), or the given folders themselves.

    Raises:
        EvalError: the runs have no view in common.
    """
    everything = [*runs_a, *runs_b]
    missing = [str(run) for run in everything if not run.exists()]
    if missing:
        raise EvalError(f"There is no {missing[0]!r}. Give two run folders, or two folders TASK@PROTOCOL/MODE.")
    if all(run.is_file() or any([*run.glob(SAMPLES), *run.glob(f"*/{SAMPLES}")]) for run in everything):
        return [_alike(runs_a, runs_b)]
    views_of_runs = [
        {folder_of(path.parent): path.parent for path in run.glob(f"*/*/*/{SAMPLES}")} for run in everything
    ]
    shared = sorted(set.intersection(*(set(views) for views in views_of_runs)))
    if not shared:
        named = ", ".join(str(run) for run in everything)
        tasks = [{name.rpartition("/")[0] for name in views} for views in views_of_runs]
        same = sorted(set.intersection(*tasks))
        if same:
            raise EvalError(
                f"{named} all have {same[0]}, but on different documents. Evaluate them on the same data and limit."
            )
        raise EvalError(
            f"{named} have no scored task in common. Give two run folders, or two folders TASK@PROTOCOL/MODE."
        )
    sides = [[views[name] for views in views_of_runs] for name in shared]
    return [(side[: len(runs_a)], side[len(runs_a) :]) for side in sides]


def _alike(a: Sequence[Path], b: Sequence[Path]) -> tuple[list[Path], list[Path]]:
    """The views of the same documents in all folders; if there are none, the default view of each folder."""
    folders = [*a, *b]
    below = [{path.parent.name for path in folder.glob(f"*/{SAMPLES}")} for folder in folders]
    shared = set.intersection(*below) if below else set()
    if shared:
        largest = find_view(folders[0]).name
        name = largest if largest in shared else sorted(shared)[0]
        return [folder / name for folder in a], [folder / name for folder in b]
    views = [find_view(folder) if folder.is_dir() else folder for folder in folders]
    return views[: len(a)], views[len(a) :]


def compare(runs_a: Path | Sequence[Path], runs_b: Path | Sequence[Path]) -> PairedComparison:
    """Compare the samples of task folders (of two systems, or of two image modes of one run).

    Several folders of one system are its seeds: every sample counts with its mean over them.

    Raises:
        EvalError: they hold different documents, or are unscored.
    """
    systems = [[runs] if isinstance(runs, Path) else list(runs) for runs in (runs_a, runs_b)]
    views_a, views_b = _alike(*systems)
    views = [*views_a, *views_b]
    a, b = ([_by_id(view) for view in side] for side in (views_a, views_b))
    first = a[0]
    for view, rows in zip(views, [*a, *b], strict=True):
        _check_same(views[0], first, view, rows)
        _check_rules(views[0], view)
        if _judged(rows) != _judged(first):
            raise EvalError(
                f"Only one of {views[0]} and {view} was graded by a judge, so they are not comparable. Score both with "
                "--judge, or both without."
            )
    aggregation = _described(views[0]).get("task", {}).get("aggregation", "mean")
    grids = [[[nats_of(rows[name]) for name in first] for rows in side] for side in (a, b)]
    documents = _documents(views[0], first)
    sides = [[[scored_row(rows[name], documents[name]) for name in documents] for rows in side] for side in (a, b)]
    score = difference_of_scores(aggregation, *sides)
    units = dict(zip(documents, units_of(aggregation, sides[0][0]), strict=True))
    shown = [_worst(side[0], units) for side in (a, b)]
    return PairedComparison(
        task=_named(views[0]),
        aggregation=aggregation,
        score=score,
        nats=likelihood_difference(grids[0], grids[1], [row["cluster"] for row in first.values()]),
        samples=tuple((shown[0][name], shown[1][name]) for name in score.changed),
        remarks=tuple(text for name, side in zip("AB", sides, strict=True) if (text := _unread(name, side))),
    )


def _unread(name: str, seeds: Sequence[Sequence[Scored]]) -> str:
    given = [sample for samples in seeds for sample in with_scores(samples) if not sample.failed]
    text = unread_text(sum(not sample.parsed.strip() for sample in given), len(given))
    return f"{name}: {text}." if text else ""


def _judged(rows: dict[str, dict[str, Any]]) -> bool:
    return any(row.get("judged") for row in rows.values())


def _documents(source: Path, rows: dict[str, dict[str, Any]]) -> dict[str, Document]:
    """The documents of a view; of a file of samples without its view, what the samples hold of them."""
    view = source if source.is_dir() else source.parent
    if (view / DOCUMENTS).is_file():
        return {row["id"]: Document.from_dict(row) for row in documents_of(view) if row["id"] in rows}
    parts = ("id", "question", "options", "category")
    return {
        name: Document(**{part: row[part] for part in parts}, answers=tuple(row["answers"]))
        for name, row in rows.items()
    }


def _worst(rows: dict[str, dict[str, Any]], units: dict[str, str]) -> dict[str, dict[str, Any]]:
    """A row for each question (see `units_of`), one with the lowest score."""
    questions: dict[str, dict[str, Any]] = {}
    for name in units:
        row, unit = rows[name], units[name]
        if unit not in questions or (row["score"] or 0.0) < (questions[unit]["score"] or 0.0):
            questions[unit] = row
    return questions


def _described(source: Path) -> dict[str, Any]:
    view = source if source.is_dir() else source.parent
    return read_view(view) if (view / TASK).is_file() else {}


def _named(source: Path) -> str:
    """NAME@PROTOCOL, with the selection if it is not the whole data set."""
    described = _described(source)
    if not described:
        return source.parent.name
    selection = described.get("selection", {})
    part = f", {selection['name']} of {selection['of']}" if selection.get("name", "all") != "all" else ""
    return f"{described['task']['name']}@{described['task']['protocol']}{part}"


def _by_id(source: Path) -> dict[str, dict[str, Any]]:
    rows = {row["id"]: row for row in read_samples(source)}
    if all(row["score"] is None for row in rows.values()):
        raise EvalError(f"{source} is unscored, so there is nothing to compare; score it with a judge first.")
    return rows


def _check_same(view_a: Path, a: dict[str, dict[str, Any]], view_b: Path, b: dict[str, dict[str, Any]]) -> None:
    if a.keys() != b.keys():
        odd = sorted(a.keys() ^ b.keys())
        raise EvalError(
            f"{view_a} and {view_b} hold different documents: {len(odd)} are in one only (first: {odd[0]!r}). "
            "Evaluate both on the same data and limit."
        )
    if any((row["question"], row["answers"]) != (b[name]["question"], b[name]["answers"]) for name, row in a.items()):
        raise EvalError(f"{view_a} and {view_b} use the same ids for different questions; they are not comparable.")


def _check_rules(view_a: Path, view_b: Path) -> None:
    a, b = (_described(view).get("task") for view in (view_a, view_b))
    if not a or not b:
        return
    rules = ("version", *RULES, "grading")
    odd = [f"{rule} {a.get(rule)!r} and {b.get(rule)!r}" for rule in rules if a.get(rule) != b.get(rule)]
    if odd:
        raise EvalError(
            f"{view_a} and {view_b} were scored by different rules: {', '.join(odd)}. Score both by one protocol, "
            "with mm-moslora eval score."
        )
