"""DeepSpeed's settings as files: the shipped presets by name, and a user's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mm_moslora.utils.errors import ConfigError, suggestion
from mm_moslora.utils.files import read_json
from mm_moslora.utils.run_paths import shipped_folder


def read_preset(name: str) -> dict[str, Any]:
    """The settings that `train.zero` names.

    Args:
        name: of a preset, or a path that ends in `.json`.

    Raises:
        ConfigError: no such preset or file, or it holds something else than settings.
    """
    path = _file(name)
    try:
        settings: dict[str, Any] = read_json(path)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"train.zero is {name!r}, which is no JSON object of DeepSpeed's settings ({error})."
        ) from error
    zero = settings.get("zero_optimization", {})
    if not isinstance(zero, dict):
        raise ConfigError(f"train.zero {name}: zero_optimization is {zero!r}, expected a group of keys.")
    return settings


def stage_name(zero: str) -> str:
    """`none`, or `zero0` to `zero3`, with `_offload` where the optimiser's state is in main memory.

    Args:
        zero: the recipe's `train.zero`.

    Raises:
        ConfigError: as `read_preset`.
    """
    if zero == "none":
        return zero
    settings = read_preset(zero).get("zero_optimization", {})
    offload = settings.get("offload_optimizer")
    offloads = isinstance(offload, dict) and offload.get("device", "none") != "none"
    return f"zero{settings.get('stage', 0)}{'_offload' if offloads else ''}"


def _file(name: str) -> Path:
    path = Path(name)
    if path.suffix == ".json":
        if not path.is_file():
            raise ConfigError(f"train.zero is {name!r}, which does not exist.")
        return path
    folder = shipped_folder("deepspeed_configs")
    if (folder / f"{name}.json").is_file():
        return folder / f"{name}.json"
    known = sorted({file.stem for file in folder.glob("*.json")} | {"auto", "none"})
    raise ConfigError(f"train.zero is {name!r}, expected {', '.join(known)} or a JSON file.{suggestion(name, known)}")
