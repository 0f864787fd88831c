"""The checkpoint that a run resumes from: the choice, and the check that it belongs to the run."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mm_moslora.config import Recipe, YamlRecipe
from mm_moslora.config.recipe_keys import facts_at, leaves
from mm_moslora.models.model_paths import CONTENTS, same_parts
from mm_moslora.models.precision import resolve_precision
from mm_moslora.training.checkpointing.checkpoint_folder import Manifest, read_manifest
from mm_moslora.training.checkpointing.run_checkpoints import newest_valid
from mm_moslora.training.supervision.run_folder import refuse_resume
from mm_moslora.utils import distributed
from mm_moslora.utils.errors import CheckpointError
from mm_moslora.utils.run_paths import is_adapter, projector_file, resume_folder

logger = logging.getLogger(__name__)


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
