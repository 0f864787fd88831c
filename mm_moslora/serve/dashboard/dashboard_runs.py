"""The runs of a folder for the dashboard. Runs are found by their files and read again only when these change."""

from __future__ import annotations

import os
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mm_moslora.reporting.drawing_grid import drawn_samples
from mm_moslora.reporting.lens_maps import heat_maps
from mm_moslora.reporting.overlay_page import flat_recipe, is_number
from mm_moslora.reporting.run_data import MARKS, RunData, is_run, load_run
from mm_moslora.reporting.run_rows import EvaluationRow
from mm_moslora.reporting.run_status import read_state, stage_folders
from mm_moslora.reporting.summary_text import progress, sample_kind, tasks, top_of
from mm_moslora.reporting.svg_charts import downsample
from mm_moslora.reporting.verdicts import score_text
from mm_moslora.utils.errors import ConfigError
from mm_moslora.utils.redaction import redact_text
from mm_moslora.utils.untrusted_data import encodable, without_constants

DEEPEST = 4
"""Depth of the search for runs below the folder."""
MOST_RUNS = 500
"""Runs that are listed. The search goes level by level, so the deepest ones are left out."""
POINTS = 400
"""Points per curve; longer curves are averaged in buckets."""
MOST_SAMPLES = 200
_REST, _AT_ONCE = 3.0, 0.3
"""A page asks every second, and reading grown runs again takes at most a quarter of the time: after a reading there is
a pause of `_REST` times its duration, which ends `_AT_ONCE` seconds early."""
_IGNORED = ("checkpoint-", "tensorboard", "wandb", "heartbeat", "stacks", ".")


@dataclass(frozen=True, kw_only=True)
class Shown:
    """One run and its contents."""

    stamp: tuple[tuple[str, int, int], ...]
    """Names, times and sizes of the files that were read."""
    read: float
    """When, on `time.monotonic`."""
    row: dict[str, Any]
    """Data for the table of runs."""
    detail: dict[str, Any]
    """Data for curves, scores and samples."""


@dataclass
class Folder:
    """All runs below a folder, which is scanned again at every request, since runs come and go.

    Raises:
        ConfigError: there is no such folder.
    """

    root: Path
    _read: dict[str, Shown] = field(default_factory=dict)
    _lock: threading.RLock = field(default_factory=threading.RLock)
    """Several browsers may ask at once, each in its own thread."""
    _rest_until: float = 0.0

    def __post_init__(self) -> None:
        if not self.root.is_dir():
            raise ConfigError(f"{self.root} is not a folder; give the folder that your runs are written to.")
        self.root = self.root.resolve()

    def rows(self) -> list[dict[str, Any]]:
        """One row per run, the newest first."""
        runs = self._find()
        with self._lock:
            self._read = {name: shown for name, shown in self._read.items() if name in runs}
            # The one that was read longest ago comes first: it may be the only one that is read now.
            order = sorted(runs, key=lambda name: self._read[name].read if name in self._read else 0.0)
            rows = [_state(runs[name]) | self._shown(name, runs[name]).row for name in order]
        return sorted(rows, key=lambda row: -row["changed"])

    def detail(self, name: str) -> dict[str, Any] | None:
        """Curves, scores, samples, mixers and recipe of a run; None where no run has that name."""
        path = self._find().get(name)
        return None if path is None else self._shown(name, path).detail

    def path(self, name: str) -> Path | None:
        """The folder of a run."""
        return self._find().get(name)

    def _find(self) -> dict[str, Path]:
        runs: dict[str, Path] = {}
        queue = [(self.root, 0)]
        while queue and len(runs) < MOST_RUNS:
            folder, depth = queue.pop(0)
            stages: list[Path] = []
            if is_run(folder):
                runs[_id_of(folder.relative_to(self.root))] = folder
                stages = stage_folders(folder)
            if depth < DEEPEST:
                queue += [(child, depth + 1) for child in _children(folder) if child not in stages]
        return runs

    def _shown(self, name: str, path: Path) -> Shown:
        stamp = _stamp(path)
        with self._lock:
            run = self._read.get(name)
            began = time.monotonic()
            grown = run is not None and run.stamp != stamp and began > self._rest_until - _AT_ONCE
            if run is None or grown:
                run = self._read[name] = _read(name, path, stamp)
            if grown:
                self._rest_until = max(began, self._rest_until) + _REST * (run.read - began)
        return run


def _id_of(path: Path) -> str:
    """The path as text, also where it is not UTF-8."""
    return os.fsencode(path).decode(errors="backslashreplace")


def _children(folder: Path) -> list[Path]:
    try:
        return sorted(
            item for item in folder.iterdir()
            if item.is_dir() and not item.is_symlink() and not item.name.startswith(_IGNORED)
        )  # fmt: skip
    except OSError:
        return []


