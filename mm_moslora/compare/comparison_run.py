"""A comparison from start to end: plan, tune the rates, run the seeds, analyse. The same call again continues it."""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean

from mm_moslora.compare import comparison_cell
from mm_moslora.compare.comparison_cell import CellRun
from mm_moslora.compare.comparison_plan import (
    LOSS,
    Cell,
    ComparisonSettings,
    Outcome,
    describe,
    known_cells,
    reported_cells,
    run_count,
    short_names,
    tuning_cells,
)
from mm_moslora.compare.holdout import check_share, with_holdout
from mm_moslora.config import Recipe
from mm_moslora.data.sources.open_sources import open_source
from mm_moslora.launch.imported_code import import_words
from mm_moslora.launch.jobs import Job, JobEngine, run_jobs
from mm_moslora.launch.slurm_array import write_array
from mm_moslora.models.model_paths import CONTENTS, same_parts, trained_on
from mm_moslora.training.supervision.stop_signals import StopRequest
from mm_moslora.utils.errors import ConfigError, MoSLoRAError
from mm_moslora.utils.file_locks import lock_file
from mm_moslora.utils.files import discard, mark, read_json, remove, replace_json
from mm_moslora.utils.folder_marks import refuse_strangers
from mm_moslora.utils.text_format import format_seconds
from mm_moslora.utils.untrusted_data import read_value

logger = logging.getLogger(__name__)

ARRAY = "array.sbatch"
PROGRAM = "mm_moslora"
_FILES = (ARRAY, "comparison.json", "results.json", "report.html", "data", "runs", "features")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunBudget:
    """Resources of a comparison."""

    cards: int = 0
    """Accelerators per run; 0: one, where the run's process sees any."""
    max_minutes: float | None = None
    """Time limit; the same command continues."""
    keep_all: bool = False
    """Keep the checkpoints of tuning runs, too."""


