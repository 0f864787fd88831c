"""The start of DeepSpeed on this machine."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from mm_moslora.utils import distributed
from mm_moslora.utils.errors import ConfigError
from mm_moslora.utils.hardware import extensions_folder, stale_locks
from mm_moslora.utils.package_requirements import install_command

logger = logging.getLogger(__name__)


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
