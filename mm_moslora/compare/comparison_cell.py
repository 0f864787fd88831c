"""The runs of a comparison in a process: train, measure, record the outcome, and leave nothing to the next run."""

from __future__ import annotations

import dataclasses
import gc
import logging
import os
import signal
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from mm_moslora.compare.comparison_plan import LOSS, Cell, Outcome, Settings, numbers_of, recipe_hash
from mm_moslora.compare.process_pool import Slot
from mm_moslora.config import Recipe
from mm_moslora.config.recipe import leaves
from mm_moslora.config.recipe_paths import absolute
from mm_moslora.utils.errors import ConfigError, DivergedError, MoSLoRAError
from mm_moslora.utils.files import mark, read_json, replace_json
from mm_moslora.utils.hardware import renew_threads
from mm_moslora.utils.untrusted_data import parse_lines

if TYPE_CHECKING:
    from mm_moslora_eval.protocol.task import Task
    from mm_moslora_eval.sources.image_controls import ImageMode

    from mm_moslora.models.assembly import LoadBase

logger = logging.getLogger(__name__)

OUTCOME, LOG, RECIPE = "outcome.json", "log.txt", "recipe.yaml"
PRELOAD = (
    "mm_moslora_eval.backends.local_model", "mm_moslora_eval.backends.open_model", "mm_moslora_eval.run.evaluate_suite",
    "mm_moslora.models.kept_base", "mm_moslora.training.training_loop",
)  # fmt: skip
"""What every run imports."""
FEATURES = "features"
"""Folder of a frozen encoder's features in the comparison's."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """The arguments of a run's process."""

    cell: Cell
    recipe: Recipe
    settings: Settings
    folder: Path
    """Of the comparison."""
    devices: int = 1
    """Accelerators of the run."""
    stop_at: int | None = None
    """Number of steps of a probe that measures the speed; None: the whole run."""
    rehearsed: bool = False
    """Whether a run of the same arm has finished here, so that this one needs no rehearsal."""
    alone: bool = False
    """Whether it must have a process of its own."""

    @property
    def place(self) -> Path:
        """The run's folder."""
        return Path(self.recipe.train.output)

    @property
    def feature_cache(self) -> Path | None:
        """Folder of the features that all runs share; None: the encoder trains, or cannot be cached, or is none."""
        model = self.recipe.model
        if model.vision is None or model.vlm is not None or model.image_aspect == "anyres":
            return None
        if model.vision.feature_cache is not None:
            return Path(model.vision.feature_cache).expanduser()
        return self.folder / FEATURES if model.vision.mode == "frozen" else None


def read_outcome(place: Path) -> Outcome | None:
    """The outcome of a run; None where it has not ended.

    Raises:
        ConfigError: the outcome file is damaged.
    """
    file = place / OUTCOME
    try:
        return Outcome(**read_json(file))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{file} is damaged ({error}). Delete it to measure the run again, or restore it.") from error


def write_outcome(place: Path, outcome: Outcome) -> None:
    """Write the outcome of a run atomically."""
    place.mkdir(parents=True, exist_ok=True)
    replace_json(place / OUTCOME, dataclasses.asdict(outcome))


def require_same_recipe(place: Path, outcome: Outcome, recipe: Recipe) -> None:
    """Refuse the outcome of another recipe. Keys that the run's version did not have count with their defaults.

    Args:
        place: the run's folder.
        outcome: the run's.
        recipe: as it would be run now.

    Raises:
        ConfigError: values differ, or the run's own recipe cannot be read.
    """
    if outcome.recipe == recipe_hash(recipe):
        return
    file = place / RECIPE
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise ConfigError(
            f"{place} was run with another recipe, and its {RECIPE} is missing. Choose another --output."
        ) from error
    before = leaves(numbers_of(Recipe.from_yaml(text, source=str(file))))
    now = leaves(numbers_of(_absolute(recipe)))
    changed = [key for key in sorted(before | now) if before.get(key) != now.get(key)]
    if changed:
        words = "; ".join(f"{key}: {before.get(key)!r} -> {now.get(key)!r}" for key in changed[:6])
        more = f" and {len(changed) - 6} more" if len(changed) > 6 else ""
        raise ConfigError(
            f"{place} was run with another recipe ({words}{more}). Restore it, or choose another --output."
        )


def _absolute(recipe: Recipe) -> Recipe:
    """The recipe as it can be read from any folder."""
    return Recipe.from_dict(absolute(recipe.to_dict()))


