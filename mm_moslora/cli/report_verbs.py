"""The verbs `report` and `board`. Parsing and printing only; heavy imports happen inside the verbs."""

from __future__ import annotations

from pathlib import Path

from mm_moslora.cli.serve_verbs import needs
from mm_moslora.utils.errors import ConfigError


def report(*runs: Path, output: Path | None = None) -> int:
    """Write one self-contained HTML report of a run, or of several runs in shared charts.

    Parameters
    ----------
    runs
        Run folders; up to six.
    output
        HTML file; default: report.html in the run folder, or in the current folder for several runs.
    """
    from mm_moslora.reporting import build_report

    if not runs:
        raise ConfigError("Which run? Give at least one run folder, such as runs/quickstart.")
    target = output or (runs[0] if len(runs) == 1 else Path()) / "report.html"
    build_report(runs, target)
    print(target)
    return 0


def board(folder: Path = Path("runs"), *, port: int = 8265) -> int:
    """Open a dashboard of all runs in a folder, updated while they train; for this machine only.

    Parameters
    ----------
    folder
        Folder that is searched for runs, sub-folders included.
    port
        0 chooses a free port. From another machine: ssh -L PORT:127.0.0.1:PORT HOST.
    """
    needs("starlette", "uvicorn", extra="serve")
    from mm_moslora.serve.dashboard.dashboard_app import serve_board

    serve_board(folder, port=port)
    return 0
