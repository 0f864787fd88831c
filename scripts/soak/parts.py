"""Tiny models, records and recipes for the soak tests; the same as in `tests/`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

_TESTS = Path(__file__).resolve().parents[2] / "tests"
sys.path[:0] = [str(_TESTS), str(_TESTS / "distributed")]

from ranks import Ranks  # noqa: E402
from tiny import make_language, make_records, make_vision  # noqa: E402
from trials import full, hexed, make_recipe, metrics, weights, write  # noqa: E402

__all__ = ["Ranks", "full", "hexed", "make_parts", "metrics", "tiny_recipe", "weights", "write"]


def make_parts(folder: Path, *, records: int = 40) -> dict[str, Path]:
    """A tiny language model, a tiny vision tower and records."""
    return {
        "language": make_language(folder / "language"),
        "vision": make_vision(folder / "vision"),
        "records": make_records(folder / "records", records),
    }


def tiny_recipe(parts: dict[str, Path], output: Path, *, zero: str, **changes: Any):
    """A recipe of a few steps; `changes` are keys of `train`, or `dropout`."""
    return make_recipe(parts, output, zero, **changes)
