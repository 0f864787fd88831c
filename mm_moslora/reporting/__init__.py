"""Reports: a run folder becomes one HTML file that needs no network, from JSON and JSONL only (no torch)."""

from mm_moslora.reporting.run_data import RunData, load_run
from mm_moslora.reporting.run_page import build_report

__all__ = ["RunData", "build_report", "load_run"]
