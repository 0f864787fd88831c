"""DeepSpeed's start on this machine; its settings from a preset or file and the recipe, and whether it can run them."""

from __future__ import annotations

import difflib
import logging
import os
from collections.abc import Iterable, Iterator, KeysView, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from mm_moslora.config import TrainConfig
from mm_moslora.training.deepspeed_presets import fill_zero, read_preset, wants_cpu_adam
from mm_moslora.training.parameter_groups import ParameterGroup
from mm_moslora.utils import distributed
from mm_moslora.utils.errors import ConfigError
from mm_moslora.utils.hardware import extensions_folder, stale_locks
from mm_moslora.utils.package_requirements import install_command
from mm_moslora.utils.run_paths import shipped_folder

logger = logging.getLogger(__name__)

NVME_FOLDER = "MM_MOSLORA_NVME"
"""Variable with the folder of a fast local disk, for presets that swap weights."""


def deepspeed_config(
    train: TrainConfig, precision: str, max_grad_norm: float, *, largest_adapter: int = 0, trains_here: bool = True
) -> dict[str, Any]:
    """A preset or file with the values of the recipe; ZeRO-3 leaves weights of `largest_adapter` elements whole."""
    config = read_preset(train.zero)
    world = distributed.world_size()
    filled = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": max(1, train.global_batch // (train.micro_batch * world)),
        # These two changed their defaults in 0.19.3, so they are always written.
        "gradient_clipping": max_grad_norm,
        "bf16": {"enabled": precision == "bf16", "check_grad_overflow": True},
        "fp16": {"enabled": precision == "fp16"},
        "steps_per_print": 10**9,
    }
    for key, value in filled.items():
        of_file = config.get(key, "auto")
        if isinstance(value, dict):
            merged = dict(of_file) if isinstance(of_file, dict) else {}
            merged.update({name: item for name, item in value.items() if merged.get(name, "auto") == "auto"})
            if merged["enabled"] != value["enabled"]:
                raise ConfigError(
                    f"{train.zero}: {key}.enabled is {merged['enabled']}, but train.precision is {precision}. "
                    'Write "auto" in the DeepSpeed file or change train.precision.'
                )
            config[key] = merged
        elif of_file == "auto" or key == "train_micro_batch_size_per_gpu":
            config[key] = value
    zero = config.get("zero_optimization", {})
    swapped = zero.get("offload_param")
    if trains_here and isinstance(swapped, dict) and swapped.get("nvme_path") == "auto":
        swapped["nvme_path"] = nvme_folder()
    fill_zero(zero, largest_adapter=largest_adapter, ranks_of_host=distributed.ranks_of_host())
    config.pop("train_batch_size", None)
    config.setdefault("timers", {"throughput": {"enabled": False}})  # it waits for the device in every forward pass
    config.setdefault("zero_allow_untested_optimizer", True)
    config.setdefault("zero_force_ds_cpu_optimizer", False)
    unused = [key for key in ("optimizer", "scheduler") if config.pop(key, None) is not None]
    if unused and distributed.is_main():
        logger.warning("%s: %s left out, since the recipe decides (optim).", train.zero, " and ".join(unused))
    return config


def nvme_folder() -> str:
    """The folder of `MM_MOSLORA_NVME`, where weights are swapped to; ConfigError where it is not set or no folder."""
    folder = os.environ.get(NVME_FOLDER, "")
    if not folder or not os.path.isdir(folder):
        fault = f"is {folder!r}, which is no folder" if folder else "is not set"
        raise ConfigError(f"{NVME_FOLDER} {fault}. Set it to a folder on a fast local disk of every host.")
    return folder


def check_operators(config: Mapping[str, Any], zero: str) -> None:
    """Refuse settings whose operators of DeepSpeed cannot run or be built here."""
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    settings = config.get("zero_optimization", {})
    devices = {(settings.get(group) or {}).get("device") for group in ("offload_param", "offload_optimizer")}
    quantises = any(value is True for key, value in settings.items() if key.startswith("zero_quantized_"))
    needed = [
        (quantises, "QuantizerBuilder", "NVIDIA GPUs and a CUDA compiler (nvcc)"),
        ("nvme" in devices, "AsyncIOBuilder", "libaio (Debian: apt-get install libaio-dev) and NVIDIA GPUs"),
        (wants_cpu_adam(config), "CPUAdamBuilder", "a C++ compiler and ninja"),
    ]
    for wanted, name, needs in needed:
        if not wanted:
            continue
        builder = accelerator.create_op_builder(name)
        if builder is None or type(builder).__name__ != name or not builder.is_compatible(verbose=False):
            raise ConfigError(
                f"train.zero {zero} needs DeepSpeed's operator {name.removesuffix('Builder')}, which cannot be built "
                f"here (device {accelerator.device_name()}). It needs {needs}. Choose another train.zero."
            )


