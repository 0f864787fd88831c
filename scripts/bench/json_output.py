"""Standard output of a benchmark with `--json`: one object, whatever the libraries print."""

from __future__ import annotations

import os
import sys
from typing import TextIO


def results_alone() -> TextIO:
    """Standard output for the caller; what anybody else writes there from now on goes to standard error."""
    sys.stdout.flush()
    results = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return results
