"""Shared parts of the soak scripts that train: the tests' tiny runs, and results that survive an interruption."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import tempfile
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

# Otherwise DeepSpeed prints the accelerator that it found to stdout, which is for the results.
os.environ.setdefault("DS_ACCELERATOR", "cpu")
_TESTS = Path(__file__).resolve().parents[2] / "tests"
sys.path[:0] = [str(_TESTS / part) for part in ("", "support", "builders", "distributed")]

from ranks import Ranks  # noqa: E402
from trials import full, hexed, make_parts, make_recipe, metrics, weights, write  # noqa: E402

__all__ = ["Ledger", "Ranks", "full", "hexed", "make_parts", "make_recipe", "metrics", "soak", "weights", "write"]


class Ledger:
    """Results as JSON lines in a file, if any, one per finished task; a restarted script skips those."""

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


def soak(
    about: str | None,
    work: Callable[[argparse.Namespace, Path], Mapping[str, int]],
    *,
    good: Collection[str],
    ledger: str = "",
    **numbers: tuple[int, str],
) -> int:
    """Run the work in a scratch folder and print how often each outcome came; exit code 1 where one is not good.

    `numbers` are options with their defaults; a `ledger` is one of what it names.
    """
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, (default, words) in numbers.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default, help=words)
    if ledger:
        parser.add_argument("--ledger", type=Path, help=f"JSON lines of finished {ledger}; a restart skips them")
    options = parser.parse_args()
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(message)s")
    with tempfile.TemporaryDirectory() as scratch:
        outcomes = work(options, Path(scratch))
    for outcome, count in outcomes.items():
        print(f"{count:8}  {outcome}")
    bad = sum(count for outcome, count in outcomes.items() if outcome not in good)
    print(f"{sum(outcomes.values())} in all, {bad} bad")
    return 1 if bad else 0


if __name__ == "__main__":
    print(f"{__doc__}\nA part of the scripts beside it; there is nothing to run.")
