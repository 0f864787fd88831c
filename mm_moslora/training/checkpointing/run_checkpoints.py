"""The checkpoints of a run: the one to resume from, the best one, renaming of others, deletion of old ones."""

from __future__ import annotations

import logging
import math
import re
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mm_moslora.config import Recipe, ValidateConfig, YamlRecipe
from mm_moslora.config.recipe_keys import facts_at, leaves
from mm_moslora.models.model_paths import CONTENTS, same_parts
from mm_moslora.models.precision import resolve_precision
from mm_moslora.training.checkpointing.checkpoint_folder import (
    Manifest,
    OtherFormatError,
    parse_manifest,
    read_manifest,
)
from mm_moslora.training.supervision.run_folder import refuse_resume
from mm_moslora.utils import distributed, files, folder_marks
from mm_moslora.utils.errors import CheckpointError, ConfigError, TrainingError, suggestion
from mm_moslora.utils.run_paths import MANIFEST, checkpoints, is_adapter, projector_file, resume_folder

logger = logging.getLogger(__name__)

BEST = "best.json"


def newest_valid(run: Path) -> tuple[Path, Manifest] | None:
    """The newest valid checkpoint of a run; newer ones that are damaged are renamed to `*.corrupt`, if one is valid."""
    damaged: list[tuple[Path, CheckpointError]] = []
    for _, folder in reversed(checkpoints(run)):
        try:
            manifest = read_manifest(folder)
        except OtherFormatError:
            raise
        except CheckpointError as error:
            damaged.append((folder, error))
            continue
        for other, reason in damaged:
            aside = files.set_aside(other, "corrupt")
            logger.warning("Skipped a damaged checkpoint, now %s: %s", aside.name, reason)
        return folder, manifest
    if damaged:
        raise CheckpointError(
            f"All {len(damaged)} checkpoints in {run} are damaged; the newest: {damaged[0][1]} Restore one of them, or "
            "start again in another folder (train.output)."
        )
    if names := sorted(path.name for path in run.glob("checkpoint-*")):
        raise CheckpointError(
            f"{run} holds no checkpoint to resume from, but {', '.join(names[:5])}, which was damaged, put aside or "
            "made by another program. Restore it under its own name, choose another train.output, or start from step 0 "
            "beside it with --resume never."
        )
    return None


def set_aside_newer(run: Path, step: int) -> None:
    """Rename a run's checkpoints that are newer than the step it resumes from to `*.superseded`."""
    # Otherwise the next start would resume from the newest of them, and retention would delete the new checkpoints
    # first.
    for number, folder in checkpoints(run):
        if number > step:
            aside = files.set_aside(folder, "superseded")
            logger.warning("%s is newer than step %d, from which the run resumes; now %s.", folder, step, aside.name)


@dataclass(frozen=True, kw_only=True)
class Retention:
    """The retention policy."""

    last: int = 2
    """Number of newest checkpoints to keep; 0 keeps all."""
    every: int = 0
    """Also keep steps that are a multiple of this; 0: none."""
    best: str | None = None
    """Also keep the checkpoint of this name."""

    def superfluous(self, present: Sequence[tuple[int, Path]]) -> list[Path]:
        """The checkpoints that may be deleted, oldest first."""
        if self.last < 1:
            return []
        return [
            folder
            for step, folder in present[: -self.last]
            if not (self.every and step % self.every == 0) and folder.name != self.best
        ]


def remove_old(run: Path, retention: Retention) -> None:
    """Delete checkpoints outside the retention policy, oldest first, after the newest has been verified."""
    present = checkpoints(run)
    superfluous = retention.superfluous(present)
    if superfluous:
        read_manifest(present[-1][1])
    for folder in superfluous:
        if reason := _why_kept(folder):
            logger.warning("%s would be deleted by train.keep_last, but %s; it is kept.", folder, reason)
            continue
        trash = folder.with_name(f".trash-{folder.name}")
        files.remove(trash, mark=MANIFEST)
        files.rename(folder, trash)
        files.remove(trash, mark=MANIFEST)


def _why_kept(folder: Path) -> str | None:
    """Why an old checkpoint must not be deleted; None where it may be."""
    present = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()}
    if not present:  # the rest of a deletion that a power loss interrupted
        return None
    try:
        manifest = parse_manifest(folder / MANIFEST)
    except CheckpointError as error:
        return str(error)
    strangers = sorted(present - {MANIFEST, folder_marks.MARK, *manifest.files})
    return f"it holds files that are not in its manifest ({', '.join(strangers[:3])})" if strangers else None


