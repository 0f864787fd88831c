"""DeepSpeed's settings as files: the shipped presets by name, and a user's own."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mm_moslora.utils.errors import ConfigError, suggestion
from mm_moslora.utils.files import read_json
from mm_moslora.utils.run_paths import shipped_folder

PERSISTENT = 1_000_000
"""Elements up to which ZeRO-3 leaves weights whole on every rank, where adapters are no larger."""
_PERSISTENCE, _SECONDARY = "stage3_param_persistence_threshold", "zero_hpz_partition_size"
DEFAULTS = {
    "stage": 0, "reduce_bucket_size": 500_000_000, "allgather_bucket_size": 500_000_000,
    "stage3_max_live_parameters": 1_000_000_000, _PERSISTENCE: 100_000, _SECONDARY: 1,
}  # fmt: skip
"""DeepSpeed's own for missing keys."""


def read_preset(name: str) -> dict[str, Any]:
    """The settings that `train.zero` names, a preset or a path that ends in `.json`; else ConfigError."""
    path = _file(name)
    try:
        settings: dict[str, Any] = read_json(path, linked=True)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"train.zero is {name!r}, which is no JSON object of DeepSpeed's settings ({error})."
        ) from error
    zero = settings.get("zero_optimization", {})
    if not isinstance(zero, dict):
        raise ConfigError(f"train.zero {name}: zero_optimization is {zero!r}, expected a group of keys.")
    groups = {key: settings.get(key) for key in ("bf16", "fp16")}
    groups |= {f"zero_optimization.{key}": zero.get(key) for key in ("offload_param", "offload_optimizer")}
    for key, group in groups.items():
        if not isinstance(group, dict) and group not in (None, "auto"):
            raise ConfigError(f"train.zero {name}: {key} is {group!r}, expected a group of keys.")
    if "stage" in zero:
        zero["stage"] = _stage(zero["stage"], name)
    return settings


def stage_of(name: str) -> int:
    """The ZeRO stage that `train.zero` names; 0 for plain torch and where it is chosen at the start (stage 1 or 2)."""
    return 0 if name in ("none", "auto") else int(read_preset(name).get("zero_optimization", {}).get("stage", 0))


def _stage(value: object, name: str) -> int:
    """The stage as a number; DeepSpeed takes `"3"` and `3.0`, too."""
    stages = {str(stage): stage for stage in range(4)}
    text = str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)
    if text not in stages:
        raise ConfigError(f"train.zero {name}: zero_optimization.stage is {value!r}, expected 0 to 3.")
    return stages[text]


def fill_zero(zero: dict[str, Any], *, largest_adapter: int, ranks_of_host: int) -> None:
    """Put values in the place of "auto" in `zero_optimization`; DeepSpeed's default is that of other keys."""
    if zero.get("stage") == 3:
        zero.setdefault(_PERSISTENCE, "auto")
    filled = {_PERSISTENCE: max(PERSISTENT, largest_adapter), _SECONDARY: ranks_of_host}
    zero.update({key: value for key, value in filled.items() if zero.get(key) == "auto"})
    for group in (zero, *(value for value in zero.values() if isinstance(value, dict))):
        for key in [key for key, value in group.items() if value == "auto"]:
            del group[key]


@dataclass(frozen=True, kw_only=True)
class ZeroSettings:
    """What decides how much memory a rank needs, of the settings that DeepSpeed gets; sizes are in elements."""

    stage: int
    reduce_buffers: int
    """Buckets in which gradients are reduced."""
    reduce_bucket: int
    """Size of one."""
    is_contiguous: bool
    """Whether a bucket takes its whole size, also where fewer gradients are in it."""
    allgather_bucket: int
    live: int
    """ZeRO-3: weights that stay gathered."""
    persistent: int
    """ZeRO-3: weights up to this size stay whole on every rank."""
    secondary: int
    """ZeRO-3: ranks of a host among which a second copy of all weights is divided; 1: there is none."""
    frozen_in_bytes: bool
    """ZeRO-3: whether frozen weights are stored in 8 bits."""
    parameters_off: str
    """ZeRO-3: where weights are instead of on the GPU, `cpu` (main memory) or `nvme`; empty: they are there."""
    optimizer_off: float
    """Share of the optimiser's state in main memory."""

    @classmethod
    def of(cls, name: str, *, world: int, ranks_of_host: int, largest_adapter: int) -> ZeroSettings:
        """The settings that `train.zero` names, with DeepSpeed's defaults for missing keys."""
        zero = read_preset(name).get("zero_optimization", {})
        fill_zero(zero, largest_adapter=largest_adapter, ranks_of_host=ranks_of_host)

        def number(key: str) -> int:
            value = zero.get(key, DEFAULTS[key])
            value = int(value) if isinstance(value, str) and value.isdecimal() else value  # as DeepSpeed reads it
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
                raise ConfigError(f"train.zero {name}: zero_optimization.{key} is {value!r}, expected a number.")
            return int(value)

        stage = number("stage")
        overlaps = zero.get("overlap_comm")
        offload = zero.get("offload_optimizer")
        share = offload.get("ratio", 1.0) if isinstance(offload, dict) and stage == 3 else 1.0
        if not isinstance(share, int | float) or not 0 <= share <= 1:
            raise ConfigError(f"train.zero {name}: offload_optimizer.ratio is {share!r}, expected a share from 0 to 1.")
        return cls(
            stage=stage,
            # ZeRO-3 has one bucket and the part of it that is reduced.
            reduce_buffers=2 if stage == 3 or (stage and overlaps) else 1,
            reduce_bucket=number("reduce_bucket_size"),
            is_contiguous=bool(stage and zero.get("contiguous_gradients", True)),
            allgather_bucket=number("allgather_bucket_size") if stage in (1, 2) else 0,
            live=number("stage3_max_live_parameters"),
            persistent=number(_PERSISTENCE),
            secondary=max(1, min(number(_SECONDARY), world)) if stage == 3 else 1,
            frozen_in_bytes=stage == 3 and zero.get("zero_quantized_nontrainable_weights") is True,
            parameters_off=_offload_device(zero, "offload_param") if stage == 3 else "",
            optimizer_off=share if stage and _offload_device(zero, "offload_optimizer") else 0.0,
        )


def wants_cpu_adam(config: Mapping[str, Any]) -> bool:
    """Whether DeepSpeed's compiled AdamW steps the parameters that are offloaded to main memory."""
    offload = config.get("zero_optimization", {}).get("offload_optimizer")
    offloads = isinstance(offload, dict) and offload.get("device", "none") != "none"
    return offloads and config.get("zero_force_ds_cpu_optimizer") is True


def _offload_device(zero: dict[str, Any], group: str) -> str:
    """The device to which a group offloads; empty for none."""
    settings = zero.get(group)
    device = settings.get("device") if isinstance(settings, dict) else None
    return "" if device in (None, "none") else str(device)


def _file(name: str) -> Path:
    path = Path(name)
    if path.suffix == ".json":
        if not path.is_file():
            raise ConfigError(f"train.zero is {name!r}, which does not exist.")
        return path
    folder = shipped_folder("deepspeed_configs")
    if (folder / f"{name}.json").is_file():
        return folder / f"{name}.json"
    names = sorted({file.stem for file in folder.glob("*.json")} | {"auto", "none"})
    raise ConfigError(f"train.zero is {name!r}, expected {', '.join(names)} or a JSON file.{suggestion(name, names)}")