def why_alone(job: Job) -> str:
    """Why a run needs a process of its own; "" where it may follow another one."""
    from mm_moslora.training.deepspeed_presets import stage_of

    train = job.recipe.train
    if job.devices > 1:
        return "each has several devices"
    if job.recipe.model.quantisation != "none":
        return "the base model is quantised"
    if train.compile is not None:
        return "train.compile is set, and torch.compile is limited to a number of models in a process"
    try:
        if stage_of(train.zero) == 3:
            return "ZeRO-3 takes the base model apart"
    except ConfigError as error:  # the run says it, too, and the other runs continue
        return str(error).rstrip(".")
    return "it failed after others" if job.alone else ""


def kind_of(job: Job) -> Any:
    """What runs that take turns in a process have in common; None: the run has a process of its own."""
    if why_alone(job):
        return None
    return job.recipe.model, dataclasses.replace(job.recipe.train, seed=0, output="")


def how_processes_are_shared(jobs: Sequence[Job]) -> list[str]:
    """Which of the runs have processes of their own and why, as lines of text."""
    reasons = {job.cell.arm.name: why for job in jobs if (why := why_alone(job))}
    lines = [f"Every run of {name} has a process of its own: {why}." for name, why in reasons.items()]
    if len(reasons) < len(jobs):
        lines.append("Runs with the same `model` and `train` take turns in one process, which reads the base once.")
    return lines


class Runner:
    """Takes runs, one after the other; those of one kind share the base model.

    Args:
        slot: the accelerators of this process.
    """

    def __init__(self, slot: Slot) -> None:
        renew_threads()
        if slot.devices:
            os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(slot.devices)
        self._load_base: LoadBase | None = None

    def __call__(self, job: Job) -> bool:
        """Train and measure one run. Its folder gets the outcome, errors included, and its log the output.

        A killed process leaves no outcome; the caller then writes it.

        Returns:
            Whether the process may take another run: not after an error or a signal.
        """
        from mm_moslora.models.kept_base import KeptBase

        if self._load_base is None and kind_of(job) is not None:
            self._load_base = KeptBase()
        with _nothing_left_behind(job.place / LOG):
            outcome = _outcome(job, self._load_base)
        if outcome is not None:
            write_outcome(job.place, dataclasses.replace(outcome, recipe=recipe_hash(job.recipe)))
        return job.stop_at is not None if outcome is None else outcome.status == "ok"


def _outcome(job: Job, load_base: LoadBase | None) -> Outcome | None:
    try:
        return _run(job, time.monotonic(), load_base)
    except DivergedError as error:
        return Outcome(status="diverged", reason=str(error))
    except MoSLoRAError as error:
        return Outcome(status="failed", reason=str(error))
    except Exception as error:  # the other runs continue
        logger.error("%s", traceback.format_exc())
        return Outcome(status="failed", reason=f"{type(error).__name__}: {_first_line(error)}")


@contextmanager
def _nothing_left_behind(log: Path) -> Iterator[None]:
    """The output of a run in its log, and afterwards environment and memory as before it."""
    import torch

    from mm_moslora.training.run_logging import reset_peak_memory

    environment = dict(os.environ)
    log.parent.mkdir(parents=True, exist_ok=True)
    _log_into(log)
    reset_peak_memory()
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os.environ.clear()
        os.environ.update(environment)
        gc.collect()
        torch.cuda.empty_cache()  # nothing where CUDA has not started


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or ["no message"])[0]


def _log_into(path: Path) -> None:
    """Redirect standard output and error, of libraries and of child processes too, into a file."""
    with path.open("a", encoding="utf-8") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(message)s", force=True)


def _run(job: Job, started: float, load_base: LoadBase | None) -> Outcome | None:
    finished = _train(job, load_base)
    if not finished:
        return None
    outcome = _measured(job, load_base)
    return dataclasses.replace(outcome, total_seconds=time.monotonic() - started)


def _train(job: Job, load_base: LoadBase | None) -> bool:
    """Train to the end, a signal or `stop_at`; returns whether the end was reached."""
    (job.place / RECIPE).write_text(_absolute(job.recipe).to_yaml(), encoding="utf-8")
    if job.devices > 1:
        return _train_on_several(job)
    from mm_moslora.training.training_loop import train

    recipe = _as_trained(job)
    return train(recipe, stop_at=job.stop_at, load_base=load_base).finished


def _as_trained(job: Job) -> Recipe:
    """The run's recipe without what an earlier run has done: the rehearsal, and features of pictures."""
    from mm_moslora.models.vision.feature_cache import SHARED_GIB

    model, train = job.recipe.model, job.recipe.train
    if job.rehearsed:
        train = dataclasses.replace(train, rehearsal=False)
    if job.feature_cache is not None and model.vision is not None and model.vision.feature_cache is None:
        job.feature_cache.mkdir(parents=True, exist_ok=True)
        mark(job.feature_cache, "features")
        kept = dataclasses.replace(model.vision, feature_cache=str(job.feature_cache), feature_cache_gib=SHARED_GIB)
        model = dataclasses.replace(model, vision=kept)
    return dataclasses.replace(job.recipe, model=model, train=train)


