"""Evaluation during a training run: `validate.tasks` of a recipe, measured on the current model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from mm_moslora.utils import distributed
from mm_moslora.utils.files import MARK, make_subfolder, mark, remove
from mm_moslora_eval.backends.local_model import LocalModel
from mm_moslora_eval.protocol.task_registry import tasks_of
from mm_moslora_eval.run.evaluate_suite import evaluate
from mm_moslora_eval.run.task_runner import RUN, EvaluationSettings

if TYPE_CHECKING:
    from mm_moslora.training.validation import Moment


class _CutShort(BaseException):  # an Exception of a sample would be recorded, and the next sample asked
    """A signal has arrived."""


def measure(moment: Moment) -> Mapping[str, float] | None:
    """Run the recipe's tasks; answers and scores are stored in the moment's folder.

    Returns:
        `eval/TASK/score` and `eval/TASK/METRIC` on rank 0; nothing on other ranks. None on ranks that stopped because
        one rank received a signal.

    Raises:
        EvalError: see `task_registry.tasks_of`; or every sample fails.
    """
    settings = EvaluationSettings(batch_size=moment.batch_size, limit=moment.config.task_limit or None)
    _start_over(moment.folder)
    model = LocalModel(moment.assembly, name=f"{moment.name} at step {moment.step}")
    metrics: dict[str, float] = {}
    stop_file = moment.folder / "stop"  # otherwise rank 0 would wait for a stopped rank and then do its share

    def give_way(*_: object) -> None:
        if moment.stop.received:
            stop_file.touch()
        if stop_file.exists():
            raise _CutShort

    cut = False
    try:
        for task in tasks_of(moment.config.tasks):
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


def _start_over(folder: Path) -> None:
    """Delete the folder of a step, because a resumed run measures it again with weights that may differ slightly."""
    with distributed.failing_together("Making room for the measurement"):
        if distributed.is_main():
            make_subfolder(folder.parent)
            remove(folder, mark=MARK if (folder / MARK).exists() else RUN)  # folders of earlier releases have no marker
            folder.mkdir()
            mark(folder, "temporary")
    distributed.barrier()
