"""Stop and resume in new processes, over ZeRO stages, precisions, and what trains; the losses must be equal in hex.

python scripts/soak/resume_matrix.py
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from parts import Ranks, full, hexed, make_parts, tiny_recipe, weights, write

STEPS, HALF = 6, 3
STAGES = ("zero0", "zero1", "zero2", "zero3")
TRAINS = ("moslora", "full")
PRECISIONS = ("fp32", "bf16")
VISION = ("frozen", "full")
"""With a frozen vision tower its weights are not in the checkpoint; trained whole, they are."""


def run(place: Path, *, stages: tuple[str, ...] = STAGES, precisions: tuple[str, ...] = PRECISIONS) -> dict[str, bool]:
    """Whether each combination continues exactly."""
    parts = make_parts(place)
    cases = list(itertools.product(stages, precisions, TRAINS, VISION))
    recipes = {}
    for zero, precision, trains, vision in cases:
        name = f"{zero} {precision} {trains} vision-{vision}"
        recipe = tiny_recipe(
            parts, place / name.replace(" ", "-"), zero=zero, precision=precision, steps=STEPS, dropout=0.1
        )
        recipe = full(recipe) if trains == "full" else recipe
        recipes[name] = replace(recipe, model=replace(recipe.model, vision=replace(recipe.model.vision, mode=vision)))
    halves = {
        name: replace(recipe, train=replace(recipe.train, output=f"{recipe.train.output}-resumed"))
        for name, recipe in recipes.items()
    }
    with Ranks(place / "logs") as ranks:
        ranks.run([write(recipe) for recipe in recipes.values()], limit=3600)
        paths = [write(recipe) for recipe in halves.values()]
        ranks.run([f"{path}@{HALF}" for path in paths], limit=3600)
        ranks.run(paths, limit=3600)
    return {name: _equal(Path(recipes[name].train.output), Path(halves[name].train.output)) for name in recipes}


def _equal(straight: Path, resumed: Path) -> bool:
    return hexed(straight) == hexed(resumed) and weights(straight, STEPS) == weights(resumed, STEPS)


def main() -> int:
    """Run and print the matrix."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", default=",".join(STAGES))
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        equal = run(Path(place), stages=tuple(options.stages.split(",")))
    bad = sum(not value for value in equal.values())
    if options.json:
        print(json.dumps({"soak": "resume_matrix", "combinations": len(equal), "unequal": bad, "equal": equal}))
    else:
        print("\n".join(f"{'equal' if value else 'NOT EQUAL':<10}{name}" for name, value in equal.items()))
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
