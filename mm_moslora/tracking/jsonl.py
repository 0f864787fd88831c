"""`metrics.jsonl`: one object per record, appended and flushed, so that no service and no clean exit is needed.

A resumed run first cuts off what was logged after the step it resumes from: the curve goes on exactly, without a gap
and without a point written twice.
"""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from mm_moslora.tracking.base import Sample

logger = logging.getLogger(__name__)

METRICS = "metrics.jsonl"
SAMPLES = "tracked_samples.jsonl"
ALERTS = "alerts.jsonl"
EVALUATIONS = "evaluations.jsonl"
ENVIRONMENT = "environment.json"


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a `metrics.jsonl`, in order; a torn line is passed over.

    Args:
        path: may be missing, which gives no records.
    """
    if not path.is_file():
        return []
    records = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        record = _parse(line)
        if record is not None:
            records.append(record)
    return records


class JsonlTracker:
    """Writes `metrics.jsonl` (numbers; null where one is not finite) and `tracked_samples.jsonl`."""

    name = "jsonl"

    def __init__(self) -> None:
        self._folder = Path()
        self._metrics: IO[str] | None = None

    def start(self, config: Mapping[str, Any], run_folder: Path, *, resume_step: int | None) -> None:
        """See `Tracker.start`. A fresh run moves an old file aside to `metrics.previous.jsonl`."""
        self._folder = run_folder
        for file_name in (METRICS, SAMPLES):
            path = run_folder / file_name
            if resume_step is not None:
                _cut_after(path, resume_step)
            elif path.is_file() and path.stat().st_size:
                aside = path.with_name(f"{path.stem}.previous.jsonl")
                os.replace(path, aside)
                logger.info("A fresh run: the earlier %s is now %s.", file_name, aside.name)
        if "environment" in config:
            (run_folder / ENVIRONMENT).write_text(json.dumps(config["environment"], indent=1) + "\n", encoding="utf-8")
        self._metrics = (run_folder / METRICS).open("a", encoding="utf-8")

    def reopen(self, config: Mapping[str, Any], run_folder: Path) -> None:
        """See `Tracker.reopen`."""
        self._folder = run_folder

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """See `Tracker.log`."""
        assert self._metrics is not None, "start() comes first"
        numbers = {name: _number(value) for name, value in metrics.items()}
        _write(self._metrics, {"step": step, "time": round(time.time(), 3), **numbers})

    def log_samples(self, title: str, samples: Sequence[Sample], step: int) -> None:
        """See `Tracker.log_samples`."""
        with (self._folder / SAMPLES).open("a", encoding="utf-8") as stream:
            for sample in samples:
                _write(
                    stream,
                    {
                        "step": step, "title": title, "image": None if sample.image is None else str(sample.image),
                        "question": sample.question, "expected": sample.expected,
                        "prediction": sample.prediction, "correct": sample.correct,
                    },
                )  # fmt: skip

    def log_mixers(self, rows: Sequence[Mapping[str, Any]], step: int) -> None:
        """Nothing: they are in `mixers.json`."""

    def log_evaluation(self, rows: Sequence[Mapping[str, Any]], *, adapter: str | None, step: int) -> None:
        """See `Tracker.log_evaluation`; one line of `evaluations.jsonl`."""
        with (self._folder / EVALUATIONS).open("a", encoding="utf-8") as stream:
            _write(stream, {"step": step, "time": round(time.time(), 3), "adapter": adapter, "rows": list(rows)})

    def alert(self, title: str, text: str) -> None:
        """See `Tracker.alert`; one line of `alerts.jsonl`."""
        with (self._folder / ALERTS).open("a", encoding="utf-8") as stream:
            _write(stream, {"time": round(time.time(), 3), "title": title, "text": text})

    def log_folder(self, title: str, folder: Path, *, aliases: Sequence[str]) -> None:
        """Nothing: the folder is already on this disk."""

    def finish(self, *, ok: bool) -> None:
        """See `Tracker.finish`."""
        if self._metrics is not None:
            os.fsync(self._metrics.fileno())
            self._metrics.close()
            self._metrics = None


def _number(value: float) -> float | None:
    number = float(value)
    if not math.isfinite(number):
        return None
    return int(number) if isinstance(value, int) else number


def _write(stream: IO[str], record: Mapping[str, Any]) -> None:
    stream.write(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n")
    stream.flush()


def _parse(line: str) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and isinstance(record.get("step"), int) else None


def _cut_after(path: Path, step: int) -> None:
    """Keep the whole lines up to `step`; the file is replaced in one move."""
    if not path.is_file():
        return
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    kept = [line for line in lines if (record := _parse(line)) is not None and record["step"] <= step]
    if len(kept) == len(lines):
        return
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as stream:
        stream.writelines(line + "\n" for line in kept)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(temporary, path)
    logger.info(
        "%s: %d records after step %d are cut off and will be written again.", path.name, len(lines) - len(kept), step
    )
