"""Evaluates a model on tasks, with controls and baselines."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mm_moslora_eval.protocol.model_interface import Model
from mm_moslora_eval.protocol.task import Task, shown_name
from mm_moslora_eval.protocol.task_registry import get_task, with_changes
from mm_moslora_eval.run.answer_shards import finish, folder_of_shard, gather, is_finished, work_of
from mm_moslora_eval.run.baselines import BASELINES, TrainingAnswer, baseline
from mm_moslora_eval.run.probing.linear_probe import Probed
from mm_moslora_eval.run.result_file import score_folder, write_results
from mm_moslora_eval.run.run_records import claim_run, hold_run, open_run, record
from mm_moslora_eval.run.sample_thumbnails import store_thumbnails
from mm_moslora_eval.run.scored_subsets import read_samples, read_scored
from mm_moslora_eval.run.task_runner import EvaluationSettings, run_task
from mm_moslora_eval.scoring.answer_scoring import is_judged
from mm_moslora_eval.scoring.task_result import TaskResult
from mm_moslora_eval.sources.document import DataSet, Document
from mm_moslora_eval.sources.source_images import MODES, Hasher, ImageMode
from mm_moslora_eval.sources.source_videos import with_whole_videos

if TYPE_CHECKING:
    from mm_moslora_eval.run.judging.llm_judge import Judge

logger = logging.getLogger(__name__)

ModeProgress = Callable[[ImageMode, int, int], None]
"""Called with (image mode, documents answered, all documents)."""


def evaluate_tasks(
    model: Model | Callable[[], Model],
    tasks: Sequence[str],
    output: Path,
    *,
    modes: Sequence[ImageMode] = ("own",),
    baselines: Sequence[str] = (),
    training: Sequence[TrainingAnswer] = (),
    settings: EvaluationSettings | None = None,
    progress: Callable[[str, ImageMode, int, int], None] | None = None,
    judge: Judge | None = None,
    named: str = "",
    merge: bool = False,
    changes: Sequence[str] = (),
    probes: Sequence[Probed] = (),
) -> list[TaskResult]:
    """Evaluate a model on tasks, one after the other; results are written after each.

    Args:
        probes: of every task, or none; see `linear_probe.probe_tasks`.
    """
    opened_tasks = [with_changes(get_task(name), changes) for name in tasks]
    data: list[DataSet | None] = []
    checksums = []
    for task in opened_tasks:  # fail before the model is loaded
        read = task.load()
        checksums.append((task, read.sha256))
        data.append(None if data and read.holds_pictures else read)
    chosen = settings or EvaluationSettings()
    chosen = replace(chosen, retry_failed=chosen.retry_failed and not merge)
    divided = merge or chosen.shard is not None
    work = work_of(checksums, modes, chosen, model=named) if divided else {}
    folder = output if chosen.shard is None else folder_of_shard(output, chosen.shard)
    with hold_run(folder, rank=chosen.rank, wait=chosen.shard is not None, below=output):
        if chosen.shard is not None and is_finished(folder, work):
            return []
        opened = partial(gather, output, work) if merge else model
        loaded: Any = opened() if callable(opened) and not hasattr(opened, "generate") else opened
        try:
            claim_run(folder, loaded)
            if chosen.rank == 0:
                record(folder, loaded, asdict(chosen))
            results: list[TaskResult] = []
            for number, task in enumerate(opened_tasks):
                report = None if progress is None else partial(progress, shown_name(task.name, task.protocol))
                results += evaluate(
                    loaded, task, folder, modes=modes, baselines=baselines, training=training, settings=chosen,
                    progress=report, judge=judge, locked=True, data=data.pop(0),
                    probe=probes[number] if probes else None,
                )  # fmt: skip
            if chosen.shard is not None and chosen.rank == 0:
                finish(folder, loaded, work)
            return results
        finally:
            if loaded is not model:
                loaded.close()


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
    probe: Probed | None = None,
) -> list[TaskResult]:
    """Ask, score and write one task in several image modes, with baselines.

    Args:
        model: the model; questions with an answer in `output` are not asked again.
        output: run folder; it belongs to one model.
        modes: own (the real pictures), blind (their mean colour), wrong (another item's picture).
        baselines: names of `baselines.BASELINES`.
        training: training answers for the baselines; None: the answers of the evaluated set.
        judge: grades free answers; without a judge such tasks stay unscored.
        locked: the caller has opened the run folder (`run_records.open_run`), over several tasks.
        data: what `task.load` gives, if it is loaded already.
        probe: the linear probe of the task, a baseline of its own.

    Returns:
        One result per mode and baseline, in this order; an empty list on ranks other than 0.

    Raises:
        EvalError: see `task_runner.run_task` and `run_records.open_run`.
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
                shown = _as_shown(data, model)
                store_thumbnails(output, read_samples(view), shown, mode=mode, hasher=hasher)
                _write(output, results[-1:])
        if (baselines or probe) and settings.rank == 0 and settings.shard is None:  # all shards together are scored
            results += _floors(
                baselines, task, data, training, own_of=results, output=output, settings=settings, probe=probe
            )
        return results


def _as_shown(data: DataSet, model: Model) -> Sequence[Document]:
    """The documents with the pictures that the model gets."""
    videos = getattr(model, "videos", None)
    return data.documents if videos is None else [with_whole_videos(one, videos) for one in data.documents]


def _floors(
    names: Sequence[str], task: Task, data: DataSet, training: Sequence[TrainingAnswer], *,
    own_of: Sequence[TaskResult], output: Path, settings: EvaluationSettings, probe: Probed | None,
) -> list[TaskResult]:  # fmt: skip
    """Score and write the baselines of a task that has references."""
    documents = settings.select(data, aggregation=task.aggregation)
    if is_judged(task.metric) or not any(document.answers for document in documents):
        return []
    own_result = next((result for result in own_of if result.mode == "own" and result.scored), None)
    own = [] if own_result is None else read_scored(output / own_result.folder)
    floors = [
        baseline(name, task, documents, data=data, training=training, own=own, stratify=settings.stratify)
        for name in names
    ]
    if probe is not None and probe.answers:
        floors.append(
            baseline("probe", task, documents, data=data, training=training, own=own, stratify=settings.stratify,
                     answers=probe.answers, remark=probe.text)
        )  # fmt: skip
    _write(output, floors)
    return floors


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
