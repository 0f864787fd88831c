"""A run of a comparison in its process: train, measure, record the outcome."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from mm_moslora.compare.arms import Arm
from mm_moslora.compare.comparison_plan import LOSS, Cell, Outcome, Settings, numbers_of, recipe_hash
from mm_moslora.config import Recipe
from mm_moslora.config.recipe import leaves
from mm_moslora.config.recipe_paths import absolute
from mm_moslora.utils.errors import ConfigError, DistributedError, DivergedError, MoSLoRAError
from mm_moslora.utils.files import mark, read_json, replace_json, replace_text
from mm_moslora.utils.untrusted_data import build_strictly, parse_lines, parse_object
from mm_moslora.utils.untrusted_files import read_text_below

if TYPE_CHECKING:
    from mm_moslora_eval.protocol.task import Task
    from mm_moslora_eval.sources.image_controls import ImageMode

logger = logging.getLogger(__name__)

OUTCOME, LOG, RECIPE = "outcome.json", "log.txt", "recipe.yaml"
FEATURES = "features"
"""Folder of a frozen encoder's features in the comparison's."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """The arguments of a run's process, which gets them on its standard input."""

    cell: Cell
    recipe: Recipe
    settings: Settings
    folder: Path
    """Of the comparison."""
    accelerators: tuple[str, ...] = ()
    """Names of the accelerators of its slot; none on a CPU."""
    stop_at: int | None = None
    """Number of steps of a probe that measures the speed; None: the whole run."""
    rehearsed: bool = False
    """Whether a run of the same arm has finished here, so that this one needs no rehearsal."""

    def to_json(self) -> str:
        """The job as one line."""
        return json.dumps(dataclasses.asdict(self) | {"recipe": self.recipe.to_dict(), "folder": str(self.folder)})

    @classmethod
    def from_json(cls, text: str) -> Job:
        """Read `to_json`."""
        told = parse_object(text)
        settings, cell = told["settings"], told["cell"]
        return cls(
            **told | {
                "cell": Cell(**cell | {"arm": Arm(**cell["arm"])}), "recipe": Recipe.from_dict(told["recipe"]),
                "settings": Settings(**settings | {"arms": [Arm(**arm) for arm in settings["arms"]]}),
                "folder": Path(told["folder"]), "accelerators": tuple(told["accelerators"]),
            }
        )  # fmt: skip

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
        return build_strictly(Outcome, _finite(read_json(file, below=place)), source="it")
    except FileNotFoundError:
        return None
    except (ConfigError, ValueError) as error:
        raise ConfigError(f"{file} is damaged ({error}). Delete it to measure the run again, or restore it.") from error


def _finite(value: Any) -> Any:
    """Plain data without NaN and infinity; a score that is no number counts as not measured."""
    if not isinstance(value, dict):
        return value
    return {k: _finite(item) for k, item in value.items() if not isinstance(item, float) or math.isfinite(item)}


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
    text = read_text_below(place, RECIPE)
    if text is None:
        raise ConfigError(f"{place} was run with another recipe, and its {RECIPE} is missing. Choose another --output.")
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


def main() -> None:
    """Train and measure the run that a comparison writes to standard input; its folder gets outcome and errors.

    A killed process leaves no outcome; the comparison then writes it.
    """
    job = Job.from_json(sys.stdin.readline())
    threading.Thread(target=_end_with_comparison, name="end with comparison", daemon=True).start()
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(message)s")
    outcome = _outcome(job)
    if outcome is not None:
        write_outcome(job.place, dataclasses.replace(outcome, recipe=recipe_hash(job.recipe)))


def _end_with_comparison() -> None:
    """Ask this process to save and exit once the comparison has been killed; otherwise it would train to the end."""
    while os.read(0, 1):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


