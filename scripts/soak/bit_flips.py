"""Flip one bit in a file of a real checkpoint, many times: verification must detect every flip and name the file.

python scripts/soak/bit_flips.py --flips 1000
"""

from __future__ import annotations

import argparse
import random
import sys
from collections import Counter
from pathlib import Path

from parts import make_parts, make_recipe, soak

from mm_moslora.training.checkpointing.checkpoint_folder import read_manifest
from mm_moslora.utils.errors import CheckpointError


def flip(folder: Path, rng: random.Random) -> str:
    """Flip one bit of one file, verify, and restore it; returns `found`, `missed NAME` or `unnamed NAME`."""
    path = rng.choice(sorted(item for item in folder.rglob("*") if item.is_file() and item.stat().st_size))
    name = path.relative_to(folder).as_posix()
    offset, bit = rng.randrange(path.stat().st_size), 1 << rng.randrange(8)
    _flip(path, offset, bit)
    try:
        read_manifest(folder)
    except CheckpointError as error:
        return "found" if path.name in str(error) else f"unnamed {name}"
    finally:
        _flip(path, offset, bit)
    return f"missed {name}"


def _flip(path: Path, offset: int, bit: int) -> None:
    with path.open("r+b") as stream:
        stream.seek(offset)
        old = stream.read(1)[0]
        stream.seek(offset)
        stream.write(bytes([old ^ bit]))


def run(flips: int, folder: Path) -> Counter[str]:
    """Outcomes of a number of flips in a checkpoint."""
    rng = random.Random(0)
    outcomes = Counter(flip(folder, rng) for _ in range(flips))
    read_manifest(folder)  # all flips were reverted
    return outcomes


def work(options: argparse.Namespace, folder: Path) -> Counter[str]:
    """Flips in a checkpoint of a run."""
    from mm_moslora.training.training_loop import train

    return run(options.flips, train(make_recipe(make_parts(folder), folder / "run", "none", steps=2)).checkpoint)


if __name__ == "__main__":
    sys.exit(soak(__doc__, work, good={"found"}, flips=(1000, "bits to flip")))
