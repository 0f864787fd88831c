"""A comparison from start to end: plan, tune the rates, run the seeds, analyse. The same call again continues it."""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

from mm_moslora.compare import comparison_cell
from mm_moslora.compare.comparison_cell import Job
from mm_moslora.compare.comparison_plan import (
    LOSS,
    Cell,
    Outcome,
    Settings,
    choose_rates,
    describe,
    grid_of,
    hopeless_arms,
    reported_cells,
    run_count,
    tuning_cells,
)
from mm_moslora.compare.holdout import with_holdout
from mm_moslora.compare.process_pool import Pool, Slot, slots
from mm_moslora.compare.sequential_looks import FILE, read_state
from mm_moslora.config import Recipe
from mm_moslora.data.sources.open_sources import open_source
from mm_moslora.training.supervision.stop_signals import StopRequest
from mm_moslora.utils.errors import ConfigError, MoSLoRAError
from mm_moslora.utils.file_locks import held
from mm_moslora.utils.files import discard, mark, read_json, refuse_strangers, remove, replace_json
from mm_moslora.utils.hardware import renew_threads
from mm_moslora.utils.run_paths import MANIFEST, checkpoints, file_and_folder
from mm_moslora.utils.text_format import format_seconds

logger = logging.getLogger(__name__)

PROBE_STEPS = 3
"""Steps of the probe that estimates the speed for a plan."""
WAIT_SECONDS = 5.0
_FILES = (FILE, "comparison.json", "results.json", "report.html", "data", "runs")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunBudget:
    """Resources of a comparison."""

    parallel: int | None = None
    """Parallel runs; None: one per `devices_per_run` accelerators, one on a CPU."""
    devices_per_run: int = 1
    max_minutes: float | None = None
    """Time limit; the same command continues."""
    keep_all: bool = False
    """Keep the checkpoints of tuning runs, too."""


