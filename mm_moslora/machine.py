"""The machine in a few words, to stand beside every figure."""

from __future__ import annotations

import os
import platform
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