def check_settings(config: dict[str, Any], zero: str) -> None:
    """Have DeepSpeed read the settings of a user's file, so that it refuses them before a model is loaded."""
    # Outside its groups DeepSpeed ignores unknown keys.
    import deepspeed

    settings = _ReadKeys(config)
    try:
        deepspeed.DeepSpeedConfig(settings)
    except Exception as error:
        raise deepspeed_refuses(zero, error) from error
    for key in [key for key in config if key not in settings.read_keys]:
        if close := difflib.get_close_matches(key, settings.read_keys, n=1, cutoff=0.8):
            raise ConfigError(f"train.zero {zero}: DeepSpeed knows no key {key!r}. Did you mean {close[0]!r}?")
        if distributed.is_main():
            logger.warning("train.zero %s: DeepSpeed knows no key %r and ignores it.", zero, key)


def deepspeed_refuses(zero: str, error: Exception) -> ConfigError:
    """The error for a file that DeepSpeed refuses."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return ConfigError(
        f"DeepSpeed refuses train.zero {zero}: {' '.join(line.strip() for line in lines[:3])}. "
        f"{shipped_folder('deepspeed_configs')} has files to begin with."
    )


class _ReadKeys(dict[str, Any]):
    """Settings that record the keys that are read, also in copies of them."""

    def __init__(self, content: Mapping[str, Any]) -> None:
        super().__init__(content)
        self.read_keys: set[str] = set()

    def get(self, key: str, default: Any = None) -> Any:
        self.read_keys.add(key)
        return super().get(key, default)

    def __getitem__(self, key: str) -> Any:
        self.read_keys.add(key)
        return super().__getitem__(key)

    def __contains__(self, key: object) -> bool:
        self.read_keys.add(str(key))
        return super().__contains__(key)

    def keys(self) -> Any:
        return KeysView(self)  # its `in` calls `__contains__`


def largest_adapter(groups: Iterable[ParameterGroup]) -> int:
    """Elements of the largest A, B or mixer among the trained parameters; 0 without adapters."""
    members = (pair for group in groups for pair in zip(group.names, group.parameters, strict=True))
    return max((parameter.numel() for name, parameter in members if "lora_" in name), default=0)


def import_deepspeed(zero: str) -> None:
    """Import DeepSpeed for the device of this machine; ConfigError where it does not import."""
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    os.environ.setdefault("DS_SKIP_CUDA_CHECK", "1")
    os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(extensions_folder(os.environ)))
    os.environ.setdefault("LOCAL_RANK", str(distributed.local_rank()))  # DeepSpeed requires it
    try:
        import deepspeed  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"train.zero is {zero!r}, but deepspeed does not import ({error}). Install it "
            f"({install_command('deepspeed')}), or run one process with train.zero none."
        ) from error


def prepare_deepspeed(zero: str) -> None:
    """Start DeepSpeed, also on a machine without a compiler; ConfigError where it does not import."""
    import_deepspeed(zero)
    import deepspeed.comm as comm

    warn_of_stale_locks()
    if os.environ["DS_ACCELERATOR"] == "cpu":
        skip_shared_memory_operator()
    comm.init_distributed(dist_backend=None, verbose=False)


def warn_of_stale_locks() -> None:
    """Warn of the locks that killed builds leave: a process that needs the same operator waits for them silently."""
    folder = extensions_folder(os.environ)
    locks = stale_locks(folder) if folder.is_dir() and distributed.local_rank() == 0 else []
    if locks:
        logger.warning(
            "A killed build left %s. If an operator must be built, this run will wait for ever; when nothing is being "
            "built now: rm %s",
            ", ".join(map(str, locks)), " ".join(map(str, locks)),
        )  # fmt: skip


def skip_shared_memory_operator() -> None:
    """On CPUs: leave out an operator that only inference uses. It takes minutes to build, and needs ninja."""
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


@contextmanager
def fresh_accelerate() -> Iterator[None]:
    """accelerate's state of this process, new within the block and new behind it."""
    # Behind a run on ZeRO a Trainer would train with DeepSpeed, and behind one on ZeRO-3 transformers would load models
    # in shards.
    from accelerate.state import AcceleratorState
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    def forget() -> None:
        AcceleratorState._reset_state(reset_partial_state=True)
        os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)
        unset_hf_deepspeed_config()

    forget()
    try:
        yield
    finally:
        forget()