class Tidier:
    """Deletes old checkpoints of a run folder in a thread, one policy at a time."""

    def __init__(self, run: Path) -> None:
        self.run = run
        self._thread: threading.Thread | None = None

    def start(self, retention: Retention) -> None:
        """Apply a retention policy, after an earlier one."""
        self.wait()
        self._thread = threading.Thread(target=self._work, args=(retention,), name="retention", daemon=True)
        self._thread.start()

    def _work(self, retention: Retention) -> None:
        try:
            remove_old(self.run, retention)
        except (OSError, CheckpointError, ConfigError) as error:
            logger.warning("No old checkpoint was deleted: %s", error)

    def wait(self) -> None:
        """Wait until nothing is being deleted."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None


def lower_is_better(metric: str, choice: str) -> bool:
    """Whether a smaller value of a metric is better."""
    if choice != "auto":
        return choice == "lowest"
    words = re.split(r"[^a-z]+", metric.rsplit("/", 1)[-1].lower())
    return not {"loss", "perplexity", "ppl", "error", "wer"}.isdisjoint(words)


@dataclass(kw_only=True)
class Best:
    """The best value so far, stored in `best.json` in the run folder, and the number of validations since."""

    config: ValidateConfig = field(default_factory=ValidateConfig)
    value: float = math.nan
    step: int = -1
    since: int = 0
    """Consecutive validations without improvement."""
    history: list[dict[str, float]] = field(default_factory=list)
    """Step and value of every validation."""

    @classmethod
    def of(cls, folder: Path, config: ValidateConfig, *, resume_step: int) -> Best:
        """Earlier values of this metric, up to the step that the run resumes from."""
        best = cls(config=config)
        try:
            stored = files.read_json(folder / BEST)
            history = [(int(entry["step"]), float(entry["value"])) for entry in stored["history"]]
        except FileNotFoundError:
            return best
        except (OSError, ValueError, LookupError, TypeError) as error:
            logger.warning("%s is damaged (%s); earlier validations are forgotten.", folder / BEST, error)
            return best
        if config.best is not None and stored.get("metric") == config.best:
            for step, value in history:
                if step <= resume_step:
                    best.update({config.best: value}, step)
        return best

    def update(self, metrics: Mapping[str, float], step: int) -> bool:
        """Add a validation; True when it is the best so far. TrainingError where the metric was not measured."""
        name = self.config.best
        if name is None:
            return False
        if name not in metrics and not self.history:  # a later value may be NaN, which is left out
            raise TrainingError(
                f"validate.best is {name!r}, which was not measured; expected one of {sorted(metrics)}."
                f"{suggestion(name, metrics)}"
            )
        value = metrics.get(name, math.nan)
        self.history.append({"step": step, "value": value})
        sign = -1 if lower_is_better(name, self.config.best_is) else 1
        if math.isfinite(value) and not (math.isfinite(self.value) and sign * value <= sign * self.value):
            self.value, self.step, self.since = value, step, 0
            return True
        self.since += 1
        return False

    @property
    def out_of_patience(self) -> bool:
        """Whether the run should stop."""
        return 0 < self.config.patience <= self.since

    def among(self, steps: Collection[int]) -> int | None:
        """The best measured step that has a checkpoint: a save may have failed, or be in progress."""
        measured = Best(config=self.config)
        for entry in self.history:
            if entry["step"] in steps:
                measured.update({self.config.best or "": entry["value"]}, int(entry["step"]))
        return None if measured.step < 0 else measured.step

    def write(self, folder: Path, checkpoint: str | None) -> None:
        """Store it for people and for a resumed run, and link `best` to its checkpoint."""
        content: dict[str, Any] = {
            "metric": self.config.best, "value": self.value, "step": self.step, "checkpoint": checkpoint,
            "history": self.history,
        }  # fmt: skip
        try:
            files.replace_json(folder / BEST, content)
        except OSError as error:  # a full disk must not end the run; the next validation writes it again
            logger.warning("%s is not written: %s", folder / BEST, error)
        if checkpoint is not None:
            try:
                files.replace_link(folder / "best", checkpoint)
            except OSError as error:
                logger.debug("%s has no link to the best checkpoint: %s", folder, error)


@dataclass(frozen=True, kw_only=True)
class Changes:
    """Differences between a recipe and the recipe of a checkpoint, as `key: old -> new`."""

    other_run: tuple[str, ...]
    """Keys that change the computation."""
    rounding: tuple[str, ...]
    """Keys that change the order of summation only."""


def changed_keys(
    kind: type[YamlRecipe], before: Mapping[str, Any], after: Mapping[str, Any], *, moved: Collection[str] = ()
) -> Changes:
    """Compare two resolved recipes of a kind; `moved` are path keys that lead to the same contents."""
    old, new = leaves(before), leaves(after)
    changed: dict[str, list[str]] = {"": [], "rounding": [], "free": []}
    for key in sorted(old.keys() | new.keys()):
        if old.get(key) != new.get(key) and key not in moved:
            changed[facts_at(kind, key).get("resume", "")].append(f"{key}: {old.get(key)!r} -> {new.get(key)!r}")
    return Changes(other_run=tuple(changed[""]), rounding=tuple(changed["rounding"]))


def find_resume(recipe: Recipe, resume: str) -> tuple[Path, Manifest] | None:
    """The checkpoint that `auto`, `required`, `never` or a folder stands for, the same on every rank."""
    return choose_checkpoint(
        Path(recipe.train.output), resume, lambda folder, manifest: _check_same_run(folder, manifest, recipe)
    )


def choose_checkpoint(run: Path, resume: str, check: Callable[[Path, Manifest], None]) -> tuple[Path, Manifest] | None:
    """The checkpoint that rank 0 chooses in a run folder, once `check` takes it; see `find_resume`."""
    choice: str | None = None
    with distributed.failing_together("Looking for a checkpoint"):
        if distributed.is_main():
            refuse_resume(run, resume)
            chosen: tuple[Path, Manifest] | None = None
            if folder := resume_folder(resume):
                chosen = folder, read_manifest(folder)
            elif resume != "never":
                chosen = newest_valid(run)
            if chosen is not None:
                choice = str(chosen[0])
                check(*chosen)
    choice = distributed.from_main(choice)
    if choice is None:
        return None
    with distributed.failing_together("Reading the checkpoint"):
        return Path(choice), read_manifest(Path(choice), verify=False)


def _check_same_run(folder: Path, manifest: Manifest, recipe: Recipe) -> None:
    changes = _changes(manifest, recipe)
    if changes.other_run:
        raise CheckpointError(
            f"{folder} belongs to another run: {len(changes.other_run)} recipe keys differ "
            f"({'; '.join(changes.other_run[:6])}). Restore them, or choose another train.output. To train longer or "
            f"otherwise from these weights, choose another train.output and give {_weights_of(folder, recipe)}."
        )
    world = distributed.world_size()
    differences = list(changes.rounding)
    if (precision := resolve_precision(recipe.train.precision)) != (manifest.precision or precision):
        differences.append(f"precision on this machine: {manifest.precision} -> {precision}")
    if manifest.world_size != world:
        differences.insert(0, f"ranks: {manifest.world_size} -> {world}")
    if differences:
        logger.info(
            "%s was written with other settings (%s): the same samples follow in the same order and the numbers agree "
            "to rounding, but not bit for bit; dropout masks differ where the ranks or the micro-batches do.",
            folder.name, "; ".join(differences),
        )  # fmt: skip


def _changes(manifest: Manifest, recipe: Recipe) -> Changes:
    same = same_parts(recipe.model, manifest.base.get(CONTENTS, {}))
    recipe = continued(recipe, manifest)
    return changed_keys(Recipe, manifest.recipe, recipe.to_dict(), moved=same)


def continued(recipe: Recipe, manifest: Manifest) -> Recipe:
    """A recipe with the choices of a checkpoint where it says `auto`: `train.zero` and `model.thinking`."""
    before = manifest.recipe
    if recipe.model.thinking == "auto" and (chosen := before.get("model", {}).get("thinking")):
        recipe = replace(recipe, model=replace(recipe.model, thinking=chosen))
    return recipe.for_ranks(distributed.world_size(), before=str(before.get("train", {}).get("zero", "zero2")))


def _weights_of(checkpoint: Path, recipe: Recipe) -> str:
    """Overrides with which another run starts from the weights of a checkpoint."""
    words = [f"--adapter.weights {checkpoint}"] if is_adapter(checkpoint) else []
    if recipe.model.vlm is None and projector_file(checkpoint).is_file():
        words.append(f"--model.projector.weights {checkpoint}")
    return " ".join(words) or "the exported model as model.language or model.vlm"
