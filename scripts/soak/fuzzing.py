"""Shared parts of the fuzzing scripts: a tally of outcomes, progress, and the exit code."""

from __future__ import annotations

import argparse
import resource
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

SLOW = 1.0
"""Processor time limit of one input, seconds."""
MEMORY = 1024
"""Memory limit of a process, MiB."""


class _NamedError(Protocol):
    what: str
    remedy: str


class Tally:
    """Outcomes of some inputs."""

    def __init__(self) -> None:
        self.outcomes: Counter[str] = Counter()
        """Number of inputs by outcome."""
        self.uncaught: list[str] = []
        """Exceptions other than rejections."""
        self.named, self.slow, self.slowest, self.peak, self.cpu = 0, 0, 0.0, 0, 0.0

    @contextmanager
    def one(self, describe: Callable[[], str]) -> Iterator[None]:
        """Time one input and record its exception.

        Args:
            describe: the input, for the report of an exception.
        """
        began = time.thread_time()
        try:
            yield
        except Exception as error:  # the faults that these scripts search for
            self.uncaught.append(f"{type(error).__name__}: {str(error)[:100]} {describe()}")
        took = time.thread_time() - began
        self.slowest, self.slow = max(self.slowest, took), self.slow + (took > SLOW)

    def rejected(self, code: str, error: _NamedError) -> None:
        """Count a rejection, and whether its message names the fault and the remedy."""
        self.outcomes[code] += 1
        self.named += bool(error.what and error.remedy)

    def measured(self) -> Tally:
        """Record this process's memory and processor time, and return the tally."""
        self.peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        self.cpu = time.process_time()
        return self

    def add(self, other: Tally) -> None:
        """Add the outcomes of another process."""
        self.outcomes += other.outcomes
        self.uncaught += other.uncaught
        self.named, self.slow, self.cpu = self.named + other.named, self.slow + other.slow, self.cpu + other.cpu
        self.slowest, self.peak = max(self.slowest, other.slowest), max(self.peak, other.peak)

    def report(self, **more: Any) -> dict[str, Any]:
        """As plain data, `more` first."""
        return more | {
            "uncaught": len(self.uncaught), "first_uncaught": self.uncaught[:5], "over_one_second": self.slow,
            "slowest_seconds": round(self.slowest, 4), "peak_mib": self.peak, "cpu_seconds": round(self.cpu, 1),
            "outcomes": dict(self.outcomes.most_common()), "rejections_named": self.named,
        }  # fmt: skip


class Progress:
    """A progress line on stderr every few seconds: finished inputs, memory, remaining time.

    Args:
        total: number of inputs.
    """

    def __init__(self, total: int, *, every: float = 5.0) -> None:
        self.total, self.every, self.began = total, every, time.monotonic()
        self.last = self.began

    def __call__(self, done: int, tally: Tally) -> None:
        """Print the line if the interval has passed."""
        now = time.monotonic()
        if now - self.last < self.every and done < self.total:
            return
        self.last = now
        left = (now - self.began) / max(1, done) * (self.total - done)
        sys.stderr.write(
            f"{done:,} of {self.total:,}, {len(tally.uncaught)} uncaught, slowest {tally.slowest:.3f} s, "
            f"{tally.peak} MiB, about {left / 60:.1f} min left\n"
        )
        sys.stderr.flush()


def main(description: str | None, run: Callable[..., dict[str, Any]], *, count: int) -> int:
    """Run, print the outcomes, and exit with 0 only without faults.

    Args:
        description: the script's.
        run: called with a count, `seed` and `progress`.
        count: default number of inputs.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=count)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    result = run(options.count, seed=options.seed, progress=Progress(options.count))
    for name, value in result.items():
        print(f"{name:>18}: {value}")
    bad = result["uncaught"] or result["over_one_second"] or result.get("crashes") or result["peak_mib"] >= MEMORY
    return int(bool(bad))


if __name__ == "__main__":
    print(f"{__doc__}\nA part of the scripts beside it; there is nothing to run.")
