"""The machine: its name beside every figure, how this process uses its memory, where what is compiled is kept."""

from __future__ import annotations

import ctypes
import os
import platform
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path

CPUINFO, MEMINFO = Path("/proc/cpuinfo"), Path("/proc/meminfo")


def hardware() -> str:
    """Processor, cores and memory in a few words; without the memory where there is no /proc, as on macOS."""
    lines = CPUINFO.read_text().splitlines() if CPUINFO.is_file() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    words = [names[0] if names else platform.processor() or platform.machine(), f"{os.cpu_count()} cores"]
    if MEMINFO.is_file():
        words.append(f"{int(MEMINFO.read_text().split()[1]) / 2**20:.0f} GiB")
    return ", ".join(words)


@cache
def made_by_amd() -> bool:
    """Whether AMD made the processor."""
    text = CPUINFO.read_text() if CPUINFO.is_file() else platform.processor()
    return "AuthenticAMD" in text


@cache
def multiplies_tiles() -> bool:
    """Whether the processor has matrix units for bfloat16 (Intel's AMX)."""
    return CPUINFO.is_file() and "amx_bf16" in CPUINFO.read_text()


def extensions_folder(environment: Mapping[str, str]) -> Path:
    """Where what torch compiles is kept: TORCH_EXTENSIONS_DIR, or a folder of this Python environment.

    Environments that share torch's own default rebuild each other's operators. It is used where the environment cannot
    be written to.

    Args:
        environment: such as `os.environ`.
    """
    if given := environment.get("TORCH_EXTENSIONS_DIR"):
        return Path(given)
    if os.access(sys.prefix, os.W_OK):
        return Path(sys.prefix) / "torch_extensions"
    cache = environment.get("XDG_CACHE_HOME") or str(Path(environment.get("HOME", "~")).expanduser() / ".cache")
    return Path(cache) / "torch_extensions"


STALE_LOCK_SECONDS = 600.0


def stale_locks(root: Path, *, now: float | None = None) -> list[Path]:
    """Locks that a killed build left behind; the next build would wait for them for ever.

    Args:
        root: torch's extension cache.
        now: seconds since the epoch.
    """
    moment = time.time() if now is None else now
    found = []
    for folder, _, names in os.walk(root):
        with suppress(OSError):  # a build that ends takes its lock away
            if "lock" in names and moment - (path := Path(folder, "lock")).stat().st_mtime > STALE_LOCK_SECONDS:
                found.append(path)
    return sorted(found)


_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""Options of glibc's mallopt (malloc.h)."""
_OWN_SETTINGS = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES")


def keep_freed_memory(*, block: int = 2**25, total: int = 2**31 - 1) -> bool:
    """Have the C library keep freed memory for what comes next, up to a size.

    By default glibc gives large blocks back to the system and asks for them again, which clears them page by page: that
    costs a training step time. After a while it keeps them instead, and a server's memory grows by what no request
    needs any more. Settings in the environment win.

    Args:
        block: larger blocks, in bytes, go back at once; at most 32 MiB.
        total: bytes that are kept at most.

    Returns:
        Whether anything was set; not so without glibc.
    """
    if any(name in os.environ for name in _OWN_SETTINGS):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    return mallopt is not None and bool(mallopt(_MMAP_THRESHOLD, block) and mallopt(_TRIM_THRESHOLD, total))


def renew_threads() -> None:
    """Make PyTorch's thread pool anew in a process that was forked; call it before the first thread is started.

    A fork leaves the pool without its threads. PyTorch replaces it at its next use, which two threads at once do not
    survive ("Invalid thread pool!", ATen/ParallelOpenMP.cpp), and transformers loads weights in several threads.
    """
    import torch

    torch.set_num_threads(torch.get_num_threads())
