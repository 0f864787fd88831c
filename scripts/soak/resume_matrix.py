"""Stop and resume in new processes, over ZeRO stages, precisions and trained parts; losses must be equal in hex.

python scripts/soak/resume_matrix.py
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

from parts import Ledger, Ranks, full, hexed, make_parts, make_recipe, soak, weights, write

from mm_moslora.config import Recipe
from mm_moslora.utils.progress_bar import Progress

STEPS, HALF = 6, 3
STAGES = ("zero0", "zero1", "zero2", "zero3")
TRAINS = ("moslora", "full")
PRECISIONS = ("fp32", "bf16")
VISION = ("frozen", "full")
"""A frozen vision tower's weights are not in the checkpoint; those of a trained one are."""


def run(folder: Path, *, ledger: Ledger) -> None:
    """Whether each combination resumes exactly, one entry each."""
    parts = make_parts(folder)
    cases = list(itertools.product(STAGES, PRECISIONS, TRAINS, VISION))
    finished = {entry["name"] for entry in ledger.entries}
    with Ranks(folder / "logs") as ranks, Progress("resume matrix", len(cases), unit="combination") as progress:
        for number, (zero, precision, trains, vision) in enumerate(cases):
            name = f"{zero} {precision} {trains} vision-{vision}"
            if name not in finished:
                recipe = make_recipe(
                    parts, folder / name.replace(" ", "-"), zero, precision=precision, steps=STEPS, dropout=0.1
                )
                recipe = full(recipe) if trains == "full" else recipe
                recipe = replace(recipe, model=replace(recipe.model, vision=replace(recipe.model.vision, mode=vision)))
                ledger.add({"name": name, "equal": _continues(ranks, recipe)})
            progress.update(number + 1, name)


def _continues(ranks: Ranks, recipe: Recipe) -> bool:
    """Whether a run that stops half-way and resumes in new processes equals an uninterrupted one."""
    straight, resumed = Path(recipe.train.output), Path(f"{recipe.train.output}-resumed")
    half = write(replace(recipe, train=replace(recipe.train, output=str(resumed))))
    ranks.run([write(recipe), f"{half}@{HALF}"], limit=600)
    ranks.run([half], limit=600)
    return hexed(straight) == hexed(resumed) and weights(straight, STEPS) == weights(resumed, STEPS)


def work(options: argparse.Namespace, folder: Path) -> Counter[str]:
    """Combinations that resume exactly, and the others by name."""
    ledger = Ledger(options.ledger)
    run(folder, ledger=ledger)
    return Counter("equal" if entry["equal"] else f"NOT EQUAL {entry['name']}" for entry in ledger.entries)


if __name__ == "__main__":
    sys.exit(soak(__doc__, work, good={"equal"}, ledger="combinations"))