class Comparison:
    """A comparison and its folder.

    Args:
        recipe: the recipe that all arms share.
        settings: the comparison's.
        folder: the comparison's.
        hold_out: share of the training records for the validation split, where neither the recipe nor the settings
            have one.
    """

    def __init__(self, recipe: Recipe, settings: Settings, folder: Path, *, hold_out: float) -> None:
        self.settings, self.folder = settings, folder.resolve()
        self._given, self._hold_out = recipe, None
        if settings.tunes and tuple(settings.validation) == (LOSS,) and not recipe.data.held_out:
            self._hold_out = hold_out
            recipe = with_holdout(recipe, self.folder / "data", share=hold_out)
        self.recipe = recipe
        self.outcomes: dict[str, Outcome] = {}
        self.documents = 0
        """Documents of all test tasks, once checked."""
        self.run_seconds = math.nan
        """Seconds of training of one run, once probed."""
        self._said_cost = False

    def check(self) -> None:
        """Check tasks, data and folder before anything runs.

        Raises:
            MoSLoRAError: a check failed.
        """
        names = dict.fromkeys([*self.settings.tasks, *self.settings.validation])
        data = {name: comparison_cell.open_task(name, self.settings).load() for name in names if name != LOSS}
        measured = {name: found.sha256 for name, found in data.items()}
        self.documents = sum(len(data[name].documents[: self.settings.limit]) for name in self.settings.tasks)
        shared = {*self.settings.tasks} & {*self.settings.validation}
        if shared and self.settings.tunes:
            raise ConfigError(
                f"{sorted(shared)[0]!r} is both a test task and the validation split: rates would be chosen on the "
                "reported data. Give another file with --validation."
            )
        self._claim({**self._trained_on(), **measured})
        state = read_state(self.folder)
        if state is not None:
            seeds = max(self.settings.seeds, state.seeds)
            self.settings = dataclasses.replace(self.settings, seeds=seeds, decided=state.arms)
        self._read_outcomes()

    def _trained_on(self) -> dict[str, str]:
        """Checksums of the training data; before the split is made, of its sources."""
        data = self._given.data
        parts = {"train": data.train, "validation": data.held_out}
        return {
            f"data.{part} {number}": open_source(source).fingerprint()
            for part, sources in parts.items()
            for number, source in enumerate(sources, start=1)
        }

    def _claim(self, checksums: Mapping[str, str]) -> None:
        file = self.folder / "comparison.json"
        own = describe(self.settings) | {"hold_out": self._hold_out, "data": dict(checksums)}
        if file.is_file():
            try:
                found = read_json(file)
            except ValueError as error:
                raise ConfigError(f"{file} is damaged ({error}). Restore it, or choose another --output.") from error
            if found.get("format") != own["format"]:
                raise ConfigError(
                    f"{self.folder} has format {found.get('format')!r}, this version reads {own['format']}. "
                    "Choose another --output."
                )
            self._refuse_changed_data(found.get("data") or {}, checksums)
            changed = [key for key, value in own.items() if found.get(key) != value]
            if changed:
                key = changed[0]
                raise ConfigError(
                    f"{self.folder} was started with {key} {found.get(key)!r}, now it is {own[key]!r}. Arms, rates and "
                    "seeds may be added to a comparison, the rest may not change. Choose another --output."
                )
        replace_json(file, own)

    def _refuse_changed_data(self, found: Mapping[str, str], checksums: Mapping[str, str]) -> None:
        sources = {key: item for key, item in found.items() if key.startswith("data.") or key in checksums}
        now = {key: item for key, item in checksums.items() if key.startswith("data.") or key in found}
        changed = sorted(key for key in sources.keys() | now.keys() if sources.get(key) != now.get(key))
        if changed:
            raise ConfigError(
                f"{self.folder} was started with other data: {', '.join(changed)} changed. Runs on different data "
                "cannot be compared. Restore the data, or choose another --output."
            )

    def _read_outcomes(self) -> None:
        """All finished runs, successful or not."""
        seen = -1
        while seen < len(self.outcomes):  # outcomes of a grid show how it has grown
            seen = len(self.outcomes)
            grids = {arm.name: grid_of(self.settings, arm, self.outcomes) for arm in self.settings.arms}
            one_each = [{arm: rate} for arm, grid in grids.items() for rate in grid]
            self._read_some([item for one in one_each for item in reported_cells(self.settings, one)])
            self._read_some(tuning_cells(self.settings, self.outcomes))

    def _read_some(self, cells: Sequence[Cell]) -> None:
        for item in cells:
            recipe = item.recipe(self.recipe, self.folder)
            place = Path(recipe.train.output)
            outcome = comparison_cell.read_outcome(place)
            if outcome is not None:
                comparison_cell.require_same_recipe(place, outcome, recipe)
                self.outcomes[item.name] = outcome

    def run(self, room: RunBudget, *, after: Callable[[], Settings] | None = None) -> bool:
        """Run what is missing; returns whether all is done. SIGTERM and Ctrl-C save and exit, as in training.

        Args:
            room: the resources.
            after: called when all is done; returns the settings to go on with, those with the present seeds to end.
        """
        with StopRequest() as stop:
            return self._run(room, stop, after)

    def _run(self, room: RunBudget, stop: StopRequest, after: Callable[[], Settings] | None) -> bool:
        started = time.monotonic()
        # The reason of a failure may be gone; a run that diverged would diverge again.
        self.outcomes = {name: outcome for name, outcome in self.outcomes.items() if outcome.status != "failed"}
        pool = Pool(_work, slots(parallel=room.parallel, devices_per_run=room.devices_per_run), preload=_PRELOAD)
        tried: set[str] = set()
        try:
            while True:
                waiting = [item for item in self._ready() if item.name not in tried]
                while waiting and pool.free:
                    item = waiting.pop(0)
                    tried.add(item.name)
                    job = self._job(item)
                    discard(job.place / comparison_cell.OUTCOME)
                    pool.start(job)
                if not pool.running:
                    if self._ready():
                        return False
                    before, self.settings = self.settings, self.settings if after is None else after()
                    if self.settings.seeds <= before.seeds:
                        return True
                    continue
                for job, code in pool.wait(WAIT_SECONDS):
                    self._over(job, code, room)
                self._say_cost(pool.running)
                if stop.received:
                    logger.info("Stopped by signal %d; saving. The same command continues.", stop.received)
                    return False
                if room.max_minutes is not None and time.monotonic() - started > 60 * room.max_minutes:
                    logger.info("%g minutes are over; saving. The same command continues.", room.max_minutes)
                    return False
        finally:
            pool.stop()

    def _cells(self) -> list[Cell]:
        """Runs known so far, tuning first; an arm's reported runs are known once its rate is chosen."""
        return [
            *tuning_cells(self.settings, self.outcomes),
            *reported_cells(self.settings, choose_rates(self.settings, self.outcomes)),
        ]

    def _ready(self) -> list[Cell]:
        """Runs that can start."""
        return [item for item in self._cells() if item.name not in self.outcomes]

    def _job(self, item: Cell, *, stop_at: int | None = None) -> Job:
        recipe = item.recipe(self.recipe, self.folder)
        return Job(cell=item, recipe=recipe, settings=self.settings, folder=self.folder, stop_at=stop_at)

    def _over(self, job: Job, code: int, room: RunBudget) -> None:
        outcome = comparison_cell.read_outcome(job.place)
        if outcome is None and code != 0:
            outcome = Outcome(status="failed", reason=_killed(code, job.place / comparison_cell.LOG))
            comparison_cell.write_outcome(job.place, outcome)
        if outcome is None:  # stopped by a signal and saved; it continues next time
            return
        self.outcomes[job.cell.name] = outcome
        if job.cell.tuning and not room.keep_all:
            for _, checkpoint in checkpoints(job.place):
                if (checkpoint / MANIFEST).is_file():
                    remove(checkpoint, mark=MANIFEST)
        logger.info("%s", self._line(job.cell, outcome))

    def _line(self, item: Cell, outcome: Outcome) -> str:
        count = run_count(self.settings, self.outcomes)
        over = sum(known.name in self.outcomes for known in self._cells())
        what = f"[{over}/{count}] {item.arm.name} at {item.rate:g}, seed {item.seed}: "
        if outcome.status != "ok":
            return f"{what}{outcome.status}: {outcome.reason}"
        scores = outcome.validation if item.tuning else outcome.test
        names = short_names([*self.settings.tasks, *self.settings.validation]) | {LOSS: "held-out loss"}
        shown = ", ".join(f"{names[task]} {score:.4f}" for task, score in scores.items())
        return f"{what}{shown}; {format_seconds(outcome.total_seconds)}; {self._left()}"

    def _left(self) -> str:
        seconds = self.seconds_left()
        return "all done" if seconds == 0 else f"about {format_seconds(seconds)} of runs left"

    def seconds_left(self) -> float:
        """Estimate of the missing runs' seconds, from finished runs of the same arm, else from the mean of all."""
        known = [o for o in self.outcomes.values() if o.status == "ok"]
        if not known:
            return math.nan
        usual = sum(outcome.total_seconds for outcome in known) / len(known)
        total, hopeless = 0.0, hopeless_arms(self.settings, self.outcomes)
        for arm in self.settings.arms:
            if arm.name in hopeless:
                continue
            cells_of_arm = [item for item in self._cells() if item.arm.name == arm.name]
            own = [self.outcomes[item.name] for item in cells_of_arm if item.name in self.outcomes]
            timed = [o.total_seconds for o in own if o.status == "ok"]
            mean = sum(timed) / len(timed) if timed else usual
            tuning = [item for item in cells_of_arm if item.tuning]
            total += mean * max(0, len(tuning) + self.settings.seeds_of(arm.name) - len(own))
        return total

    def _say_cost(self, running: Sequence[Job]) -> None:
        """Log the cost once, after the first steps of the first run."""
        if self._said_cost:
            return
        for job in running:
            text = cost_line(self.settings, job, comparison_cell.metrics(job.place))
            if text:
                logger.info("%s", text)
                self._said_cost = True
                return

    def probe(self, room: RunBudget) -> str:
        """Run a few steps of the first run, which keeps them, and estimate the cost of the whole comparison."""
        waiting = self._ready()
        if not waiting:
            return "Nothing is left to run."
        pool = Pool(_work, slots(parallel=1, devices_per_run=room.devices_per_run), preload=_PRELOAD)
        job = self._job(waiting[0], stop_at=PROBE_STEPS)
        pool.start(job)
        try:
            while pool.running:
                for _, code in pool.wait(WAIT_SECONDS):
                    outcome = comparison_cell.read_outcome(job.place)
                    if outcome is not None and outcome.status != "ok":
                        raise MoSLoRAError(f"The first run {outcome.status}: {outcome.reason}")
                    if code:
                        raise MoSLoRAError(_killed(code, job.place / comparison_cell.LOG))
        finally:
            pool.stop()
        rows = comparison_cell.metrics(job.place)
        self.run_seconds = run_seconds(job, rows)
        return cost_line(self.settings, job, rows) or "The run is shorter than the probe."


