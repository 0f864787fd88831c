"""Harness tasks during a training run: `validate.tasks` of a recipe, measured on the model as it is."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from mm_moslora.utils import distributed
from mm_moslora.utils.errors import ConfigError
from mm_moslora.utils.files import MARK, mark, remove
from mm_moslora_eval.backends.local_model import LocalModel
from mm_moslora_eval.protocol.task_registry import tasks_of
from mm_moslora_eval.run.evaluate_suite import evaluate
from mm_moslora_eval.run.result_file import TaskResult
from mm_moslora_eval.run.task_runner import RUN, Settings

if TYPE_CHECKING:
    from mm_moslora.training.validation import Moment


class _CutShort(BaseException):  # what a sample raises as an Exception is recorded, and the next one is asked
    """A signal came."""


def measure(moment: Moment) -> Mapping[str, float] | None:
    """Run the recipe's tasks; answers and scores stay in the moment's folder.

    Args:
        moment: model, recipe, step; see `mm_moslora.training.validation`.

    Returns:
        `eval/TASK/score` and `eval/TASK/METRIC`, on rank 0; nothing on other ranks. None on ranks that gave up because
        one of them has heard a signal.

    Raises:
        EvalError: see `registry.tasks_of`; or every sample fails.
    """
    config = moment.recipe.validate
    settings = Settings(batch_size=moment.recipe.train.micro_batch, limit=config.task_limit or None)
    _start_over(moment.folder)
    model = LocalModel(moment.assembly, name=f"{moment.recipe.name} at step {moment.step}")
    metrics: dict[str, float] = {}
    asked = moment.folder / "stop"  # rank 0 would wait for a rank that gave up, and then do its share

    def give_way(*_: int) -> None:
        if moment.stop.received:
            asked.touch()
        if asked.exists():
            raise _CutShort

    cut = False
    try:
        for task in tasks_of(config.tasks):
            for result in evaluate(
                model, task, moment.folder, modes=("own",), baselines=(), settings=settings, progress=give_way
            ):
                metrics |= _named(result)
    except _CutShort:
        cut = True
    finally:
        model.close()
    distributed.barrier()
    if cut:
        return None
    return metrics if distributed.is_main() else {}


def _start_over(folder: Path) -> None:
    """A resumed run measures a step anew, with weights that may differ in the last bit."""
    failure: Exception | None = None
    if distributed.is_main():
        try:
            remove(folder, mark=MARK if (folder / MARK).exists() else RUN)  # folders of earlier releases have no mark
            folder.mkdir(parents=True)
            mark(folder, "temporary")
        except (OSError, ConfigError) as error:
            failure = error
    distributed.agree(failure, what="Making room for the measurement")
    distributed.barrier()


def _named(result: TaskResult) -> dict[str, float]:
    found = {"score": result.score} | dict(result.metrics)
    return {f"eval/{result.task}/{metric}": value for metric, value in found.items() if math.isfinite(value)}
