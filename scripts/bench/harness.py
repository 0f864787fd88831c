"""The harness of the benchmarks: contenders in turn, rounds, ratios, rows that survive an interruption, output.

A benchmark says what is built and what is timed. Each of its cases becomes one row.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import logging
import os
import platform
import signal
import statistics
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from itertools import groupby
from pathlib import Path
from typing import Any, TextIO

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))  # a GPU machine has the checkout alone
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from mm_moslora.utils.hardware import hardware, keep_freed_memory  # noqa: E402  (needs the path)

PRODUCTS = ("aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm", "aten::baddbmm", "aten::baddbmm_")

Row = dict[str, Any]


def interleaved(
    steps: Mapping[str, Callable[[], Any]],
    rounds: int,
    *,
    results: dict[str, list[Any]] | None = None,
) -> dict[str, list[float]]:
    """CPU seconds of every contender in every round, in rotating order, after one warm-up round.

    `results` gets what the contenders return.
    """
    times: dict[str, list[float]] = {name: [] for name in steps}
    names = list(steps)
    for turn in range(-1, rounds):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            start = time.process_time()
            result = steps[name]()
            seconds = time.process_time() - start
            if turn >= 0:
                times[name].append(seconds)
                if results is not None:
                    results.setdefault(name, []).append(result)
    return times


def ratios(times: Mapping[str, list[float]], name: str, against: str) -> list[float]:
    """One contender's time over another's, round by round."""
    return [one / other for one, other in zip(times[name], times[against], strict=True)]


def ratio(times: Mapping[str, list[float]], name: str, against: str) -> float:
    """Median of the ratios of single rounds."""
    return statistics.median(ratios(times, name, against))


def kernel_seconds(step: Callable[[], Any], wanted: Callable[[str, list[list[int]]], bool]) -> tuple[float, float]:
    """CPU seconds of one step's operators: those wanted by name and shapes of their arguments, and all."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiled:
        step()
    events = profiled.key_averages(group_by_input_shape=True)
    chosen = sum(event.self_cpu_time_total for event in events if wanted(event.key, event.input_shapes))
    return chosen / 1e6, sum(event.self_cpu_time_total for event in events) / 1e6


def peak_mib(call: Callable[[], Any]) -> float | None:
    """Largest resident size of the process during a call, beyond that before it; None where Linux does not say."""

    def size(name: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(name))

    gc.collect()
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # forgets the largest size so far
        before = size("VmRSS")
    except OSError:
        return None
    call()
    return (size("VmHWM") - before) / 1024


def version_of(package: str) -> str | None:
    """The installed version; None: not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def read_rows(path: Path, *names: str) -> list[Row]:
    """Rows of a file of JSON lines, which all have entries of these names; a line without its end is left out."""
    lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
    try:
        rows = [json.loads(line) for line in lines if line.endswith("\n")]
    except ValueError as error:
        raise SystemExit(f"{path} holds no rows of this script ({error}). Name another file.") from error
    if any(not isinstance(row, dict) or not {*names} <= row.keys() for row in rows):
        raise SystemExit(f"{path} holds no rows of this script. Name another file.")
    return rows


class Rows:
    """Finished rows, kept in a file as they come, if any; a stopped run continues after them."""

    def __init__(self, path: Path | None, *names: str) -> None:
        self.path = path
        self.rows = read_rows(path, *names) if path is not None else []
        if path is not None and path.is_file():  # without a line that was not finished
            path.write_text("".join(json.dumps(row) + "\n" for row in self.rows))

    def find(self, entries: Row) -> list[Row]:
        """The rows with these entries, the oldest first."""
        return [row for row in self.rows if entries.items() <= row.items()]

    def add(self, row: Row) -> Row:
        """Add a row and write it to disk at once."""
        self.rows.append(row)
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a") as stream:
                stream.write(json.dumps(row) + "\n")
        return row


def results_alone() -> TextIO:
    """Standard output for the results; what anybody else writes there from now on goes to standard error."""
    sys.stdout.flush()
    results = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return results


def end_with_parent() -> None:
    """End this process when its parent has ended, except under nohup; it would disturb other measurements."""
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
        return
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def markdown(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A table."""
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *lines))


