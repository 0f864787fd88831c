"""The tracker interface, and the fan-out to several trackers that the training loop calls.

A tracker must never stop a run: the fan-out catches its exceptions, logs them once and continues without it. After a
full disk it retries and drops no tracker.
"""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from PIL.Image import Image

from mm_moslora.tracking.run_environment import environment
from mm_moslora.utils.files import is_full
from mm_moslora.utils.identity import sha256_of
from mm_moslora.utils.redaction import redact, redact_text

logger = logging.getLogger(__name__)

Ending = Literal["finished", "stopped", "failed"]
"""stopped: on request; the same command continues the run."""
PROJECT = "mm_moslora"
"""The default project."""
MOST_FAILURES = 3
"""Consecutive failed calls after which a tracker is dropped."""


@dataclass(frozen=True, kw_only=True)
class SampleAnswer:
    """One question with its picture and the model's answer."""

    question: str
    expected: str
    prediction: str
    correct: bool | None = None
    """None where answers are not scored as right or wrong."""
    image: Path | None = None
    """A picture file; it is re-encoded at a small size before it is sent anywhere."""

    @property
    def texts(self) -> dict[str, str | bool | None]:
        """What a table of samples shows beside the picture."""
        names = ("question", "expected", "prediction", "correct")
        return {name: getattr(self, name) for name in names}

    def small(self) -> Image | None:
        """The picture as RGB, at most 256 pixels long; None where it is missing or unreadable."""
        from mm_moslora.reporting.inline_images import FORMATS, shrunk

        return None if self.image is None else shrunk(self.image, side=256, formats=(*FORMATS, "TIFF"))


class Tracker:
    """A destination of metrics, by optimiser steps from 1; it overrides what it can hold, the rest does nothing."""

    name: str
    """For messages."""

    def start(self, config: Mapping[str, Any], run_folder: Path, *, resume_step: int | None) -> None:
        """Open the run; `resume_step`: the last step with results to keep, None for a fresh run."""

    def reopen(self, config: Mapping[str, Any], run_folder: Path) -> None:
        """Open a finished run to add to it; no record is removed."""
        self.start(config, run_folder, resume_step=0)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Record numbers at a step."""

    def log_samples(self, title: str, samples: Sequence[SampleAnswer], step: int) -> None:
        """Record questions and answers for a step."""

    def log_folder(self, title: str, folder: Path, *, aliases: Sequence[str]) -> None:
        """Record a folder, such as an adapter, by name."""

    def log_evaluation(self, rows: Sequence[Mapping[str, Any]], *, adapter: str | None, step: int) -> None:
        """Record scores with the step and the sha256 of the adapter's weights that they belong to, if there is one."""

    def alert(self, title: str, text: str) -> None:
        """Notify the user."""

    def finish(self, *, ending: Ending = "finished") -> None:
        """Close the run with its final status."""


