"""Optional packages that the settings of a recipe need."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from mm_moslora.config.recipe import Recipe
from mm_moslora.config.run_config import OPTIMIZERS
from mm_moslora.utils.errors import ConfigError
from mm_moslora.utils.package_requirements import install_command, is_installed


class Need(NamedTuple):
    """A package, and the setting that needs it."""

    package: str
    """Name of the distribution."""
    module: str
    setting: str
    """In the form of an override: `train.zero zero2`."""


def needs(recipe: Recipe) -> list[Need]:
    """The optional packages that training with these settings needs, found without loading or fetching anything."""
    return [Need(*need) for need in _needs(recipe)]


def _needs(recipe: Recipe) -> Iterator[tuple[str, str, str]]:
    zero = recipe.train.zero
    if recipe.objective != "sft":
        yield "trl", "trl", f"objective {recipe.objective}"
    if zero != "none" and (recipe.objective == "sft" or zero != "auto"):
        yield "deepspeed", "deepspeed", f"train.zero {zero}"
    for tracker in recipe.track.trackers:
        yield tracker, tracker, f"track.trackers {tracker}"
    if recipe.model.quantisation != "none":
        yield "bitsandbytes", "bitsandbytes", f"model.quantisation {recipe.model.quantisation}"
    optimizer = OPTIMIZERS[recipe.optim.optimizer]
    if optimizer.package:
        yield optimizer.package, optimizer.package, f"optim.optimizer {recipe.optim.optimizer}"
    if recipe.model.kernels == "liger":
        yield "liger-kernel", "liger_kernel", "model.kernels liger"
    vision = recipe.model.vision
    for name in (vision.name or "", vision.fuse_with or "") if vision else ():
        if name.startswith("open_clip:"):
            yield "open-clip-torch", "open_clip", f"model.vision {name}"
        if name.startswith("timm"):
            yield "timm", "timm", f"model.vision {name}"
    for source in (*recipe.data.train, *recipe.data.validation):
        path = source.path.lower()
        tables = path.startswith("hf:") or path.endswith((".parquet", ".arrow")) or Path(source.path).is_dir()
        if source.format == "table" or (source.format == "auto" and tables):
            yield "datasets", "datasets", f"data source {source.path}"


def refuse_lacking(recipe: Recipe) -> None:
    """Refuse settings that need a package which is not installed."""
    for need in needs(recipe):
        if not is_installed(need.module):
            raise ConfigError(
                f"{need.setting} needs {need.package}, which is not installed. "
                f"Run: {install_command(need.package)}{_or_without(need)}"
            )


def _or_without(need: Need) -> str:
    """An alternative setting that does not need the package."""
    if need.package == "deepspeed":
        return ", or run one process with --train.zero none"
    if need.setting.startswith("track.trackers"):
        return ", or leave it out (track.trackers: [] writes metrics.jsonl alone)"
    return ""
