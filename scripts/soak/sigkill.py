"""Kill runs of two ranks with SIGKILL at random times, also while saving; each must end as an undisturbed run does.

Every run saves after every step. It is killed several times, one rank or both, restarted by the same command each time,
and finished. Its losses and weights must then equal those of an undisturbed run, bit for bit.

    python scripts/soak/sigkill.py --kills 100
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import shutil
import signal
import sys
import time
from collections import Counter
from pathlib import Path

from parts import Ledger, Ranks, hexed, make_parts, make_recipe, metrics, soak, weights, write

from mm_moslora.utils.progress_bar import Progress

STEPS, KILLS_PER_RUN = 12, 8
STAGES = ("zero2", "zero3", "zero0", "zero1")
MOMENTS = ("while a checkpoint was being written", "before the first checkpoint", "between saves", "never killed")


def _moment(run: Path) -> str:
    """The phase of a run, from its folder."""
    if list(run.glob(".tmp-checkpoint-*")):
        return MOMENTS[0]
    return MOMENTS[2] if list(run.glob("checkpoint-*")) else MOMENTS[1]


def _steps(run: Path) -> int:
    """Number of logged steps."""
    path = run / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.is_file() else 0


def _wait(run: Path, steps: int, pids: list[int]) -> None:
    """Wait until a number of steps is logged, or a rank is gone."""
    while _steps(run) < steps and all(Path(f"/proc/{pid}/exe").exists() for pid in pids):
        time.sleep(0.01)


def _kill(pids: list[int]) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _end_like_a_launcher(pids: list[int], grace: float) -> None:
    """Wait for the end of a rank that lost its peer: by itself or, after a grace period, by its launcher."""
    deadline = time.monotonic() + grace
    while time.monotonic() < deadline and any(Path(f"/proc/{pid}/exe").exists() for pid in pids):
        time.sleep(0.02)
    _kill(pids)


def torment(ranks: Ranks, recipe: str, run: Path, seconds: float, rng: random.Random) -> list[str]:
    """Kill a run, whose longest step takes some seconds, several times, at a random moment of a random step or of the
    start, then let it end; the phase of the run at each kill."""
    moments = []
    for number in range(KILLS_PER_RUN):
        group = ranks.start([recipe])
        victims = rng.choice((group.pids[:1], group.pids[1:], group.pids))
        if rng.random() < 0.8:
            _wait(run, rng.randint(1, 2) + number * (STEPS - 2) // KILLS_PER_RUN, group.pids)
        time.sleep(rng.random() * seconds)
        moment = _moment(run)
        alive = any(Path(f"/proc/{pid}/exe").exists() for pid in victims)
        _kill(victims)
        _end_like_a_launcher(group.pids, grace=2 * rng.random())
        ranks.finish(group, limit=300)
        if alive and -signal.SIGKILL in group.codes:
            moments.append(moment)
    ranks.run([recipe], limit=600)
    return moments


def run(kills: int, root: Path, *, stages: tuple[str, ...] = STAGES, ledger: Ledger) -> None:
    """Repeat until there are enough kills; each finished run becomes an entry."""
    parts = make_parts(root)

    def recipe_of(name: str, stage: str) -> str:
        return write(make_recipe(parts, root / name, stage, steps=STEPS, save_every=1, dropout=0.1))

    done = sum(len(entry["moments"]) for entry in ledger.entries)
    with Ranks(root / "logs") as ranks, Progress("kills", kills, unit="kill", initial=done) as progress:
        expected, seconds = {}, {}
        for stage in stages:
            ranks.run([recipe_of(f"straight-{stage}", stage)], limit=600)
            folder = root / f"straight-{stage}"
            seconds[stage] = max(line["step_seconds"] for line in metrics(folder))
            expected[stage] = (hexed(folder), weights(folder, STEPS))
        while done < kills:
            number = len(ledger.entries)
            stage, folder = stages[number % len(stages)], root / f"run-{number}"
            moments = torment(ranks, recipe_of(folder.name, stage), folder, seconds[stage], random.Random(number))
            equal = (hexed(folder), weights(folder, STEPS)) == expected[stage]
            ledger.add({"stage": stage, "equal": equal, "moments": moments})
            shutil.rmtree(folder)
            done += len(moments)
            progress.update(done, f"{sum(not entry['equal'] for entry in ledger.entries)} runs not bit-equal")


def work(options: argparse.Namespace, folder: Path) -> Counter[str]:
    """Kills by the phase of their runs, each of which is bit-equal or not."""
    ledger = Ledger(options.ledger)
    run(options.kills, folder, ledger=ledger)
    return Counter(
        f"{moment}, {'bit-equal' if entry['equal'] else 'NOT EQUAL'} under {entry['stage']}"
        for entry in ledger.entries
        for moment in entry["moments"] or MOMENTS[3:]
    )


GOOD = {f"{moment}, bit-equal under {stage}" for moment in MOMENTS for stage in STAGES}

if __name__ == "__main__":
    sys.exit(soak(__doc__, work, good=GOOD, ledger="runs", kills=(100, "kills in all")))
