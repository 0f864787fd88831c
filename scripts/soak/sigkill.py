"""Kill runs of two ranks with SIGKILL at random moments, saves included; each must end as an undisturbed run does.

Every run saves after every step, is killed some times, one rank or both, started again by the same command each time,
and finished. Its losses and its weights must then equal, bit for bit, those of a run that nobody touched.

    python scripts/soak/sigkill.py --kills 100
"""

from __future__ import annotations

import argparse
import contextlib
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

from parts import Ranks, hexed, make_parts, metrics, tiny_recipe, weights, write

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


def _steps(run: Path) -> int:
    """Steps that are logged."""
    path = run / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.is_file() else 0


def _wait(run: Path, steps: int, pids: list[int]) -> None:
    """Wait until so many steps are logged, or a rank is gone."""
    while _steps(run) < steps and all(Path(f"/proc/{pid}").exists() for pid in pids):
        time.sleep(0.01)


def _end_like_a_launcher(pids: list[int], *, grace: float = 30.0) -> None:
    """A rank whose peer died before they met waits for it; torchrun ends it, and so does this."""
    deadline = time.monotonic() + grace
    while any(Path(f"/proc/{pid}/exe").exists() for pid in pids):
        if time.monotonic() > deadline:
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            return
        time.sleep(0.05)


def torment(ranks: Ranks, recipe: str, run: Path, seconds: float, rng: random.Random, report: Report) -> None:
    """Kill a run some times, at a random moment of a random step or of the start, then let it end."""
    for number in range(KILLS_PER_RUN):
        group = ranks.start([recipe])
        victims = rng.choice((group.pids[:1], group.pids[1:], group.pids))
        if rng.random() < 0.8:
            _wait(run, rng.randint(1, 2) + number * (STEPS - 2) // KILLS_PER_RUN, group.pids)
        time.sleep(rng.random() * seconds)
        moment = _moment(run)
        killed = 0
        for pid in victims:
            try:
                os.kill(pid, signal.SIGKILL)
                killed += 1
            except ProcessLookupError:
                continue
        _end_like_a_launcher(group.pids)
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
            ranks.run([write(straight)], limit=600)
            folder = place / f"straight-{stage}"
            seconds[stage] = max(line["step_seconds"] for line in metrics(folder))
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