class ArmComparison:
    """A comparison and its folder; `hold_out`: share of the training records for the validation split, where neither
    the recipe nor the settings have one."""

    def __init__(self, recipe: Recipe, settings: ComparisonSettings, folder: Path, *, hold_out: float) -> None:
        self.settings, self.folder = settings, folder.resolve()
        splits = settings.tunes and tuple(settings.validation) == (LOSS,) and not recipe.data.held_out
        self._given, self._hold_out = recipe, check_share(hold_out) if splits else None
        self.recipe = recipe
        """The recipe that all arms share; `check` gives it the validation split."""
        self.outcomes: dict[str, Outcome] = {}
        self._at_once = 1

    def check(self) -> None:
        """Check tasks, data and folder before anything runs, then split the records."""
        names = dict.fromkeys([*self.settings.tasks, *self.settings.validation])
        data = {name: comparison_cell.open_task(name, self.settings).load() for name in names if name != LOSS}
        measured, trained_on = {name: loaded.sha256 for name, loaded in data.items()}, self._trained_on()
        if self.settings.tunes:
            choosing = {measured[name] for name in self.settings.validation if name != LOSS}
            if LOSS in self.settings.validation:
                choosing |= {content for name, content in trained_on.items() if name.startswith("data.validation ")}
            if shared := sorted(name for name in self.settings.tasks if measured[name] in choosing):
                raise ConfigError(
                    f"{shared[0]!r} is both a test task and the validation split: rates would be chosen on the "
                    "reported data. Give another file with --validation."
                )
        file = self.folder / "comparison.json"
        claimed = file.is_file()
        self._claim(file, {**trained_on, **measured})
        try:
            if self._hold_out is not None:  # only a folder that is claimed holds a split of these records
                self.recipe = with_holdout(self._given, self.folder / "data", share=self._hold_out, reuse=claimed)
        except MoSLoRAError:
            if not claimed:  # another share may do
                discard(file)
            raise
        self._read_outcomes()

    def _trained_on(self) -> dict[str, str]:
        """Fingerprints of the base model and of the training data; before the split is made, of its sources."""
        data = self._given.data
        parts = {"train": data.train, "validation": data.held_out}
        return trained_on(self._given.model)[CONTENTS] | {
            f"data.{part} {number}": open_source(source).fingerprint()
            for part, sources in parts.items()
            for number, source in enumerate(sources, start=1)
        }

    def _claim(self, file: Path, checksums: Mapping[str, str]) -> None:
        own = describe(self.settings) | {"hold_out": self._hold_out, "data": dict(checksums)}
        if file.is_file():
            try:
                stored = read_json(file)
            except ValueError as error:
                raise ConfigError(f"{file} is damaged ({error}). Restore it, or choose another --output.") from error
            if stored.get("format") != own["format"]:
                raise ConfigError(
                    f"{self.folder} has format {stored.get('format')!r}, this version reads {own['format']}. "
                    "Choose another --output."
                )
            before = read_value(dict[str, str], stored.get("data") or {}, source=str(file), where="data")
            self._refuse_changed_data(before, dict(checksums) | same_parts(self._given.model, before))
            changed = [key for key, value in own.items() if key != "data" and stored.get(key) != value]
            if changed:
                key = changed[0]
                raise ConfigError(
                    f"{self.folder} was started with {key} {stored.get(key)!r}, now it is {own[key]!r}. Arms, rates "
                    "and seeds may be added to a comparison, the rest may not change. Choose another --output."
                )
        replace_json(file, own)

    def _refuse_changed_data(self, before: Mapping[str, str], checksums: Mapping[str, str]) -> None:
        sources = {key: item for key, item in before.items() if key.startswith("data.") or key in checksums}
        now = {key: item for key, item in checksums.items() if key.startswith("data.") or key in before}
        changed = sorted(key for key in sources.keys() | now.keys() if sources.get(key) != now.get(key))
        if changed:
            raise ConfigError(
                f"{self.folder} was started with other data: {', '.join(changed)} changed. Runs on different data "
                "cannot be compared. Restore the data, or choose another --output."
            )

    def _read_outcomes(self) -> None:
        """All finished runs, successful or not, of a rate that is no longer the best, too."""
        at = [dict.fromkeys((arm.name for arm in self.settings.arms), rate) for rate in self.settings.rates]
        reported = [item for chosen in at for item in reported_cells(self.settings, chosen)]
        for item in (*reported, *tuning_cells(self.settings)):
            recipe = item.recipe(self.recipe, self.folder)
            run_folder = Path(recipe.train.output)
            outcome = comparison_cell.known_outcome(run_folder)
            if outcome is not None:
                if not isinstance(outcome, comparison_cell.Damaged):
                    comparison_cell.require_same_recipe(run_folder, outcome, recipe)
                self.outcomes[item.name] = outcome

    def run(self, budget: RunBudget, engine: JobEngine) -> bool:
        """Run what is missing; returns whether all is done. SIGTERM and Ctrl-C save and exit, as in training."""
        # The reason of a failure may be gone; a run that diverged would diverge again.
        self.outcomes = {name: outcome for name, outcome in self.outcomes.items() if outcome.status != "failed"}
        self._at_once = engine.width(budget.cards)
        runs: dict[str, CellRun] = {}
        deadline = time.monotonic() + 60 * (math.inf if budget.max_minutes is None else budget.max_minutes)

        def new_jobs() -> list[Job]:
            new = [self._order(item, budget) for item in self._next() if item.name not in runs]
            runs.update({run.cell.name: run for run in new})
            return [_job(run) for run in new]

        with StopRequest() as stop:
            run_jobs(
                new_jobs, engine, over=lambda job, problem: self._over(runs[job.name], problem),
                stop=lambda: bool(stop.received) or time.monotonic() > deadline,
            )  # fmt: skip
        if not self._ready():
            return True
        if stop.received:
            logger.info("Stopped by signal %d. The same command continues.", stop.received)
        elif time.monotonic() > deadline:
            logger.info("%g minutes are over. The same command continues.", budget.max_minutes)
        return False

    def write_array(self, budget: RunBudget) -> bool:
        """Write the SLURM array of the runs that can start; returns whether all is done, and no array is left."""
        jobs = [_job(self._order(item, budget)) for item in self._next()]
        if not jobs:
            discard(self.folder / ARRAY)
            return True
        write_array(self.folder / ARRAY, jobs)
        return False

    def _next(self) -> list[Cell]:
        """The runs that can start; after the last one the shared features go."""
        ready = self._ready()
        if not ready:
            remove(self.folder / comparison_cell.FEATURES)
        return ready

    def _ready(self) -> list[Cell]:
        """Runs that can start."""
        return [item for item in known_cells(self.settings, self.outcomes) if item.name not in self.outcomes]

    def _order(self, item: Cell, budget: RunBudget) -> CellRun:
        recipe = item.recipe(self.recipe, self.folder)
        run = CellRun(
            cell=item, recipe=recipe, settings=self.settings, folder=self.folder, cards=budget.cards,
            keep_all=budget.keep_all,
        )  # fmt: skip
        run.order()
        return run

    def _over(self, run: CellRun, problem: str) -> None:
        """Take the outcome of a run."""
        outcome = comparison_cell.known_outcome(run.run_folder)
        if outcome is None:
            outcome = Outcome(status="failed", reason=problem)
            comparison_cell.write_outcome(run.run_folder, outcome)
        self.outcomes[run.cell.name] = outcome
        logger.info("%s", self._line(run.cell, outcome))

    def _line(self, item: Cell, outcome: Outcome) -> str:
        count = run_count(self.settings, self.outcomes)
        over = sum(other.name in self.outcomes for other in known_cells(self.settings, self.outcomes))
        what = f"[{over}/{count}] {item.arm.name} at {item.rate:g}, seed {item.seed}: "
        if outcome.status != "ok":
            return f"{what}{outcome.status}: {outcome.reason}"
        scores = outcome.validation if item.tuning else outcome.test
        names = short_names([*self.settings.tasks, *self.settings.validation]) | {LOSS: "held-out loss"}
        shown = ", ".join(f"{names[task]} {score:.4f}" for task, score in scores.items())
        seconds = fmean(each.total_seconds for each in self.outcomes.values() if each.status == "ok")
        rounds = (count - over) / max(1, min(self._at_once, count - over))
        left = f"about {format_seconds(seconds * rounds)} left" if rounds else "all done"
        return f"{what}{shown}; {format_seconds(outcome.total_seconds)}; {left}"


def _job(run: CellRun) -> Job:
    """The job of a run: a command that does the same by hand."""
    return Job(
        name=run.cell.name, log=run.run_folder / comparison_cell.LOG, cards=run.cards,
        command=(PROGRAM, *import_words(), "compare", str(run.folder), "--cell", run.cell.name),
        output=run.run_folder / comparison_cell.OUTCOME,
    )  # fmt: skip


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Lock a comparison folder; ConfigError where it is locked, or other programs' files have names that a comparison
    writes."""
    refuse_strangers(folder, _FILES, kind="comparison", also=("comparison.json",))
    folder.mkdir(parents=True, exist_ok=True)
    mark(folder, "comparison")
    try:
        lock = lock_file(folder / ".lock", wait=False)
    except BlockingIOError as error:
        raise ConfigError(
            f"{folder} is in use by another comparison. Wait for it, or choose another --output."
        ) from error
    with lock:
        yield
