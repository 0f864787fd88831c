"""Tracking of metrics, samples and adapters during training. `metrics.jsonl` is always written."""

from mm_moslora.tracking.jsonl_tracker import JsonlTracker, read_metrics
from mm_moslora.tracking.recipe_trackers import build_trackers
from mm_moslora.tracking.tracker import SampleAnswer, Tracker, Trackers

__all__ = ["JsonlTracker", "SampleAnswer", "Tracker", "Trackers", "build_trackers", "read_metrics"]
