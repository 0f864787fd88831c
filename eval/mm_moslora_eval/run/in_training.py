"""Evaluation during a training run: `validate.tasks` of a recipe, measured on the current model."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mm_moslora.reporting.verdicts import LIKELIHOOD, Difference
from mm_moslora.utils import distributed
from mm_moslora.utils.errors import EvalError
from mm_moslora.utils.files import make_subfolder, mark, remove
from mm_moslora.utils.folder_marks import MARK
from mm_moslora_eval.backends.local_model import LocalModel
from mm_moslora_eval.protocol.task_groups import tasks_of
from mm_moslora_eval.run.evaluate_suite import evaluate
from mm_moslora_eval.run.paired_comparison import compare, paired_folders
from mm_moslora_eval.run.task_runner import EvaluationSettings
from mm_moslora_eval.scoring.score_differences import likelihood_difference
from mm_moslora_eval.sources.source_images import ImageMode

if TYPE_CHECKING:
    from mm_moslora.training.validation import Moment


logger = logging.getLogger(__name__)


class _CutShort(BaseException):  # an Exception of a sample would be recorded, and the next sample asked
    """A signal has arrived."""


def measure(moment: Moment) -> Mapping[str, float] | None:
    """Run the recipe's tasks; answers and scores are stored in the moment's folder.

    Returns:
        `eval/TASK/score` and `eval/TASK/METRIC` on rank 0; nothing on other ranks. None on ranks that stopped because
        one rank received a signal, or because it would take longer than `most_seconds`.
    """
    settings = EvaluationSettings(batch_size=moment.batch_size, limit=moment.config.task_limit or None)
    _start_over(moment.folder)
    frames, fps = moment.video_sampling
    name = f"{moment.name} at step {moment.step}"
    model = LocalModel(moment.assembly, name=name, trained_frames=frames, trained_fps=fps)
    metrics: dict[str, float] = {}
    stop_file = moment.folder / "stop"  # otherwise rank 0 would wait for a stopped rank and then do its share

    started, before = time.monotonic(), 0.0

    def give_way(_: ImageMode, answered: int, of: int) -> None:
        seconds = before
        if answered:
            seconds += (time.monotonic() - started - before) / answered * of
        if moment.stop.received or seconds > moment.most_seconds:
            stop_file.touch()
        if stop_file.exists():
            raise _CutShort

    cut = False
    try:
        for task in tasks_of(moment.config.tasks):
            before = time.monotonic() - started
            for result in evaluate(
                model, task, moment.folder, modes=("own",), baselines=(), settings=settings, progress=give_way
            ):
                values = {"score": result.score, **result.metrics}
                metrics |= {
                    f"eval/{result.task}/{name}": value for name, value in values.items() if math.isfinite(value)
                }
    except _CutShort:
        cut = True
    finally:
        model.close()
    distributed.barrier()
    if cut:
        return None
    return metrics if distributed.is_main() else {}


def forgotten(before: Sequence[float], after: Sequence[float], tasks: tuple[Path, Path] | None) -> list[dict[str, Any]]:
    """What a model lost or gained between two moments, with paired 95 % intervals."""
    rows = []
    if after and (text := likelihood_difference([after], [before], range(len(after)))):
        rows.append(_lost("general text", text.b, text.a, text.estimate.as_difference(LIKELIHOOD)))
    for late, early in paired_folders([tasks[1]], [tasks[0]]) if tasks else ():
        try:
            pair = compare(late, early)
        except EvalError as error:  # such as a task without scores
            logger.warning("Forgetting: %s", error)
            continue
        rows.append(_lost(pair.task, pair.score.b, pair.score.a, pair.score.as_difference))
        if pair.nats is not None:
            nats = pair.nats.estimate.as_difference("log-likelihood")
            rows.append(_lost(f"{pair.task}, reference answers", pair.nats.b, pair.nats.a, nats))
    return rows


def _lost(what: str, before: float, after: float, difference: Difference) -> dict[str, Any]:
    return {"what": what, "before": before, "after": after, "difference": difference.to_dict()}


def _start_over(folder: Path) -> None:
    """Delete the folder of a step, because a resumed run measures it again with weights that may differ slightly."""
    with distributed.failing_together("Making room for the measurement"):
        if distributed.is_main():
            make_subfolder(folder.parent)
            remove(folder, mark=MARK)
            folder.mkdir()
            mark(folder, "temporary")
    distributed.barrier()