_PRELOAD = "mm_moslora.compare.forkserver_preload"


def _work(job: Job, slot: Slot) -> None:
    renew_threads()
    comparison_cell.run(dataclasses.replace(job, devices=slot.devices))


def run_seconds(job: Job, rows: Sequence[dict[str, Any]]) -> float:
    """Seconds of training of a whole run, from its first steps; NaN before there are enough."""
    steps = _timed(rows)
    if len(steps) < PROBE_STEPS:
        return math.nan
    return median(row["step_seconds"] for row in steps) * _total_steps(job, steps)


def _timed(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row for row in rows if "step_seconds" in row]


def _total_steps(job: Job, steps: Sequence[dict[str, Any]]) -> int:
    return job.recipe.train.total_steps(steps[-1]["step"] / steps[-1]["epoch"])


def cost_line(settings: Settings, job: Job, rows: Sequence[dict[str, Any]]) -> str | None:
    """The cost of all runs, from the first steps of one; None before there are enough steps."""
    seconds, runs = run_seconds(job, rows), run_count(settings)
    if math.isnan(seconds):
        return None
    steps = _timed(rows)
    total, last = _total_steps(job, steps), steps[-1]
    return (
        f"Cost: {seconds / total:.2f} s a step, {total} steps a run, {runs} runs: about "
        f"{format_seconds(seconds * runs)} of training in all (and loading and measuring), "
        f"{last['memory_gib']:.1f} GiB a run, measured on {job.cell.arm.name}."
    )