def _train_on_several(job: Job) -> bool:
    from mm_moslora.launch.launcher import run_and_hand_on
    from mm_moslora.training.supervision.run_state import STATE

    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={job.devices}",
        "-m", "mm_moslora", "train", str(job.place / RECIPE),
        *(["--stop-at", str(job.stop_at)] if job.stop_at else []),
    ]  # fmt: skip
    ended = run_and_hand_on(command, [signal.SIGTERM])
    if ended.code == 0:
        return bool(read_json(job.place / STATE)["state"] == "finished")
    if ended.signals:
        return False
    raise MoSLoRAError(f"Training on {job.devices} devices ended with code {ended.code}; see {job.place / LOG}.")


def _measured(job: Job, load_base: LoadBase | None) -> Outcome:
    summary = read_json(job.place / "summary.json")
    rows = metrics(job.place)
    losses = [row["loss"] for row in rows if "loss" in row]
    tenth = max(1, len(losses) // 10)
    held_out = [row["validation_loss"] for row in rows if "validation_loss" in row]
    validation = {LOSS: held_out[-1]} if held_out else {}
    test: dict[str, float] = {}
    places: dict[str, dict[str, str]] = {}
    wanted = job.settings.validation if job.cell.tuning else job.settings.tasks
    for name, score, found in _evaluate(job, [name for name in wanted if name != LOSS], load_base):
        if job.cell.tuning:
            validation[name] = score
        else:
            test[name] = score
            places[name] = {mode: place.relative_to(job.folder).as_posix() for mode, place in found.items()}
    return Outcome(
        status="ok", validation=validation, test=test, places=places,
        first_loss=sum(losses[:tenth]) / tenth if losses else None,
        last_loss=sum(losses[-tenth:]) / tenth if losses else None,
        trainable=sum(row["trainable"] for row in summary["components"]), steps=summary["steps"],
        step_seconds=median(row["step_seconds"] for row in rows if "step_seconds" in row),
        train_seconds=summary["counters"]["seconds"], memory_gib=summary["memory_gib"],
        processes=summary["world_size"],
    )  # fmt: skip


def _evaluate(job: Job, names: list[str], load_base: LoadBase | None) -> Iterator[tuple[str, float, dict[str, Path]]]:
    """Yield (name, score with its own pictures, sample folder by image mode) of every task."""
    if not names:
        return
    from mm_moslora_eval.backends.open_model import open_model
    from mm_moslora_eval.eval_commands import Bars
    from mm_moslora_eval.run.evaluate_suite import evaluate
    from mm_moslora_eval.run.task_runner import Settings as EvalSettings

    from mm_moslora.training.run_setup import seed_everything

    seed_everything(job.recipe.train.seed)  # a new projector is drawn, and replaced by the trained one
    model = open_model(
        str(job.place), precision=job.recipe.train.precision, load_base=load_base, features=job.feature_cache
    )
    place = job.place / "eval"
    settings = EvalSettings(batch_size=job.settings.batch_size, limit=job.settings.limit, rank=0, world_size=1)
    try:
        for name in names:
            task = open_task(name, job.settings)
            modes = _modes(task) if job.settings.controls and not job.cell.tuning else ("own",)
            told = partial(Bars(len(modes)), name)
            results = evaluate(model, task, place, modes=modes, settings=settings, progress=told, baselines=())
            scores = {result.mode: result.score for result in results}
            yield name, scores["own"], {result.mode: place / result.folder for result in results}
    finally:
        model.close()


def _modes(task: Task) -> tuple[ImageMode, ...]:
    """All image modes for a task with at least two different pictures, else only its own."""
    from mm_moslora_eval.sources.image_controls import MODES, Hasher

    from mm_moslora.utils.errors import DataError

    hasher, seen = Hasher(), set()
    for image in (image for document in task.load().documents for image in document.images):
        try:
            seen.add(hasher(image))
        except (DataError, OSError):  # an unreadable sample
            continue
        if len(seen) > 1:
            return MODES
    return ("own",)


def open_task(name: str, settings: Settings) -> Task:
    """A task by name, with the settings' answer length."""
    from mm_moslora_eval.protocol.task_registry import get_task

    task = get_task(name)
    if settings.max_new_tokens is None:
        return task
    decoding = dataclasses.replace(task.decoding, max_new_tokens=settings.max_new_tokens)
    return dataclasses.replace(task, decoding=decoding)


def metrics(place: Path) -> list[dict[str, Any]]:
    """The rows of a run's metrics so far, without an incomplete last line."""
    try:
        text = (place / "metrics.jsonl").read_text(encoding="utf-8")
    except FileNotFoundError:  # not written yet, or moved aside by a fresh start of the run
        return []
    return parse_lines(text[: text.rfind("\n") + 1])
