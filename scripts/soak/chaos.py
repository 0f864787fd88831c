"""Random faults of many kinds at random moments, over ZeRO stages and ranks; a run must end as an undisturbed one.

A chain is one run that is hit again and again, started by the same command after each fault, and finished. Its losses
(in hex) and weights must then equal those of an undisturbed run, bit for bit. Faults are drawn from a seed. The user
repairs one thing only: a checkpoint, where every one of the run is damaged.

    python scripts/soak/chaos.py --faults 200 --seed 0 --ledger chaos.jsonl

As root it runs in a mount namespace of its own, with a small tmpfs that really fills up.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

from chaos_faults import KINDS, OUTSIDE_ONLY, Trial
from chaos_launch import Forked, Launched, Started
from parts import Ledger, Preloaded, Ranks, make_parts, make_recipe, weights, write

from mm_moslora.config import Recipe, SourceConfig, ValidateConfig
from mm_moslora.utils.progress_bar import Progress
from mm_moslora.utils.run_paths import checkpoints

STEPS, FAULTS_PER_CHAIN, LAUNCHED_EVERY = 30, 8, 6
STAGES, WORLDS = ("zero0", "zero1", "zero2", "zero3"), (2, 3, 4)


class Chain:
    """One run, from its first start to its end.

    Args:
        number: of the chain; decides stage, ranks and launcher.
        seed: of the script.
        folder: for recipes, logs and notes.
        disk: a folder for the run, on a small file system if there is one.
        parts: of tiny models, and records.
    """

    def __init__(self, number: int, seed: int, *, folder: Path, disk: Path, parts: dict[str, Path]) -> None:
        self.number, self.rng = number, random.Random(f"{seed}/{number}")
        self.launched = number % LAUNCHED_EVERY == LAUNCHED_EVERY - 1
        self.stage = STAGES[(number + number // 12) % len(STAGES)]
        self.world = 2 if self.launched else WORLDS[number // len(STAGES) % len(WORLDS)]
        self.folder, self.disk, self.parts = folder, disk, parts
        self.run = disk / f"chain-{number}"
        self.cache = folder / f"cache-{number}"
        self.ranks: Ranks | None = None
        self.python: Path | None = None
        self.excused: set[int] = set()
        """Steps whose line of metrics.jsonl was damaged."""
        self.launches = 0
        every = self.rng.choice((1, 2, 3))
        self.keys: dict[str, Any] = {"save_every": every, "rehearsal": self.rng.random() < 0.2}
        self.with_features = self.rng.random() < 0.5

    def recipe(self, run: Path, **train: Any) -> Recipe:
        """The chain's recipe; `train` overrides keys that change no number."""
        settings = {"validate_every": 5, "micro_batch": 2, "max_skipped_steps": 3, "step_timeout_minutes": 2}
        made = make_recipe(self.parts, run, self.stage, steps=STEPS, dropout=0.1, **(settings | train))
        held_out = SourceConfig(path=str(self.parts["held_out"]), image_folder=str(self.parts["images"]))
        data = replace(made.data, validation=[held_out], cache=str(self.cache), max_bad_share=0.5)
        vision = made.model.vision
        if self.with_features and vision is not None:
            vision = replace(vision, feature_cache=str(self.cache / "features"))
        best = None if train.get("save_every") == 0 else "validation_loss"
        return replace(
            made, data=data, model=replace(made.model, vision=vision), validate=ValidateConfig(best=best),
            track=replace(made.track, trackers=["tensorboard"] if self.number % 2 else []),
        )  # fmt: skip

    def start(self, fault: dict[str, Any] | None = None, **train: Any) -> Started:
        """Give the same command again."""
        self.launches += 1
        path = self.folder / f"chain-{self.number}-{self.launches}.yaml"
        path.write_text(self.recipe(self.run, **(self.keys | train)).to_yaml())
        if self.launched:
            assert self.python is not None
            log = self.folder / f"log-{self.number}-{self.launches}"
            return Launched(self.python, path, self.run, log=log, world=self.world)
        assert self.ranks is not None
        notes = self.folder / f"notes-{self.number}-{self.launches}"
        return Forked(self.ranks, path, self.run, notes=notes, world=self.world, fault=fault)

    def torment(self, kinds: list[str], most: int, losses: dict[int, str]) -> list[dict[str, Any]]:
        """Hit the run with faults until it has had enough, or is over; `losses` are those of an undisturbed run."""
        told = []
        for kind in kinds[:most]:
            trial = Trial(self, kind, aim=len(told) * (STEPS - 6) // most)
            found = trial.hit()
            if found is None:
                break
            if KINDS[kind] != "nan" and (odd := self.odd_losses(losses, so_far=True)):
                found["wrong"] = found["wrong"] or odd  # the first fault after which losses differ has changed them
            told.append({"kind": kind} | found)
        return told

    def finish(self) -> str:
        """Let the run end by itself; what is wrong with that, or nothing."""
        started = self.start()
        codes = started.wait(300)
        return (
            "" if codes is not None and not any(codes) else f"the run does not finish: {codes} {started.said()[-2500:]}"
        )

    def compare(self, expected: tuple[dict[int, str], dict[str, str]]) -> str:
        """Differences from an undisturbed run; empty if there is none."""
        losses, trained = expected
        told = [odd] if (odd := self.odd_losses(losses)) else []
        if (other := weights(self.run, STEPS)) != trained:
            told.append(f"weights: {sorted(name for name in trained if other.get(name) != trained[name])}")
        return "; ".join(told)

    def odd_losses(self, losses: dict[int, str], *, so_far: bool = False) -> str:
        """Steps with another loss than in an undisturbed run, and the greatest difference; empty if there is none.

        Args:
            losses: of the undisturbed run.
            so_far: of the steps up to the newest checkpoint; a step that was skipped after it is done again.
        """
        found = losses_of(self.run)
        last = max((step for step, _ in checkpoints(self.run)), default=0) if so_far else STEPS
        wanted = {
            step: loss
            for step, loss in losses.items()
            if step not in self.excused and (not so_far or (step in found and step <= last))
        }
        odd = [step for step in wanted if found.get(step) != losses[step]]
        if not odd:
            return ""
        off = [
            abs(float.fromhex(found[step]) / float.fromhex(losses[step]) - 1)
            for step in odd
            if found.get(step, "twice") != "twice"
        ]
        return f"losses of steps {odd}, by up to {max(off, default=0):.1e}"


def losses_of(run: Path) -> dict[int, str]:
    """Losses in hex by step; a line that cannot be read is none."""
    losses: dict[int, str] = {}
    path = run / "metrics.jsonl"
    for line in path.read_text(errors="replace").splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError, TypeError, AttributeError, KeyError):
            record = json.loads(line)
            loss = float(record["loss"]).hex()
            losses[record["step"]] = "twice" if record["step"] in losses else loss
    return losses


