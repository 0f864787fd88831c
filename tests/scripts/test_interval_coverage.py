"""The simulation of intervals: its rows, and that they hold about as often as eval/README.md says."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

from preloaded import Preloaded

CHECKOUT = Path(__file__).parents[2]
SCRIPT = CHECKOUT / "scripts" / "bench" / "interval_coverage.py"


def test_a_short_simulation_has_every_row(python: Preloaded) -> None:
    done = subprocess.run(
        [python.ours, str(SCRIPT), "--json", "--runs", "25"], capture_output=True, text=True, check=True
    )
    found = json.loads(done.stdout.splitlines()[-1])
    assert (found["benchmark"], found["runs"], found["summary"]["no_width"]) == ("interval_coverage", 25, 0)
    assert found["summary"]["least"] >= 0.72  # of 25 draws; a normal interval holds in 12 of them in the uneven row
    assert sum(row["held"] for row in found["rows"]) / len(found["rows"]) > 0.9
    table = (CHECKOUT / "eval" / "README.md").read_text(encoding="utf-8").split("## Error bars")[1].split("\n## ")[0]
    shares = [float(share) for share in re.findall(r"\| (\d\d\.\d) % \|", table)]
    assert 0 < len(shares) <= len(found["rows"])  # the page has the rows that differ
    assert min(shares) > 92
