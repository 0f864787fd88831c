"""The trackers of a recipe."""

from __future__ import annotations

import dataclasses

from mm_moslora.config import TrackConfig
from mm_moslora.tracking.jsonl_tracker import JsonlTracker
from mm_moslora.tracking.mlflow_tracker import MlflowTracker
from mm_moslora.tracking.tensorboard_tracker import TensorBoardTracker
from mm_moslora.tracking.tracker import Labels, Tracker, Trackers
from mm_moslora.tracking.trackio_tracker import TrackioTracker
from mm_moslora.tracking.wandb_tracker import WandbTracker
from mm_moslora.utils.errors import ConfigError
from mm_moslora.utils.package_requirements import install_command, is_installed


def build_trackers(config: TrackConfig, *, active: bool | None = None) -> Trackers:
    """The trackers of a recipe, JSONL first.

    Args:
        config: the recipe's `track`.
        active: see `Trackers`.

    Raises:
        ConfigError: a tracker's package is not installed.
    """
    for name in config.trackers:
        if not is_installed(name):
            raise ConfigError(f"track.trackers holds {name!r}, which is not installed: {install_command(name)}")
    labels = Labels(**{item.name: getattr(config, item.name) for item in dataclasses.fields(Labels)})
    made: list[Tracker] = [JsonlTracker()]
    if "tensorboard" in config.trackers:
        made.append(TensorBoardTracker())
    if "trackio" in config.trackers:
        made.append(TrackioTracker(labels))
    if "mlflow" in config.trackers:
        made.append(MlflowTracker(labels))
    if "wandb" in config.trackers:
        made.append(WandbTracker(labels))
    return Trackers(made, active=active)
