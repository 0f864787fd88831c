"""Kill runs of two ranks with SIGKILL at random moments, saves included; each must end as an undisturbed run does.

Every run saves after every step, is killed some times, one rank or both, started again by the same command each time,
and finished. Its losses and its weights must then equal, bit for bit, those of a run that nobody touched.

    python scripts/soak/sigkill.py --kills 100
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from parts import Ranks, hexed, make_parts, tiny_recipe, weights, write

STEPS, KILLS_PER_RUN = 12, 5


@dataclass
class Report:
    """What was done and what came of it."""

    kills: int = 0
    runs: int = 0
    unequal: list[str] = field(default_factory=list)
    moments: Counter[str] = field(default_factory=Counter)
    """What the run had reached when it was killed."""


def _moment(run: Path) -> str:
    """Where in its life a run folder is."""
    if list(run.glob(".tmp-checkpoint-*")):
        return "while a checkpoint was being written"
    if not list(run.glob("checkpoint-*")):
        return "before the first checkpoint"
    return "between saves"


def torment(ranks: Ranks, recipe: str, run: Path, seconds: float, rng: random.Random, report: Report) -> None:
    """Kill a run some times, then let it end."""
    for _ in range(KILLS_PER_RUN):
        group = ranks.start([recipe])
        victims = rng.choice((group.pids[:1], group.pids[1:], group.pids))
        time.sleep(rng.uniform(0.2, 1.0) * seconds)
        moment = _moment(run)
        killed = 0
        for pid in victims:
            try:
                os.kill(pid, signal.SIGKILL)
                killed += 1
            except ProcessLookupError:
                continue
        ranks.finish(group, limit=300)
        if -signal.SIGKILL in group.codes and killed:
            report.kills += 1
            report.moments[moment] += 1
    ranks.run([recipe], limit=600)


def run(kills: int, place: Path, *, stages: tuple[str, ...], say: Callable[[str], None]) -> Report:
    """Kill until there were enough."""
    parts, report, rng = make_parts(place), Report(), random.Random(0)
    with Ranks(place / "logs") as ranks:
        expected, seconds = {}, {}
        for stage in stages:
            straight = tiny_recipe(
                parts, place / f"straight-{stage}", zero=stage, steps=STEPS, save_every=1, dropout=0.1
            )
            started = time.monotonic()
            ranks.run([write(straight)], limit=600)
            seconds[stage] = time.monotonic() - started
            folder = place / f"straight-{stage}"
            expected[stage] = (hexed(folder), weights(folder, STEPS))
        while report.kills < kills:
            stage = stages[report.runs % len(stages)]
            folder = place / f"run-{report.runs}"
            recipe = write(tiny_recipe(parts, folder, zero=stage, steps=STEPS, save_every=1, dropout=0.1))
            torment(ranks, recipe, folder, seconds[stage], rng, report)
            report.runs += 1
            if (hexed(folder), weights(folder, STEPS)) != expected[stage]:
                report.unequal.append(f"{stage}, run {report.runs}")
            shutil.rmtree(folder)
            say(f"{report.kills} kills, {report.runs} runs finished, {len(report.unequal)} not bit-equal")
    return report


def main() -> int:
    """Run and print the counts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--stages", default="zero2,zero3,zero0,zero1", help="ZeRO presets, taken in turn")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        report = run(
            options.kills, Path(place), stages=tuple(options.stages.split(",")),
            say=lambda text: print(text, file=sys.stderr, flush=True),
        )  # fmt: skip
    result = {
        "soak": "sigkill", "kills": report.kills, "runs": report.runs, "unequal": len(report.unequal),
        "moments": report.moments,
    }  # fmt: skip
    print(json.dumps(result) if options.json else "\n".join(f"{key}: {value}" for key, value in result.items()))
    return 1 if report.unequal else 0


if __name__ == "__main__":
    sys.exit(main())
