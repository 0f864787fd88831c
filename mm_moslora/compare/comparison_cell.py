"""A run of a comparison: train, measure, record the outcome. `mm-moslora compare FOLDER --cell NAME` is its command.

Runs of a folder may be on several machines that share it. What is not finished continues; a run that is started twice
at once happens once.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import signal
import time
import traceback
from collections.abc import Iterator
from contextlib import chdir
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from mm_moslora.compare.comparison_plan import LOSS, Cell, ComparisonSettings, Outcome, recipe_hash
from mm_moslora.config import Recipe
from mm_moslora.config.recipe_keys import NO_NUMBERS
from mm_moslora.config.recipe_paths import absolute
from mm_moslora.utils.errors import ConfigError, DistributedError, DivergedError, MoSLoRAError
from mm_moslora.utils.file_locks import lock_file
from mm_moslora.utils.files import discard, mark, read_json, remove, replace_json, replace_text
from mm_moslora.utils.run_paths import MANIFEST, checkpoints
from mm_moslora.utils.text_format import visible
from mm_moslora.utils.untrusted_data import build_strictly, parse_lines
from mm_moslora.utils.untrusted_files import read_text_below

if TYPE_CHECKING:
    from mm_moslora_eval.protocol.task import Task
    from mm_moslora_eval.sources.source_images import ImageMode

logger = logging.getLogger(__name__)

OUTCOME, LOG, RECIPE, ORDER = "outcome.json", "log.txt", "recipe.yaml", "cell.json"
FEATURES = "features"
"""Folder of a frozen encoder's features in the comparison's."""


@dataclass(frozen=True, kw_only=True)
class CellRun:
    """The order for one run of a comparison, stored in the run's folder."""

    cell: Cell
    recipe: Recipe
    settings: ComparisonSettings
    folder: Path
    """Folder of the comparison."""
    cards: int = 0
    """Its accelerators; 0: one, where the process sees any."""
    keep_all: bool = False
    """Keep the checkpoints of a run that only chooses a rate."""
    start: Path = field(default_factory=Path.cwd)
    """Working folder in which the comparison was started; paths of tasks are relative to it."""

    def order(self) -> None:
        """Write the file that `read` reads."""
        plain = dataclasses.asdict(self) | {"recipe": _absolute(self.recipe).to_dict(), "folder": str(self.folder)}
        self.run_folder.mkdir(parents=True, exist_ok=True)
        replace_json(self.run_folder / ORDER, plain)

    @classmethod
    def read(cls, folder: Path, name: str) -> CellRun:
        """A run of a comparison's folder by its name; ConfigError where it is missing, damaged or another folder's."""
        folder = folder.resolve()
        planned = sorted(path.parent.name for path in folder.glob(f"runs/*/{ORDER}"))
        if name not in planned:
            raise ConfigError(
                f"{folder} has no run {name!r}. `mm-moslora compare RECIPE ... --output {folder}` plans runs; there "
                f"are {', '.join(planned) or 'none yet'}."
            )
        run_folder = folder / "runs" / name
        try:
            stored = read_json(run_folder / ORDER, below=folder)
            parts = {"recipe": Recipe.from_dict(stored["recipe"]), "folder": Path(stored["folder"])}
            parts |= {"start": Path(stored.get("start", "."))}
            run = build_strictly(cls, stored | parts, source="it")
        except (ConfigError, ValueError, TypeError, KeyError) as error:
            raise ConfigError(f"{run_folder / ORDER} is damaged ({error}). Repeat the comparison's command.") from error
        if (run.run_folder, run.folder) != (run_folder, folder):
            raise ConfigError(
                f"{run_folder / ORDER} is of {run.run_folder}. Repeat the comparison's command for this folder."
            )
        return run

    @property
    def run_folder(self) -> Path:
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


def read_outcome(run_folder: Path) -> Outcome | None:
    """The outcome of a run; None where it has not ended, ConfigError where its file is damaged."""
    file = run_folder / OUTCOME
    try:
        outcome = build_strictly(Outcome, _finite(read_json(file)), source="it")
        return dataclasses.replace(outcome, reason=visible(outcome.reason))
    except FileNotFoundError:
        return None
    except (ConfigError, ValueError) as error:
        raise ConfigError(f"{file} is damaged ({error}). Delete it to measure the run again, or restore it.") from error


@dataclass(frozen=True, kw_only=True)
class Damaged(Outcome):
    """Stands for an outcome that cannot be read: the run counts as failed, and its file is left alone."""


def known_outcome(run_folder: Path) -> Outcome | None:
    """As `read_outcome`, where a damaged file must not stop other runs."""
    try:
        return read_outcome(run_folder)
    except ConfigError as error:
        return Damaged(status="failed", reason=str(error))


def _finite(value: Any) -> Any:
    """Plain data without NaN and infinity; a score that is no number counts as not measured."""
    if not isinstance(value, dict):
        return value
    return {k: _finite(item) for k, item in value.items() if not isinstance(item, float) or math.isfinite(item)}