def _stamp(folder: Path) -> tuple[tuple[str, int, int], ...]:
    files = []
    for source in [folder, *stage_folders(folder)]:
        for name in (*MARKS, "mixers.json", "config.yaml", "alerts.jsonl"):
            try:
                status = (source / name).stat()
            except OSError:
                continue
            files.append((f"{source.name}/{name}", status.st_mtime_ns, status.st_size))
    return tuple(files)


def _read(name: str, path: Path, stamp: tuple[tuple[str, int, int], ...]) -> Shown:
    changed = max((time_ns for _, time_ns, _ in stamp), default=0) / 1e9
    shown_name = _id_of(Path(path.name)) if name == "." else name
    row: dict[str, Any] = {
        "id": name, "name": shown_name, "title": shown_name, "changed": changed, "fault": None, "recipe": {},
        "scores": {}, "shown": {}, "step": None, "total": None, "loss": None,
    }  # fmt: skip
    try:
        data = load_run(path)
        row, detail = row | _row(data, shown_name), _detail(name, data)
    except Exception as error:  # written by a newer release, partly deleted or damaged: the other runs are shown
        reason = str(error) if isinstance(error, ConfigError | OSError) else f"{type(error).__name__}: {error}"
        row |= {"state": "unreadable", "fault": redact_text(reason)}
        detail = {"id": name, "stages": [], "tasks": [], "samples": [], "mixers": [], "lens": [], "notes": []}
    return Shown(stamp=stamp, read=time.monotonic(), row=without_constants(row), detail=without_constants(detail))


def _row(data: RunData, name: str) -> dict[str, Any]:
    recipe = {key: value for stage in data.stages for key, value in flat_recipe(stage.config or "").items()}
    tuned = {task or "score": row for task, rows in tasks(data) for row in rows if row.name == "tuned"}
    return {
        "title": str(data.summary.get("title") or data.summary.get("name") or name),
        "recipe": recipe, **_progress(data),
        "scores": {task: row.score.mean for task, row in tuned.items()},
        "shown": {task: score_text(row.score.mean, row.unit) for task, row in tuned.items()},
    }  # fmt: skip


def _progress(data: RunData) -> dict[str, Any]:
    """The last known step, loss and speed."""
    metrics = data.stages[-1].metrics if data.stages else []
    last: dict[str, Any] = {}
    for record in metrics:
        last |= {key: value for key, value in record.items() if value is not None}
    step, total = progress(data)
    return {
        "stage": data.stages[-1].name if len(data.stages) > 1 else None, "step": step, "total": total,
        "loss": last.get("loss"), "validation_loss": last.get("validation_loss"),
        "tokens_per_second": last.get("tokens_per_second"), "eta_seconds": last.get("eta_seconds"),
    }  # fmt: skip


def _system(row: EvaluationRow) -> dict[str, Any]:
    """The score of one system, as numbers and as text."""
    low, high = (score_text(value, row.unit, named=False) for value in (row.score.low, row.score.high))
    shown = {"shown": score_text(row.score.mean, row.unit), "interval": f"{low} – {high}"}
    return {"name": row.name, "label": row.label, **vars(row.score), **shown}


def _detail(name: str, data: RunData) -> dict[str, Any]:
    samples = (data.samples or drawn_samples(data.folder))[:MOST_SAMPLES]
    return {
        "id": name,
        "stages": [{"name": stage.name, "curves": _curves(stage.metrics)} for stage in data.stages],
        "tasks": [
            {"name": task, "top": top_of(rows), "rows": [_system(row) for row in rows]} for task, rows in tasks(data)
        ],
        "samples": [
            {
                "number": number, "picture": sample.image is not None, "kind": sample_kind(sample),
                "question": sample.question, "answer": sample.answer, "before": sample.before, "after": sample.after,
            }
            for number, sample in enumerate(samples)
        ],
        "mixers": [
            {"path": mixer.path, "before": mixer.before, "after": mixer.after, "pairs": mixer.pairs,
             "figures": mixer.figures}
            for mixer in data.mixers if mixer.after
        ],
        "lens": [vars(item) for item in heat_maps([(mixer.path, mixer.figures) for mixer in data.mixers])],
        "pictures": [sample.image for sample in samples],
        "notes": [*data.alerts, *data.notes],
    }  # fmt: skip


def _curves(metrics: list[dict[str, Any]]) -> dict[str, list[tuple[float, float]]]:
    curves: dict[str, list[tuple[float, float]]] = {}
    for record in metrics:
        step = record.get("step")
        if not is_number(step):
            continue
        for key, value in record.items():
            if key not in ("step", "time") and is_number(value):
                curves.setdefault(key, []).append((float(step), float(value)))
    return {
        key: [(x, float(f"{y:.6g}")) for x, y in (*downsample(points[:-1], POINTS), points[-1])]
        for key, points in curves.items()
    }  # the last value is not averaged: the list of runs shows it, too


def _state(path: Path) -> dict[str, str | None]:
    try:
        state = read_state(path)
    except Exception as error:  # the other runs are shown
        return {"state": "unreadable", "reason": encodable(f"{type(error).__name__}: {redact_text(str(error))}")}
    return {"state": state.name, "reason": state.reason or None}
