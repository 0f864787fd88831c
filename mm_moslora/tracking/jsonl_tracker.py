"""`metrics.jsonl`: one object per record, appended and flushed, so that it needs no service and survives a crash.

A resumed run first removes the records after the step that it resumes from, so that the curve has neither gaps nor
duplicates.
"""

from __future__ import annotations

import itertools
import json
import logging
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mm_moslora.tracking.tracker import Ending, SampleAnswer, Tracker
from mm_moslora.utils.files import Appender, rename, replace_json, replace_text, sync
from mm_moslora.utils.untrusted_data import parse_object
from mm_moslora.utils.untrusted_files import read_text_below

logger = logging.getLogger(__name__)

METRICS = "metrics.jsonl"
SAMPLES = "tracked_samples.jsonl"
ALERTS = "alerts.jsonl"
EVALUATIONS = "evaluations.jsonl"
ENVIRONMENT = "environment.json"


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a `metrics.jsonl`, in order; an incomplete line is skipped."""
    lines = (read_text_below(path.parent, path.name, errors="replace") or "").splitlines()
    return [record for line in lines if (record := _parse(line)) is not None]


class JsonlTracker(Tracker):
    """Writes `metrics.jsonl` (numbers; null where one is not finite) and `tracked_samples.jsonl`."""

    name = "jsonl"

    def __init__(self) -> None:
        self._files: dict[str, Appender] = {}

    def start(self, config: Mapping[str, Any], run_folder: Path, *, resume_step: int | None) -> None:
        """See `Tracker.start`. A fresh run moves an old file aside to `metrics.previous.jsonl` (`.previous1`, ...)."""
        self._open(run_folder)
        for file_name in (METRICS, SAMPLES):
            path = run_folder / file_name
            if resume_step is not None:
                _cut_after(path, resume_step)
            elif path.is_file() and path.stat().st_size:
                aside = _previous(path)
                rename(path, aside)
                logger.info("A fresh run: the earlier %s is now %s.", file_name, aside.name)
        if "environment" in config:
            replace_json(run_folder / ENVIRONMENT, config["environment"])

    def reopen(self, config: Mapping[str, Any], run_folder: Path) -> None:
        """See `Tracker.reopen`."""
        self._open(run_folder)

    def _open(self, run_folder: Path) -> None:
        names = (METRICS, SAMPLES, EVALUATIONS, ALERTS)
        self._files = {name: Appender(run_folder / name) for name in names}

    def _write(self, name: str, record: Mapping[str, Any]) -> None:
        self._files[name].add(json.dumps(record, ensure_ascii=False, allow_nan=False))

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """See `Tracker.log`."""
        numbers = {name: _number(value) for name, value in metrics.items()}
        self._write(METRICS, {"step": step, "time": round(time.time(), 3), **numbers})

    def log_samples(self, title: str, samples: Sequence[SampleAnswer], step: int) -> None:
        """See `Tracker.log_samples`."""
        for sample in samples:
            image = None if sample.image is None else str(sample.image)
            self._write(SAMPLES, {"step": step, "title": title, "image": image, **sample.texts})

    def log_evaluation(self, rows: Sequence[Mapping[str, Any]], *, adapter: str | None, step: int) -> None:
        """See `Tracker.log_evaluation`; one line of `evaluations.jsonl`."""
        self._write(EVALUATIONS, {"step": step, "time": round(time.time(), 3), "adapter": adapter, "rows": list(rows)})

    def alert(self, title: str, text: str) -> None:
        """See `Tracker.alert`; one line of `alerts.jsonl`."""
        self._write(ALERTS, {"time": round(time.time(), 3), "title": title, "text": text})

    def finish(self, *, ending: Ending = "finished") -> None:
        """See `Tracker.finish`."""
        for file in self._files.values():
            file.flush()
            if file.path.is_file():
                sync(file.path)


def _previous(path: Path) -> Path:
    """An unused name for the file of an earlier run."""
    names = (f"{path.stem}.previous{number or ''}{path.suffix}" for number in itertools.count())
    return next(free for name in names if not (free := path.with_name(name)).exists())


def _number(value: float) -> float | None:
    number = float(value)
    if not math.isfinite(number):
        return None
    return int(number) if isinstance(value, int) else number


def _parse(line: str) -> dict[str, Any] | None:
    try:
        record = parse_object(line, constants=True)
    except ValueError:
        return None
    return record if isinstance(record.get("step"), int) else None


def _cut_after(path: Path, step: int) -> None:
    """Keep the complete lines up to `step`; the file is replaced atomically."""
    lines = (read_text_below(path.parent, path.name, errors="replace") or "").splitlines()
    remaining = [line for line in lines if (record := _parse(line)) is not None and record["step"] <= step]
    if len(remaining) == len(lines):
        return
    replace_text(path, "".join(line + "\n" for line in remaining))
    logger.info(
        "%s: %d records after step %d are cut off and will be written again.",
        path.name,
        len(lines) - len(remaining),
        step,
    )
