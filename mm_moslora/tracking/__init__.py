"""Tracking of metrics, samples and adapters during training. `metrics.jsonl` is always written."""

from __future__ import annotations

from collections.abc import Callable

from mm_moslora.config import TrackConfig
from mm_moslora.tracking.jsonl_tracker import JsonlTracker, read_metrics
from mm_moslora.tracking.mlflow_tracker import MlflowTracker
from mm_moslora.tracking.tensorboard_tracker import TensorBoardTracker
from mm_moslora.tracking.tracker import SampleAnswer, Tracker, Trackers
from mm_moslora.tracking.trackio_tracker import TrackioTracker
from mm_moslora.tracking.wandb_tracker import WandbTracker
from mm_moslora.utils.errors import ConfigError
from mm_moslora.utils.package_requirements import install_command, is_installed

__all__ = ["JsonlTracker", "SampleAnswer", "Tracker", "Trackers", "build_trackers", "read_metrics"]

_MAKERS: dict[str, Callable[[TrackConfig], Tracker]] = {
    "tensorboard": lambda _: TensorBoardTracker(),
    "trackio": TrackioTracker,
    "mlflow": MlflowTracker,
    "wandb": WandbTracker,
}


def build_trackers(config: TrackConfig, *, active: bool | None = None) -> Trackers:
    """The trackers of a recipe, JSONL first; ConfigError where a tracker's package is not installed."""
    for name in config.trackers:
        if not is_installed(name):
            raise ConfigError(f"track.trackers holds {name!r}, which is not installed: {install_command(name)}")
    chosen = [make(config) for name, make in _MAKERS.items() if name in config.trackers]
    return Trackers([JsonlTracker(), *chosen], active=active)