@dataclass(frozen=True, kw_only=True)
class Case:
    """One row of a benchmark on a CPU."""

    names: Row
    """Entries that the row is found by."""
    measure: Callable[[], Row]
    """Gives the other entries."""


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """A benchmark on one CPU thread: what it builds and times, and what is said of it."""

    name: str
    about: str | None
    """Docstring of the script, which is its help."""
    cases: Callable[[argparse.Namespace], Iterable[Case]]
    lines: Callable[[Row], Iterable[Mapping[str, str]]]
    """Lines of the table for a row, by column."""
    summarise: Callable[[list[Row]], dict[str, float]] = lambda rows: {}
    """Figures under stable keys."""
    targets: Mapping[str, str] = field(default_factory=dict)
    """Of figures of the summary."""
    packages: tuple[str, ...] = ()
    """Whose versions count, beside torch's."""
    facts: Row = field(default_factory=dict)
    """Further entries of the result."""
    add_options: Callable[[argparse.ArgumentParser], object] = lambda parser: None
    quick: str = ""
    """What --quick leaves out, which also takes 3 rounds; empty: there is no such option."""
    rounds: int | None = 5
    """Rounds of a case; None: there are none."""
    keeps_memory: bool = False
    """Whether glibc keeps freed memory from step to step, as in training on a CPU."""
    passed: Callable[[dict[str, float]], bool] = lambda summary: True

    def main(self, arguments: Sequence[str] | None = None) -> int:
        """Measure what is missing, and print the table or one JSON object; exit code 1 where it has not passed."""
        options = self._read(arguments)
        output = results_alone() if options.json else sys.stdout
        self._prepare()
        versions = {name: version_of(name) for name in ("torch", *self.packages, "mm_moslora")}
        opening = {
            "benchmark": self.name, "hardware": f"{hardware()}; one thread", **self.facts,
            "versions": {name: version.partition("+")[0] for name, version in versions.items() if version}
            | {"python": platform.python_version()},
            **{name: value for name, value in vars(options).items() if name not in ("json", "rows", "quick")},
        }  # fmt: skip
        rows = self.measure(list(self.cases(options)), Rows(options.rows, "settings"), opening)
        summary = self.summarise(rows)
        if options.json:
            result = opening | {"date": datetime.now(UTC).date().isoformat(), "rows": rows, "summary": summary}
            print(json.dumps(result), file=output, flush=True)
        else:
            self.show(rows, summary)
        return 0 if self.passed(summary) else 1

    def _read(self, arguments: Sequence[str] | None) -> argparse.Namespace:
        parser = argparse.ArgumentParser(description=self.about, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
        parser.add_argument("--rows", type=Path, help="JSON Lines of finished rows; only missing ones are measured")
        parser.set_defaults(quick=False)
        if self.quick:
            parser.add_argument("--quick", action="store_true", help=f"{self.quick}, 3 rounds")
        if self.rounds is not None:
            parser.add_argument("--rounds", type=int, help=f"rounds of a case (default {self.rounds})")
        self.add_options(parser)
        options = parser.parse_args(arguments)
        if self.rounds is not None and options.rounds is None:
            options.rounds = 3 if options.quick else self.rounds
        return options

    def _prepare(self) -> None:
        logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(message)s")
        warnings.simplefilter("ignore", FutureWarning)
        end_with_parent()
        # Before libraries are imported by the cases. DeepSpeed would print its choice of an accelerator.
        for name, value in (("TOKENIZERS_PARALLELISM", "false"), ("DS_ACCELERATOR", "cpu")):
            os.environ.setdefault(name, value)
        import torch
        import transformers

        torch.set_num_threads(1)
        transformers.logging.set_verbosity_error()
        if self.keeps_memory:
            keep_freed_memory()

    def measure(self, cases: Sequence[Case], stored: Rows, settings: Row) -> list[Row]:
        """The rows of all cases, of which those that are not stored under these settings are measured."""
        from mm_moslora.utils.progress_bar import Progress  # imports torch, which the GPU benchmark's driver does not

        rows: list[Row] = []
        with Progress(self.name, len(cases), unit="row") as progress:
            for case in cases:
                key = {"settings": settings, **case.names}
                found = stored.find(key)
                rows.append(found[-1] if found else stored.add(key | case.measure()))
                progress.update(len(rows), ", ".join(map(str, case.names.values())))
        return [{name: value for name, value in row.items() if name != "settings"} for row in rows]

    def show(self, rows: Sequence[Row], summary: Mapping[str, float]) -> None:
        """Print the lines of all rows, in one table for each set of columns, and the summary beside its targets."""
        for columns, lines in groupby((line for row in rows for line in self.lines(row)), key=tuple):
            print(markdown(columns, [tuple(line.values()) for line in lines]), end="\n\n")
        figures = [(name, f"{value:.4g}", self.targets.get(name, "")) for name, value in summary.items()]
        if figures:
            print(markdown(("", "measured", "target"), figures))
