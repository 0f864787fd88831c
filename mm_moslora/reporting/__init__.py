"""Reports: a run folder's JSON and JSONL files become one self-contained HTML file (no torch)."""

from mm_moslora.reporting.run_data import RunData, load_run
from mm_moslora.reporting.run_page import build_report

__all__ = ["RunData", "build_report", "load_run"]
