"""CPU seconds of a comparison whose runs share a process, a base model and features, over one process per run.

Both ways do the same runs: three arms, two seeds, a few steps each, and the same questions. Rounds are interleaved with
rotating order, the figure is the median of the ratios of single rounds, and outcomes must be equal.

    python scripts/bench/comparison.py RECIPE TASK              a table
    python scripts/bench/comparison.py RECIPE TASK --json       one JSON object on stdout
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

from json_output import results_alone

from mm_moslora.compare import comparison_cell
from mm_moslora.compare.arms import parse_arms
from mm_moslora.compare.comparison_cell import Job
from mm_moslora.compare.comparison_plan import Cell, Settings
from mm_moslora.compare.process_pool import Pool, Slot
from mm_moslora.config import Recipe, load_recipe
from mm_moslora.utils.hardware import hardware

ARMS, SEEDS = "lora,moslora:orthogonal,dora", 2


class Timed(comparison_cell.Runner):
    """Writes the CPU seconds of every run, with what its process did before."""

    def __init__(self, slot: Slot) -> None:
        """The time counts from the fork on."""
        super().__init__(slot)
        self._before = 0.0

    def __call__(self, job: Job) -> bool:
        """Whether the process goes on."""
        if job.alone:  # nothing is shared
            comparison_cell._as_trained = lambda job: job.recipe
            comparison_cell.Job.feature_cache = None  # type: ignore[assignment,method-assign]
        goes_on = super().__call__(job)
        now = time.process_time()
        (job.place / "cpu_seconds").write_text(str(now - self._before))
        self._before = now
        return goes_on


def measure(recipe: Recipe, settings: Settings, folder: Path, *, shared: bool) -> tuple[float, list[dict[str, object]]]:
    """CPU seconds and outcomes of all runs, one after the other."""
    pool = Pool(Timed, [Slot()], kind=comparison_cell.kind_of, preload=comparison_cell.PRELOAD)
    jobs, rehearsed = [], set()
    try:
        for seed in range(settings.seeds):
            for arm in settings.arms:
                cell = Cell(arm=arm, rate=settings.rates[0], seed=seed, tuning=False)
                job = Job(
                    cell=cell, recipe=cell.recipe(recipe, folder), settings=settings, folder=folder, alone=not shared,
                    rehearsed=arm.name in rehearsed,
                )  # fmt: skip
                rehearsed.add(arm.name)
                jobs.append(job)
                pool.start(job)
                while pool.running:
                    pool.wait(5)
    finally:
        pool.stop()
    outcomes = [comparison_cell.read_outcome(job.place) for job in jobs]
    bad = [outcome for outcome in outcomes if outcome is None or outcome.status != "ok"]
    if bad:
        sys.exit(f"a run failed: {bad[0]}")
    numbers = [{"test": o.test, "losses": (o.first_loss, o.last_loss)} for o in outcomes if o is not None]
    return sum(float((job.place / "cpu_seconds").read_text()) for job in jobs), numbers


def main() -> None:
    """Measure, and print a table or JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="YAML file")
    parser.add_argument("task", help="as for mm-moslora eval run")
    parser.add_argument("--steps", type=int, default=6, help="steps of a run")
    parser.add_argument("--limit", type=int, default=32, help="questions of the task")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    output = results_alone() if given.json else sys.stdout
    recipe = load_recipe(given.recipe, [f"train.steps={given.steps}"])
    settings = Settings(
        arms=parse_arms(ARMS, recipe), rates=[recipe.optim.lr], seeds=SEEDS, tasks=[given.task], limit=given.limit,
        max_new_tokens=4,
    )  # fmt: skip
    rows = []
    for number in range(given.rounds):
        seconds, outcomes = {}, {}
        for shared in ((True, False), (False, True))[number % 2]:
            with tempfile.TemporaryDirectory() as folder:
                seconds[shared], outcomes[shared] = measure(recipe, settings, Path(folder), shared=shared)
        if outcomes[True] != outcomes[False]:
            sys.exit(f"the numbers differ: {outcomes}")
        rows.append({"shared_seconds": seconds[True], "alone_seconds": seconds[False]})
        print(f"round {number + 1}: {seconds[True]:.1f} s shared, {seconds[False]:.1f} s alone", file=sys.stderr)
    ratio = statistics.median(row["shared_seconds"] / row["alone_seconds"] for row in rows)
    if given.json:
        versions = {name: metadata.version(name) for name in ("torch", "transformers", "peft")}
        found = {"benchmark": "comparison", "hardware": hardware(), "versions": versions, "rows": rows}
        print(json.dumps(found | {"summary": {"shared_over_alone": ratio}}), file=output)
    else:
        print(f"CPU seconds of {len(settings.arms)} arms with {SEEDS} seeds, shared over alone: {ratio:.2f}")


if __name__ == "__main__":
    main()