def kinds_of(chain: Chain) -> list[str]:
    """The kinds of a chain's faults, each drawn as often as the others over all chains."""
    known = [kind for kind in KINDS if not chain.launched or kind in OUTSIDE_ONLY]
    known = [kind for kind in known if kind != "disk full" or chain.disk.name == "disk"]
    return [known[(chain.number * FAULTS_PER_CHAIN + index) % len(known)] for index in range(FAULTS_PER_CHAIN)]


def run(faults: int, folder: Path, *, seed: int, disk: Path, ledger: Ledger, chains: range | None = None) -> None:
    """Repeat until there are enough faults; each finished chain becomes an entry."""
    parts = make_parts(folder / "parts", records=48)
    parts["images"] = parts["records"].parent / "images"
    parts["held_out"] = parts["records"].with_name("held_out.jsonl")
    parts["held_out"].write_text("".join(parts["records"].read_text().splitlines(keepends=True)[:6]))
    done = sum(len(entry["faults"]) for entry in ledger.entries)
    expected: dict[tuple[str, int], tuple[dict[int, str], dict[str, str]]] = {}
    number = len(ledger.entries) if chains is None else chains.start
    with (
        contextlib.ExitStack() as stack,
        Ranks(folder / "logs") as ranks,
        Progress("faults", faults, unit="fault", initial=done) as progress,
    ):
        python: Path | None = None
        while done < faults and (chains is None or number in chains):
            chain = Chain(number, seed, folder=folder, disk=disk, parts=parts)
            chain.ranks = ranks
            if chain.launched and python is None:
                python = stack.enter_context(Preloaded(folder / "python")).ours
            chain.python = python
            if (chain.stage, chain.world) not in expected:
                straight = folder / f"straight-{chain.stage}-{chain.world}"
                ranks.run([write(chain.recipe(straight))], ranks=chain.world, limit=600)
                expected[chain.stage, chain.world] = (losses_of(straight), weights(straight, STEPS))
            began = time.monotonic()
            kinds = kinds_of(chain)
            chain.rng.shuffle(kinds)
            faults_met = chain.torment(kinds, min(len(kinds), faults - done), expected[chain.stage, chain.world][0])
            odd = chain.finish() or chain.compare(expected[chain.stage, chain.world])
            ledger.add({
                "chain": number, "stage": chain.stage, "ranks": chain.world, "launched": chain.launched,
                "equal": not odd, "odd": odd, "excused": sorted(chain.excused), "faults": faults_met,
                "seconds": round(time.monotonic() - began),
            })  # fmt: skip
            shutil.rmtree(chain.run, ignore_errors=True)
            done, number = done + len(faults_met), number + 1
            wrong = sum(not entry["equal"] or any(f["wrong"] for f in entry["faults"]) for entry in ledger.entries)
            progress.update(done, f"{wrong} chains with something wrong")


