"""The machine: its description for measurements, memory settings of the process, folder of compiled extensions."""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path

CPUINFO, MEMINFO, SHARED_MEMORY = Path("/proc/cpuinfo"), Path("/proc/meminfo"), Path("/dev/shm")  # noqa: S108  (read only)
CGROUP = Path("/sys/fs/cgroup")
ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
"""Variables that set PyTorch's allocator on a GPU."""


def hardware() -> str:
    """Processor, cores and memory in a few words; without the memory where /proc is missing, as on macOS."""
    lines = CPUINFO.read_text().splitlines() if CPUINFO.is_file() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    words = [names[0] if names else platform.processor() or platform.machine(), f"{os.cpu_count()} cores"]
    if MEMINFO.is_file():
        words.append(f"{int(MEMINFO.read_text().split()[1]) / 2**20:.0f} GiB")
    return ", ".join(words)


def available_memory() -> int:
    """Bytes of main memory that programs can still take, within a container's limit; 0 where it is unknown."""
    lines = MEMINFO.read_text().splitlines() if MEMINFO.is_file() else []
    limits = [int(line.split()[1]) * 2**10 for line in lines if line.startswith("MemAvailable:")]
    with suppress(OSError, ValueError):  # "max", or no cgroup of the second version
        limits.append(max(0, int((CGROUP / "memory.max").read_text()) - int((CGROUP / "memory.current").read_text())))
    return min(limits, default=0)


def usable_cores() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def spare_cores(ranks: int) -> int:
    """Processes, 8 at most, that may prepare data for one of the ranks of this machine; two cores stay with the rank.

    0 where the shared memory, through which they send pictures, is small, as in a container by default (64 MiB).
    """
    cores = usable_cores()
    free = shutil.disk_usage(SHARED_MEMORY).free if SHARED_MEMORY.is_dir() else 0
    return max(0, min(8, cores // max(1, ranks) - 2)) if free >= 2**30 * ranks else 0


def let_segments_grow() -> None:
    """Have PyTorch's allocator on a GPU extend its segments, since lengths vary: less memory is lost between tensors.

    It must be called before CUDA starts. A setting of the user stays.
    """
    if not any(name in os.environ for name in ALLOCATOR):
        os.environ[ALLOCATOR[0]] = "expandable_segments:True"


@cache
def made_by_amd() -> bool:
    """Whether the processor is AMD's."""
    text = CPUINFO.read_text() if CPUINFO.is_file() else platform.processor()
    return "AuthenticAMD" in text


def extensions_folder(environment: Mapping[str, str]) -> Path:
    """Folder for torch's compiled extensions: TORCH_EXTENSIONS_DIR, or a folder of this Python environment.

    Environments that share torch's default folder rebuild each other's operators. That folder is used where the
    environment is not writable.
    """
    if folder := environment.get("TORCH_EXTENSIONS_DIR"):
        return Path(folder)
    if os.access(sys.prefix, os.W_OK):
        return Path(sys.prefix) / "torch_extensions"
    cache = environment.get("XDG_CACHE_HOME") or str(Path(environment.get("HOME", "~")).expanduser() / ".cache")
    return Path(cache) / "torch_extensions"


STALE_LOCK_SECONDS = 600.0


def stale_locks(root: Path) -> list[Path]:
    """Lock files of killed builds in torch's extension cache, for which the next build would wait forever."""
    locks = []
    for folder, _, names in os.walk(root):
        with suppress(OSError):  # a build that ends deletes its lock
            if "lock" in names and time.time() - (path := Path(folder, "lock")).stat().st_mtime > STALE_LOCK_SECONDS:
                locks.append(path)
    return sorted(locks)


_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""Options of glibc's mallopt (malloc.h)."""
_OWN_SETTINGS = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES")


def keep_freed_memory(*, block: int = 2**25, total: int = 2**31 - 1) -> bool:
    """Make the C library keep freed memory for reuse, up to a limit.

    By default glibc returns large blocks to the system and requests them again, and the system clears each page: this
    costs time in every training step. Later glibc raises its own threshold and keeps them, and a server's memory grows
    beyond the needs of its requests. Settings in the environment take precedence.

    Args:
        block: larger blocks are returned at once, bytes; at most 32 MiB.
        total: maximum bytes to keep.

    Returns:
        Whether a setting was changed; False without glibc.
    """
    if any(name in os.environ for name in _OWN_SETTINGS):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    return mallopt is not None and bool(mallopt(_MMAP_THRESHOLD, block) and mallopt(_TRIM_THRESHOLD, total))
