"""The peak memory of a rank while a run is prepared: weights read, adapters attached, engine made."""

from __future__ import annotations

import json
from pathlib import Path

from mm_moslora.config import load_recipe
from mm_moslora.training.run_setup import prepare
from mm_moslora.training.supervision.run_folder import exclusive
from mm_moslora.utils import distributed


def _mib(key: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{key}:"))


def prepare_measured(*arguments: str) -> int:
    """Prepare each recipe, and leave in its folder how many MiB every rank had at most beyond what it had before."""
    distributed.join()
    for argument in arguments:
        recipe = load_recipe(argument)
        with exclusive(Path(recipe.train.output)):
            Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
            before = _mib("VmRSS")
            run = prepare(recipe)
            grown = _mib("VmHWM") - before
            run.engine.close()
            peaks = [row[0] for row in distributed.table_over_ranks([grown])]
        if distributed.is_main():
            (Path(recipe.train.output) / "peaks.json").write_text(json.dumps(peaks))
        del run
    return 0
