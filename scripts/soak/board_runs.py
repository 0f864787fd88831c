#!/usr/bin/env python
"""How long the dashboard takes over many runs: the first look, one without changes, and ones in which runs grow.

    python scripts/soak/board_runs.py --runs 30 --steps 5000

The page asks for the rows of all runs once a second, and for the curves of those that are shown. Prints seconds, sizes
of the answers, and the resident memory that the runs cost.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from steps import resident_mib

from mm_moslora.serve.dashboard.dashboard_runs import Folder

METRICS = (
    "loss",
    "accuracy",
    "tokens_per_second",
    "mfu",
    "grad_norm",
    "eta_seconds",
    *(f"mixer/{n}" for n in range(24)),
)


FOLLOWED = 30.0


def line(step: int) -> str:
    """A record of a step, as long as those of a real run."""
    return json.dumps({"step": step, "time": 1.8e9 + step} | {name: random.random() for name in METRICS}) + "\n"


def make_runs(folder: Path, *, runs: int, steps: int) -> list[Path]:
    """Runs that train, below one folder."""
    made = []
    for number in range(runs):
        run = folder / f"sweep-{number:02d}"
        run.mkdir()
        (run / "config.yaml").write_text(f"name: sweep-{number:02d}\noptim: {{lr: {number}.0e-5}}\n")
        (run / "state.json").write_text('{"state": "finished"}')
        (run / "metrics.jsonl").write_text("".join(line(step) for step in range(1, steps + 1)))
        made.append(run)
    return made


def seconds(call: Callable[[], Any]) -> float:
    """Processor time of a call."""
    began = time.process_time()
    call()
    return round(time.process_time() - began, 3)


def measure(folder: Path, *, runs: int, steps: int) -> dict[str, Any]:
    """The looks at these runs."""
    made = make_runs(folder, runs=runs, steps=steps)
    before = resident_mib()
    board = Folder(folder)

    def follow() -> float:
        """Share of a core over half a minute, in which each run grows every second and a page looks."""
        began, spent = time.monotonic(), time.process_time()
        while time.monotonic() - began < FOLLOWED:
            grow(made)
            time.sleep(1.0)
        return round((time.process_time() - spent) / (time.monotonic() - began), 2)

    def grow(some: list[Path]) -> float:
        for run in some:
            with (run / "metrics.jsonl").open("a") as stream:
                stream.write(line(steps + 1))
        return seconds(board.rows)

    return {
        "runs": runs, "steps": steps, "metrics": len(METRICS), "first_look": seconds(board.rows),
        "nothing_changed": seconds(board.rows), "one_run_grew": grow(made[:1]),
        "share_of_a_core_while_all_grow": follow(),
        "rows_kib": len(json.dumps(board.rows())) // 1024,
        "curves_kib": len(json.dumps(board.detail(made[0].name))) // 1024,
        "resident_mib": round(resident_mib() - before, 1),
    }  # fmt: skip


def main() -> int:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=30, help="(default 30)")
    parser.add_argument("--steps", type=int, default=5000, help="of each run (default 5000)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(measure(Path(folder), runs=options.runs, steps=options.steps), indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