class Trackers:
    """Forwards all calls to several trackers; `active` False: does nothing, None: on rank 0 alone."""

    def __init__(self, trackers: Sequence[Tracker], *, active: bool | None = None) -> None:
        if active is None:
            from mm_moslora.utils import distributed

            active = distributed.is_main()
        self._trackers: list[Tracker] = list(trackers) if active else []
        self._failures: dict[str, int] = {}
        self._reported: set[tuple[str, str]] = set()

    @property
    def names(self) -> list[str]:
        """The trackers that are still in use."""
        return [tracker.name for tracker in self._trackers]

    def start(self, config: Mapping[str, Any], run_folder: Path, *, resume_step: int | None) -> None:
        """Open the run everywhere; see `Tracker.start`. Secrets in `config` are removed here."""
        clean = redact(dict(config) | ({"environment": environment()} if self._trackers else {}))
        self._each("start", lambda tracker: tracker.start(clean, run_folder, resume_step=resume_step), needed=True)

    def reopen(self, config: Mapping[str, Any], run_folder: Path) -> None:
        """Open a finished run everywhere; see `Tracker.reopen`."""
        clean = redact(dict(config))
        self._each("reopen the run", lambda tracker: tracker.reopen(clean, run_folder), needed=True)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Record numbers everywhere; see `Tracker.log`."""
        self._each("log", lambda tracker: tracker.log(metrics, step))

    def log_evaluation(self, rows: Sequence[Mapping[str, Any]], *, adapter: str | None = None, step: int) -> None:
        """Record scores everywhere; see `Tracker.log_evaluation`."""
        self._each("log an evaluation", lambda tracker: tracker.log_evaluation(rows, adapter=adapter, step=step))

    def alert(self, title: str, text: str) -> None:
        """Send an alert everywhere; see `Tracker.alert`."""
        clean = redact_text(text)
        self._each("raise an alert", lambda tracker: tracker.alert(title, clean))

    def log_samples(self, title: str, samples: Sequence[SampleAnswer], step: int) -> None:
        """Record samples everywhere; see `Tracker.log_samples`. Secrets in the texts are removed here."""
        clean = [_without_secrets(sample) for sample in samples]
        self._each("log samples", lambda tracker: tracker.log_samples(title, clean, step))

    def log_folder(self, title: str, folder: Path, *, aliases: Sequence[str] = ("latest",)) -> None:
        """Record a folder everywhere; see `Tracker.log_folder`."""
        self._each("log a folder", lambda tracker: tracker.log_folder(title, folder, aliases=aliases))

    def finish(self, *, ending: Ending = "finished") -> None:
        """Close the run everywhere; see `Tracker.finish`."""
        self._each("finish", lambda tracker: tracker.finish(ending=ending))

    def _each(self, what: str, call: Callable[[Tracker], None], *, needed: bool = False) -> None:
        """Call all trackers; a failure is logged once per kind of call."""
        for tracker in list(self._trackers):
            try:
                call(tracker)
            except Exception as error:
                self._failed(tracker, what, error, needed=needed)
            else:
                self._failures[tracker.name] = 0

    def _failed(self, tracker: Tracker, what: str, error: Exception, *, needed: bool) -> None:
        """Drop a tracker after a few failures, but never for a full disk, which may be emptied."""
        count = self._failures[tracker.name] = self._failures.get(tracker.name, 0) + 1
        over = not is_full(error) and (needed or count >= MOST_FAILURES)
        if over:
            self._trackers.remove(tracker)
        elif (tracker.name, what) in self._reported:
            return
        self._reported.add((tracker.name, what))
        logger.warning(
            "Tracker %s could not %s (%s: %s); %s.", tracker.name, what, type(error).__name__, redact_text(str(error)),
            "the run continues without it" if over else "it is tried again",
        )  # fmt: skip


def chosen(of_recipe: str | None, variable: str, key: str) -> str | None:
    """The recipe's value, else the tracker's environment variable; a warning names a variable that is overridden."""
    of_environment = os.environ.get(variable)
    if of_recipe and of_environment and of_environment != of_recipe:
        logger.warning("%s is %r in the recipe, so %s=%r is ignored.", key, of_recipe, variable, of_environment)
    return of_recipe or of_environment


def default_name(run_folder: Path) -> str:
    """The folder's name with its parent's: `quickstart/tune`."""
    return "/".join(run_folder.resolve().parts[-2:])


def _without_secrets(sample: SampleAnswer) -> SampleAnswer:
    return dataclasses.replace(
        sample,
        question=redact_text(sample.question),
        expected=redact_text(sample.expected),
        prediction=redact_text(sample.prediction),
    )


def adapter_digest(folder: Path) -> str | None:
    """sha256 of an adapter's weights, which identifies it in evaluations; None without weights."""
    for name in ("moslora.safetensors", "adapter_model.safetensors"):
        if (folder / name).is_file():
            return sha256_of(folder / name)
    return None


def headline(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """`eval/TASK`: the score of the tuned model with its own pictures. `metric` tells tasks of one name apart."""
    tuned = [row for row in rows if row.get("name") == "tuned"]
    return {f"eval/{row.get('metric') or row.get('task') or 'score'}": float(row["mean"]) for row in tuned}


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as dotted names."""
    items: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            items |= flat(value, f"{prefix}{key}.")
        else:
            items[f"{prefix}{key}"] = value if isinstance(value, int | float | str | bool) else str(value)
    return items


def namespaced(name: str) -> str:
    """A metric's name on a dashboard; the part before the slash selects the panel: `loss` becomes `train/loss`."""
    if name.startswith("validation_"):
        return f"validation/{name.removeprefix('validation_')}"
    if name.startswith("mixer/"):
        return f"adapter/{name}"
    if name.startswith(("memory_", "allocator_")):
        return f"system/{name}"
    if name.split("/")[0] in {"train", "validation", "eval", "system", "adapter"}:
        return name
    return f"train/{name}"
