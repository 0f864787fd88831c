"""How `eval run` asks a model: from a cache, and in batches of which size."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal

from mm_moslora_eval.backends.open_model import is_local
from mm_moslora_eval.protocol.model_interface import Model
from mm_moslora_eval.run.task_runner import EvaluationSettings
from mm_moslora_eval.run.wrapped_models.answer_cache import CachedModel
from mm_moslora_eval.run.wrapped_models.automatic_batch import MOST, AutomaticBatch


def opened_with(model: Callable[[], Model], *, cache: Path | None = None, automatic: bool = False) -> Model:
    """A loaded model.

    Args:
        model: loads it.
        cache: folder of answers that are shared.
        automatic: whether the size of its batches is found.
    """
    loaded = model()
    batched = AutomaticBatch(loaded) if automatic else loaded
    return batched if cache is None else CachedModel(batched, cache)


def windows_of(batch_size: int | Literal["auto"], model: str) -> int:
    """The batch size by which work is divided; of `auto` the largest one, and for a service the default."""
    if batch_size != "auto":
        return batch_size
    return MOST if is_local(model) else EvaluationSettings.batch_size