def write_outcome(run_folder: Path, outcome: Outcome) -> None:
    """Write the outcome of a run atomically."""
    run_folder.mkdir(parents=True, exist_ok=True)
    replace_json(run_folder / OUTCOME, dataclasses.asdict(outcome))


def require_same_recipe(run_folder: Path, outcome: Outcome, recipe: Recipe) -> None:
    """Refuse the outcome of another recipe. Keys that its recipe leaves out count with their defaults."""
    if outcome.recipe == recipe_hash(recipe):
        return
    file = run_folder / RECIPE
    text = read_text_below(run_folder, RECIPE)
    if text is None:
        raise ConfigError(
            f"{run_folder} was run with another recipe, and its {RECIPE} is missing. Choose another --output."
        )
    before = Recipe.from_yaml(text, source=str(file)).values(without=NO_NUMBERS)
    now = _absolute(recipe).values(without=NO_NUMBERS)
    changed = [key for key in sorted(before | now) if before.get(key) != now.get(key)]
    if changed:
        words = "; ".join(f"{key}: {before.get(key)!r} -> {now.get(key)!r}" for key in changed[:6])
        more = f" and {len(changed) - 6} more" if len(changed) > 6 else ""
        raise ConfigError(
            f"{run_folder} was run with another recipe ({words}{more}). Restore it, or choose another --output."
        )


def _absolute(recipe: Recipe) -> Recipe:
    """The recipe as it can be read from any folder."""
    return Recipe.from_dict(absolute(Recipe, recipe.to_dict()))


def run_cell(folder: Path, name: str, *, stop_at: int | None = None) -> bool:
    """Train and measure a run, or its first steps up to `stop_at`; whether it has ended. Failed ones are run again."""
    run = CellRun.read(folder, name)
    with lock_file(run.run_folder / ".cell.lock", wait=True), chdir(run.start):
        earlier = read_outcome(run.run_folder)
        if earlier is not None and earlier.status != "failed":
            require_same_recipe(run.run_folder, earlier, run.recipe)
            logger.info("%s has ended: %s.", name, earlier.status)
            return True
        discard(run.run_folder / OUTCOME)  # of a failure; if this start is killed, that is the reason
        outcome = _outcome(run, stop_at)
        if outcome is None:
            return stop_at is not None
        write_outcome(run.run_folder, dataclasses.replace(outcome, recipe=recipe_hash(run.recipe)))
        for _, checkpoint in checkpoints(run.run_folder) if run.cell.tuning and not run.keep_all else ():
            if (checkpoint / MANIFEST).is_file():
                remove(checkpoint, mark=MANIFEST)
    if outcome.status == "failed":
        raise MoSLoRAError(outcome.reason)
    return True


def _outcome(run: CellRun, stop_at: int | None) -> Outcome | None:
    try:
        return _run(run, time.monotonic(), stop_at)
    except DivergedError as error:
        return Outcome(status="diverged", reason=str(error))
    except MoSLoRAError as error:
        return Outcome(status="failed", reason=str(error))
    except Exception as error:  # the other runs continue
        logger.error("%s", traceback.format_exc())
        first = (str(error).strip().splitlines() or ["no message"])[0]
        return Outcome(status="failed", reason=f"{type(error).__name__}: {first}")


def _run(job: CellRun, started: float, stop_at: int | None) -> Outcome | None:
    _require_own_accelerators(job)
    if not _train(job, stop_at):
        return None
    return dataclasses.replace(_measured(job), total_seconds=time.monotonic() - started)


def _require_own_accelerators(job: CellRun) -> None:
    """Refuse to run on the accelerators of other runs."""
    import torch

    seen = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if job.cards and seen != job.cards:
        raise DistributedError(
            f"The run sees {seen} accelerators, expected {job.cards}. Where you start it by hand, name them in "
            "CUDA_VISIBLE_DEVICES; else check the driver (nvidia-smi). Then repeat the command."
        )


def _train(job: CellRun, stop_at: int | None) -> bool:
    """Train to the end, a signal or `stop_at`; returns whether the end was reached."""
    replace_text(job.run_folder / RECIPE, _absolute(job.recipe).to_yaml())
    if job.cards > 1:
        return _train_on_several(job, stop_at)
    from mm_moslora.training.training_loop import train

    return train(_as_trained(job), stop_at=stop_at).finished


def _as_trained(job: CellRun) -> Recipe:
    """The run's recipe without what an earlier run has done: the rehearsal, and features of pictures."""
    from mm_moslora.models.vision.feature_store import SHARED_GIB

    model, train = job.recipe.model, job.recipe.train
    ended = (known_outcome(file.parent) for file in job.folder.glob(f"runs/{job.cell.arm.slug}_lr*/{OUTCOME}"))
    if any(outcome is not None and outcome.status == "ok" for outcome in ended):
        train = dataclasses.replace(train, rehearsal=False)
    if job.feature_cache is not None and model.vision is not None and model.vision.feature_cache is None:
        job.feature_cache.mkdir(parents=True, exist_ok=True)
        mark(job.feature_cache, "features")
        vision = dataclasses.replace(model.vision, feature_cache=str(job.feature_cache), feature_cache_gib=SHARED_GIB)
        model = dataclasses.replace(model, vision=vision)
    return dataclasses.replace(job.recipe, model=model, train=train)


