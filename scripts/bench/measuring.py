"""Shared parts of the benchmarks: interleaved timing of contenders, and rows that survive an interruption."""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from torch.profiler import ProfilerActivity, profile

from mm_moslora.utils.hardware import hardware

PRODUCTS = ("aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm", "aten::baddbmm", "aten::baddbmm_")


def interleaved(
    steps: Mapping[str, Callable[[], Any]],
    rounds: int,
    *,
    after_round: Callable[[], None] = lambda: None,
    results: dict[str, list[Any]] | None = None,
) -> dict[str, list[float]]:
    """CPU seconds of every contender in every round, in rotating order, after one warm-up round.

    Args:
        steps: the function of each contender.
        rounds: number of measured rounds.
        after_round: called after every round, the warm-up included.
        results: gets the return values of the contenders.
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
        after_round()
    return times


def ratios(times: Mapping[str, list[float]], name: str, against: str) -> list[float]:
    """One contender's time over another's, round by round."""
    return [one / other for one, other in zip(times[name], times[against], strict=True)]


def ratio(times: Mapping[str, list[float]], name: str, against: str) -> float:
    """Median of the ratios of single rounds."""
    return statistics.median(ratios(times, name, against))


def kernel_seconds(step: Callable[[], Any], wanted: Callable[[str, list[list[int]]], bool]) -> tuple[float, float]:
    """CPU seconds of one step's operators: the wanted ones, and all.

    Args:
        step: a step that has run before.
        wanted: selects an operator by its name and the shapes of its arguments (empty for other values than tensors).
    """
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiled:
        step()
    events = profiled.key_averages(group_by_input_shape=True)
    chosen = sum(event.self_cpu_time_total for event in events if wanted(event.key, event.input_shapes))
    return chosen / 1e6, sum(event.self_cpu_time_total for event in events) / 1e6


def head(benchmark: str, *packages: str) -> dict[str, Any]:
    """Header of a result: benchmark, hardware, date, versions."""
    return {
        "benchmark": benchmark, "hardware": f"{hardware()}; one thread", "date": datetime.now(UTC).date().isoformat(),
        "versions": {
            name: metadata.version(name).partition("+")[0] for name in ("torch", *packages, "mm_moslora")
        } | {"python": platform.python_version()},
    }  # fmt: skip


def settings_of(opening: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    """Settings that comparable rows share: the header without its date, and further ones."""
    return {name: value for name, value in opening.items() if name != "date"} | more


class Rows:
    """Finished rows as JSON lines after a line with the settings; a stopped run continues after them.

    Args:
        path: the file; None stores nothing.
        settings: settings of this run; rows of other settings are refused.

    Raises:
        SystemExit: the file holds rows of other settings.
    """

    def __init__(self, path: Path | None, settings: Mapping[str, Any]) -> None:
        self.path = path
        lines = path.read_text().splitlines(keepends=True) if path is not None and path.exists() else []
        stored = [json.loads(line) for line in lines if line.endswith("\n")]  # a line without its end is incomplete
        if lines and not stored:
            raise SystemExit(f"{path} holds no rows of this script. Name another file.")
        if stored and stored[0] != settings:
            raise SystemExit(f"{path} holds rows of {stored[0]}, and this run is {dict(settings)}. Name another file.")
        self.rows: list[dict[str, Any]] = stored[1:]
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(json.dumps(line) + "\n" for line in [settings, *self.rows]))

    def find(self, **names: Any) -> dict[str, Any] | None:
        """The row with these entries; None where it is missing."""
        return next((row for row in self.rows if names.items() <= row.items()), None)

    def add(self, row: dict[str, Any]) -> dict[str, Any]:
        """Add a row and write it to disk at once."""
        self.rows.append(row)
        if self.path is not None:
            with self.path.open("a") as stream:
                stream.write(json.dumps(row) + "\n")
        return row