def _outcome(job: Job) -> Outcome | None:
    try:
        return _run(job, time.monotonic())
    except DivergedError as error:
        return Outcome(status="diverged", reason=str(error))
    except MoSLoRAError as error:
        return Outcome(status="failed", reason=str(error))
    except Exception as error:  # the other runs continue
        logger.error("%s", traceback.format_exc())
        first = (str(error).strip().splitlines() or ["no message"])[0]
        return Outcome(status="failed", reason=f"{type(error).__name__}: {first}")


def _run(job: Job, started: float) -> Outcome | None:
    _require_own_accelerators(job)
    if not _train(job):
        return None
    return dataclasses.replace(_measured(job), total_seconds=time.monotonic() - started)


def _require_own_accelerators(job: Job) -> None:
    """Refuse to run on the accelerators of other runs."""
    import torch

    seen = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if job.accelerators and seen != len(job.accelerators):
        raise DistributedError(
            f"The run sees {seen} accelerators, expected {len(job.accelerators)} ({', '.join(job.accelerators)}). "
            "Check the driver (nvidia-smi), then repeat the command."
        )


def _train(job: Job) -> bool:
    """Train to the end, a signal or `stop_at`; returns whether the end was reached."""
    replace_text(job.place / RECIPE, _absolute(job.recipe).to_yaml())
    if len(job.accelerators) > 1:
        return _train_on_several(job)
    from mm_moslora.training.training_loop import train

    recipe = _as_trained(job)
    return train(recipe, stop_at=job.stop_at).finished


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
    from mm_moslora.launch.child_processes import python_words, run_and_hand_on
    from mm_moslora.launch.launcher import STATE

    command = [
        *python_words("-m", "torch.distributed.run"), "--standalone", f"--nproc_per_node={len(job.accelerators)}",
        "--no-python", *python_words("-u", "-m", "mm_moslora", "train"), str(job.place / RECIPE),
        *(["--stop-at", str(job.stop_at)] if job.stop_at else []),
    ]  # fmt: skip
    ended = run_and_hand_on(command, signals=[signal.SIGTERM])
    if ended.code == 0:
        return bool(read_json(job.place / STATE, below=job.place)["state"] == "finished")
    if ended.signals:
        return False
    raise MoSLoRAError(
        f"Training on {len(job.accelerators)} devices ended with code {ended.code}; see {job.place / LOG}."
    )


def _measured(job: Job) -> Outcome:
    summary = read_json(job.place / "summary.json", below=job.place)
    rows = metrics(job.place)
    losses = [row["loss"] for row in rows if "loss" in row]
    tenth = max(1, len(losses) // 10)
    held_out = [row["validation_loss"] for row in rows if "validation_loss" in row]
    validation = {LOSS: held_out[-1]} if held_out else {}
    test: dict[str, float] = {}
    places: dict[str, dict[str, str]] = {}
    wanted = job.settings.validation if job.cell.tuning else job.settings.tasks
    for name, score, found in _evaluate(job, [name for name in wanted if name != LOSS]):
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


def _evaluate(job: Job, names: list[str]) -> Iterator[tuple[str, float, dict[str, Path]]]:
    """Yield (name, score with its own pictures, sample folder by image mode) of every task."""
    if not names:
        return
    from mm_moslora_eval.backends.open_model import open_model
    from mm_moslora_eval.eval_commands import Bars
    from mm_moslora_eval.run.evaluate_suite import evaluate
    from mm_moslora_eval.run.task_runner import Settings as EvalSettings

    from mm_moslora.utils.distributed import seed_everything

    seed_everything(job.recipe.train.seed)  # a new projector is drawn, and replaced by the trained one
    model = open_model(str(job.place), precision=job.recipe.train.precision, features=job.feature_cache)
    place = job.place / "eval"
    settings = EvalSettings(
        batch_size=job.settings.batch_size, limit=job.settings.limit, max_new_tokens=job.settings.max_new_tokens,
        rank=0, world_size=1,
    )  # fmt: skip
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
    text = read_text_below(place, "metrics.jsonl") or ""  # not written yet, or moved aside by a fresh start of the run
    return parse_lines(text[: text.rfind("\n") + 1])
