"""The verb `report`. Parsing and printing only; heavy imports happen inside the verb."""

from __future__ import annotations

from pathlib import Path


def report(run: Path, *, output: Path | None = None) -> int:
    """Write one self-contained HTML report of a run.

    Parameters
    ----------
    run
        Run folder.
    output
        HTML file; default: report.html in the run folder.
    """
    from mm_moslora.reporting import build_report

    print(build_report(run, output or run / "report.html"))
    return 0
