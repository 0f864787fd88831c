"""Reports: a run folder becomes one HTML file that needs no network, from JSON and JSONL only (no torch)."""

from mm_moslora.report.html import build_report
from mm_moslora.report.schema import RunData, load_run

__all__ = ["RunData", "build_report", "load_run"]