def table(ledger: Ledger) -> str:
    """The faults by kind: how often, how they ended, and how many were in chains that ended bit for bit equal."""
    rows: dict[str, list[tuple[dict[str, Any], bool]]] = defaultdict(list)
    for entry in ledger.entries:
        for fault in entry["faults"]:
            rows[fault["kind"]].append((fault, entry["equal"]))
    lines = [
        "| fault | times | ended how | in runs that ended equal | promise broken |",
        "| --- | --- | --- | --- | --- |",
    ]
    for kind in [kind for kind in KINDS if kind in rows]:
        found = rows[kind]
        ended = ", ".join(f"{name} {count}" for name, count in Counter(f["ended"] for f, _ in found).most_common())
        wrong = sum(bool(fault["wrong"]) for fault, _ in found)
        lines.append(f"| {kind} | {len(found)} | {ended} | {sum(equal for _, equal in found)} | {wrong} |")
    return "\n".join(lines)


def summary(ledger: Ledger) -> dict[str, Any]:
    """Counts of runs and faults."""
    faults = [fault for entry in ledger.entries for fault in entry["faults"]]
    return {
        "faults": len(faults), "runs": len(ledger.entries),
        "unequal": sum(not entry["equal"] for entry in ledger.entries),
        "wrong": sum(bool(fault["wrong"]) for fault in faults),
        "launched": sum(len(entry["faults"]) for entry in ledger.entries if entry["launched"]),
        "stages_and_ranks": Counter(f"{e['stage']} on {e['ranks']}" for e in ledger.entries for _ in e["faults"]),
        "kinds": Counter(fault["kind"] for fault in faults),
        "moments": Counter(re.sub(r"\d+ ", "", fault["moment"]) for fault in faults),
    }  # fmt: skip


@contextlib.contextmanager
def small_disk(folder: Path):
    """A tmpfs of 64 MiB in a namespace of this process, or a folder where that is not allowed."""
    disk = folder / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", disk], check=False).returncode == 0
    try:
        yield disk if mounted else folder / "plain"
    finally:
        if mounted:
            subprocess.run(["umount", "-l", disk], check=False)


def main() -> int:
    """Run and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ledger", type=Path, help="JSON lines of finished runs; a restart skips them")
    parser.add_argument("--chain", type=int, help="run this one only, to look at a failure again")
    options = parser.parse_args()
    if os.geteuid() == 0 and "CHAOS_MOUNTS" not in os.environ and shutil.which("unshare"):
        os.environ["CHAOS_MOUNTS"] = "own"
        os.execvp("unshare", ["unshare", "-m", sys.executable, *sys.argv])
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(message)s")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    ledger = Ledger(options.ledger)
    chains = None if options.chain is None else range(options.chain, options.chain + 1)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch, small_disk(Path(scratch)) as disk:
        run(options.faults, Path(scratch), seed=options.seed, disk=disk, ledger=ledger, chains=chains)
    result = summary(ledger)
    print(table(ledger), *(f"{key}: {value}" for key, value in result.items()), sep="\n")
    for entry in ledger.entries:
        for what in [
            entry["odd"],
            *(f"{fault['kind']}: {fault['wrong']}" for fault in entry["faults"] if fault["wrong"]),
        ]:
            if what:
                print(f"chain {entry['chain']} ({entry['stage']}, {entry['ranks']} ranks): {what}", file=sys.stderr)
    return 1 if result["unequal"] or result["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