def _train_on_several(job: CellRun, stop_at: int | None) -> bool:
    from mm_moslora.launch.child_processes import python_words
    from mm_moslora.launch.imported_code import import_words
    from mm_moslora.launch.launcher import TORCHRUN, is_finished, run_tied

    command = [
        *python_words("-m", "torch.distributed.run"), "--standalone", f"--nproc_per_node={job.cards}",
        "--no-python", *python_words("-u", "-m", "mm_moslora", *import_words(), "train"), str(job.run_folder / RECIPE),
        *(["--stop-at", str(stop_at)] if stop_at else []),
    ]  # fmt: skip
    ended = run_tied(TORCHRUN, command, {}, signals=[signal.SIGTERM])
    if ended.code == 0:
        return is_finished(job.run_folder)
    if ended.signals:
        return False
    raise MoSLoRAError(f"Training on {job.cards} devices ended with code {ended.code}; see {job.run_folder / LOG}.")


def _measured(job: CellRun) -> Outcome:
    summary = read_json(job.run_folder / "summary.json")
    rows = metrics(job.run_folder)
    losses = [row["loss"] for row in rows if "loss" in row]
    tenth = max(1, len(losses) // 10)
    held_out = [row["validation_loss"] for row in rows if "validation_loss" in row]
    validation = {LOSS: held_out[-1]} if held_out else {}
    test: dict[str, float] = {}
    places: dict[str, dict[str, str]] = {}
    wanted = job.settings.validation if job.cell.tuning else job.settings.tasks
    for name, score, views in _evaluate(job, [name for name in wanted if name != LOSS]):
        if job.cell.tuning:
            validation[name] = score
        else:
            test[name] = score
            places[name] = {mode: view.relative_to(job.folder).as_posix() for mode, view in views.items()}
    return Outcome(
        status="ok", validation=validation, test=test, places=places,
        first_loss=sum(losses[:tenth]) / tenth if losses else None,
        last_loss=sum(losses[-tenth:]) / tenth if losses else None,
        trainable=sum(row["trainable"] for row in summary["components"]), steps=summary["steps"],
        step_seconds=median(row["step_seconds"] for row in rows if "step_seconds" in row),
        train_seconds=summary["counters"]["seconds"], memory_gib=summary["memory_gib"],
        processes=summary["world_size"],
    )  # fmt: skip


def _evaluate(job: CellRun, names: list[str]) -> Iterator[tuple[str, float, dict[str, Path]]]:
    """Yield (name, score with its own pictures, sample folder by image mode) of every task."""
    if not names:
        return
    from mm_moslora_eval.backends.open_model import open_model
    from mm_moslora_eval.eval_commands import Bars
    from mm_moslora_eval.run.evaluate_suite import evaluate
    from mm_moslora_eval.run.task_runner import EvaluationSettings

    from mm_moslora.utils.distributed import seed_everything

    seed_everything(job.recipe.train.seed)  # a new projector is drawn, and replaced by the trained one
    model = open_model(str(job.run_folder), precision=job.recipe.train.precision, features=job.feature_cache)
    output = job.run_folder / "eval"
    settings = EvaluationSettings(
        batch_size=job.settings.batch_size, limit=job.settings.limit, max_new_tokens=job.settings.max_new_tokens,
        rank=0, world_size=1,
    )  # fmt: skip
    try:
        for name in names:
            task = open_task(name, job.settings)
            modes = _modes(task) if job.settings.controls and not job.cell.tuning else ("own",)
            bars = partial(Bars(len(modes)), name)
            results = evaluate(model, task, output, modes=modes, settings=settings, progress=bars, baselines=())
            scores = {result.mode: result.score for result in results}
            yield name, scores["own"], {result.mode: output / result.folder for result in results}
    finally:
        model.close()


def _modes(task: Task) -> tuple[ImageMode, ...]:
    """All image modes for a task with at least two different pictures, else only its own."""
    from mm_moslora_eval.sources.source_images import MODES, Hasher

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


def open_task(name: str, settings: ComparisonSettings) -> Task:
    """A task by name, with the settings' answer length."""
    from mm_moslora_eval.protocol.task_registry import get_task

    task = get_task(name)
    if settings.max_new_tokens is None:
        return task
    decoding = dataclasses.replace(task.decoding, max_new_tokens=settings.max_new_tokens)
    return dataclasses.replace(task, decoding=decoding)


def metrics(run_folder: Path) -> list[dict[str, Any]]:
    """The rows of a run's metrics so far, without an incomplete last line."""
    # The file may not be written yet, or a fresh start of the run has moved it aside.
    text = read_text_below(run_folder, "metrics.jsonl") or ""
    return parse_lines(text[: text.rfind("\n") + 1])