def short_names(tasks: Sequence[str]) -> dict[str, str]:
    """A unique display name for each task: for a data file its file name, with as many folders as needed."""
    files = {task: Path(file).with_suffix("") for task in tasks if (file := _file_of(task))}
    names = {task: files[task].name if task in files else task for task in tasks}
    for depth in range(2, 1 + max((len(file.parts) for file in files.values()), default=0)):
        taken = Counter(names.values())
        names |= {task: "/".join(file.parts[-depth:]) for task, file in files.items() if taken[names[task]] > 1}
    taken = Counter(names.values())
    return {task: task if taken[name] > 1 else name for task, name in names.items()}


def _file_of(task: str) -> str:
    kind, _, rest = task.partition(":")
    return {"llava": file_and_folder(rest)[0], "tsv": rest}.get(kind, "")


def _killed(code: int, log: Path) -> str:
    if code < 0:
        hint = "; signal 9 often means that the machine ran out of memory" if code == -9 else ""
        return f"the process was ended by signal {-code}{hint}; see {log}"
    return f"the process ended with code {code}; see {log}"


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Lock a comparison folder.

    Raises:
        ConfigError: another comparison holds the lock, or files of another program have names that a comparison
        writes.
    """
    refuse_strangers(folder, _FILES, kind="comparison", also=("comparison.json",))
    folder.mkdir(parents=True, exist_ok=True)
    mark(folder, "comparison")
    try:
        lock = held(folder / ".lock", wait=False)
    except BlockingIOError as error:
        raise ConfigError(
            f"{folder} is in use by another comparison. Wait for it, or choose another --output."
        ) from error
    with lock:
        yield
