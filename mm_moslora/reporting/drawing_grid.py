"""Validation pictures of a diffusion run for its report, the untuned model's first."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mm_moslora.reporting.inline_images import thumbnail
from mm_moslora.utils.redaction import redact_text
from mm_moslora.utils.untrusted_data import parse_json
from mm_moslora.utils.untrusted_files import read_text_below

DRAWINGS = "drawings.json"
MOST_ROWS, MOST_STEPS = 12, 5


def drawing_grid(folder: Path) -> list[dict[str, Any]]:
    """Rows of `drawings.json`, see `run_data`.

    Returns:
        Per prompt and seed: `prompt`, `seed`, and `pictures` with `label` and `url` (None where the file is missing).
        At most `MOST_ROWS` rows, and `MOST_STEPS` steps spread evenly over the run, the last one among them.
    """
    rows = _read(folder)
    steps = sorted({row["step"] for row in rows})
    if len(steps) > MOST_STEPS:
        spread = (len(steps) - 1) / (MOST_STEPS - 1)
        steps = [steps[round(index * spread)] for index in range(MOST_STEPS)]
    grid: dict[tuple[str, int], dict[str, Any]] = {}
    for row in rows:
        key = (row["prompt"], row["seed"])
        if row["step"] not in steps or (key not in grid and len(grid) >= MOST_ROWS):
            continue
        if key not in grid:
            first = {"label": "untuned", "url": thumbnail(folder, row["untuned"])}
            grid[key] = {"prompt": row["prompt"], "seed": row["seed"], "pictures": [first]}
        grid[key]["pictures"].append({"label": f"step {row['step']}", "url": thumbnail(folder, row["image"])})
    return list(grid.values())


def _read(folder: Path) -> list[dict[str, Any]]:
    try:
        data = parse_json(read_text_below(folder, DRAWINGS) or "[]")
    except ValueError:
        return []
    kinds = {"step": int, "prompt": str, "seed": int, "image": str, "untuned": str}
    return [
        {key: item[key] for key in kinds} | {"prompt": redact_text(item["prompt"])}
        for item in (data if isinstance(data, list) else [])
        if isinstance(item, Mapping) and all(isinstance(item.get(key), kind) for key, kind in kinds.items())
    ]
