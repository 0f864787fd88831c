"""Shared parts of the soak scripts that train: the tests' tiny runs, and results that survive an interruption."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

# Otherwise DeepSpeed prints the accelerator that it found to stdout, which is for the results.
os.environ.setdefault("DS_ACCELERATOR", "cpu")
_TESTS = Path(__file__).resolve().parents[2] / "tests"
sys.path[:0] = [str(_TESTS / part) for part in ("", "support", "builders", "distributed")]

from ranks import Ranks  # noqa: E402
from trials import full, hexed, make_parts, make_recipe, metrics, weights, write  # noqa: E402

__all__ = ["Ledger", "Ranks", "full", "hexed", "make_parts", "make_recipe", "metrics", "weights", "write"]


class Ledger:
    """Results as JSON lines, one per finished task; a restarted script skips those.

    Args:
        path: the file; None: in memory only.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        lines = path.read_text(encoding="utf-8").splitlines() if path is not None and path.is_file() else []
        self.entries: list[dict[str, Any]] = [json.loads(line) for line in lines if line.endswith("}")]

    def add(self, entry: dict[str, Any]) -> None:
        """Add a result and write it to disk at once."""
        self.entries.append(entry)
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(entry) + "\n")


if __name__ == "__main__":
    print(f"{__doc__}\nA part of the scripts beside it; there is nothing to run.")
