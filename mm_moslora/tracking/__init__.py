"""Tracking: where a run's metrics, samples and adapters go while it trains. `metrics.jsonl` is always written."""

from mm_moslora.tracking.base import Sample, Tracker, Trackers
from mm_moslora.tracking.jsonl import JsonlTracker, read_metrics
from mm_moslora.tracking.recipe_trackers import build_trackers

__all__ = ["JsonlTracker", "Sample", "Tracker", "Trackers", "build_trackers", "read_metrics"]
